"""The queue of networks to train, and what is known of each. No torch: it starts before the workers do."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.training_job import TrainingJob

State = Literal["queued", "running", "calibrating", "done", "failed"]
TRIES = 3
"""How often a network may lose its workers without a new checkpoint in between."""
WAITS = 20
"""How often a network waits for its storage without a new checkpoint in between."""


@dataclass(frozen=True)
class Progress:
    """Where one network stands."""

    name: str
    iterations: int
    state: State = "queued"
    step: int = 0
    first_step: int = 0
    """Where its workers went on, when they last started."""
    losses: dict[str, float] = field(default_factory=dict)
    """Latest means since the last report: noise, bound, feature."""
    seconds: float = 0.0
    """Wall time since its worker started or last started again, as of the last report."""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By category, once done: version, chosen settings, figures on implanted defects, images, false alarms."""
    reason: str | None = None
    """Why it failed, one line."""
    warning: str | None = None
    """What is wrong beside the training, one line."""


class Board:
    """The queue, and what is known of every network. Lives on the driver's node and ends with it."""

    def __init__(self, jobs: Sequence[TrainingJob]) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._facts: dict[str, dict[str, Any]] = {name: {} for name in self._jobs}
        self._queue = deque(self._jobs)
        self._held: dict[int, str] = {}
        self._taken: Counter[int] = Counter()
        self._losses = dict.fromkeys(self._jobs, 0)
        self._waits = dict.fromkeys(self._jobs, 0)

    def take(self, slot: int) -> str | None:
        """The next network of the slot: the one that it held when its workers died, else one of the queue; None at its end."""
        self.lose(slot, "its workers ended before the next checkpoint, perhaps for want of memory")
        if not self._queue:
            return None
        name = self._held[slot] = self._queue.popleft()
        self._taken[slot] += 1
        self.post(name, {"state": "running", "reason": None, "warning": None})
        return name

    def job(self, name: str) -> TrainingJob:
        """What is asked of a network."""
        return self._jobs[name]

    def lose(self, slot: int, reason: str) -> int:
        """What the slot holds, if anything, is not being trained any more: it is next, or failed.

        Returns how many networks the slot has taken so far.
        """
        name = self._held.pop(slot, None)
        if name is not None:
            self._losses[name] += 1
            if self._losses[name] < TRIES:
                self._queue.appendleft(name)
            else:
                known = self._facts[name].get("reason")
                self.post(name, {"state": "failed", "reason": f"given up after {TRIES} tries: {known or reason}"})
        return self._taken[slot]

    def end(self, slot: int, name: str, facts: dict[str, Any]) -> None:
        """The slot is done with this network, unless it is so already."""
        if self._held.get(slot) == name:
            del self._held[slot]
            self.post(name, facts)

    def blame(self, slot: int, name: str, reason: str) -> None:
        """What ends the slot's workers; of several that fall like dominoes the first one said it."""
        if self._held.get(slot) == name and not self._facts[name].get("reason"):
            self.post(name, {"reason": reason})

    def postpone(self, slot: int, name: str, reason: str) -> bool:
        """The storage failed, not the network: it is next again. False, and it has failed, where that lasts too long."""
        if self._held.get(slot) != name:
            return True
        self._waits[name] += 1
        if self._waits[name] > WAITS:
            self.end(slot, name, {"state": "failed", "reason": reason})
            return False
        del self._held[slot]
        self._queue.appendleft(name)
        self.post(name, {"state": "queued", "warning": f"tried again soon: {reason}"})
        return True

    def post(self, name: str, facts: dict[str, Any]) -> None:
        """Add to what is known of a network."""
        if "checkpoint" in facts:
            self._losses[name] = self._waits[name] = 0
        self._facts[name].update({key: value for key, value in facts.items() if key != "checkpoint"})

    def read(self) -> dict[str, dict[str, Any]]:
        """Everything known."""
        return self._facts

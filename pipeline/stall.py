"""A stream from which nothing comes any more is an error, not a wait without end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

STALL_MINUTES = 60.0
"""Without anything done, after which jobs stop. A shard takes seconds to minutes; what is waited for longer will not come: a
worker that never starts, a storage that never answers."""

Item = TypeVar("Item")


class StalledError(Exception):
    """Nothing came for too long; whoever starts again may be luckier. The message is one line."""


def steadily(stream: Iterable[Item], stall_minutes: float) -> Iterator[Item]:
    """What the stream gives, as it comes, and what it raises; StalledError when nothing comes for so long, inf for ever.

    The stream runs in a thread of its own, which is left behind where it stalls.
    """
    arrived: SimpleQueue[tuple[list[Item], BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            for item in stream:
                arrived.put(([item], None))
        except BaseException as error:  # raised again below, in the thread that asks
            arrived.put(([], error))
        else:
            arrived.put(([], None))

    Thread(target=run, name="stream", daemon=True).start()
    limit_s = None if stall_minutes == float("inf") else 60 * stall_minutes
    while True:
        try:
            items, error = arrived.get(timeout=limit_s)
        except Empty:
            raise StalledError(f"nothing was done for {stall_minutes:g} minutes") from None
        if error is not None:
            raise error
        if not items:
            return
        yield from items

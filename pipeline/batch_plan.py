"""What a scoring run is asked to do: archives, models, where the rows go, and what earlier runs have done of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime

from pipeline.archives import Archive
from pipeline.errors import UserError
from pipeline.model_store import ModelInfo
from pipeline.results import MapFormat, finished_shards
from pipeline.storage import Location


@dataclass(frozen=True)
class BatchPlan:
    """One run: what is scored by which models, and where the rows go. Plain values, so that it travels."""

    archives: tuple[Archive, ...]
    models: dict[str, ModelInfo]
    """One per category of the archives."""
    results: Location
    night: str
    map_format: MapFormat
    shard_images: int
    started: datetime
    """The run's time, written as every row's `scored_at`."""
    max_failure_fraction: float = 1.0
    """More failed images of a category than this, 0 to 1, make the run's exit status 1."""

    def suffix(self, archive: Archive) -> str:
        """The part of a shard's file name that says what it was made of: content of the archive, shard size and model.

        Where one of them changes, the archive is scored anew beside what is there.
        """
        cut = hashlib.sha256(f"{archive.fingerprint} {self.shard_images}".encode()).hexdigest()[:8]
        return f"-{cut}-{self.models[archive.category].version}"


@dataclass(frozen=True)
class Workers:
    """Scoring actors and what each of them holds."""

    actors: int
    threads: int
    """Of each actor."""
    cpus_per_actor: float
    """What Ray sets aside for each actor."""
    gpus_per_actor: float


def check_options(actors: int, shard_images: int, max_failure_fraction: float, stall_minutes: float) -> None:
    """Raises UserError for what no run can do, before anything is looked at."""
    if actors < 0:
        raise UserError(f"--actors {actors}: choose 1 or more, or 0 to choose by itself")
    if not 1 <= shard_images <= 256:
        raise UserError(f"--shard-images {shard_images}: choose 1 to 256")
    if not 0 <= max_failure_fraction <= 1:
        raise UserError(f"--max-failure-fraction {max_failure_fraction}: choose 0 to 1")
    if not stall_minutes > 0:
        raise UserError(f"--stall-minutes {stall_minutes:g}: choose more than 0, or inf to wait without end")


def committed_shards(plan: BatchPlan, archive: Archive) -> list[str]:
    """Names of the archive's shards that the plan's model has scored, in this run or an earlier one; sorted."""
    return _own_shards(plan, archive, finished_shards(plan.results, category=archive.category, night=plan.night))


def all_committed_shards(plan: BatchPlan) -> list[list[str]]:
    """The same of every archive, in their order; the results of a category are listed once."""
    done = {c: finished_shards(plan.results, category=c, night=plan.night) for c in plan.models}
    return [_own_shards(plan, archive, done[archive.category]) for archive in plan.archives]


def _own_shards(plan: BatchPlan, archive: Archive, finished: set[str]) -> list[str]:
    suffix = plan.suffix(archive)
    return sorted(name for name in finished if name.startswith(f"{archive.name}-") and name.endswith(suffix))

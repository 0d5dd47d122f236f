"""Score archives of photographs with the trained models and append scores, maps and failures to the results tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial

from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

from pipeline.archives import Archive, find_archives
from pipeline.batch import STALL_MINUTES, score_archives
from pipeline.batch_plan import BatchPlan, all_committed_shards, check_options
from pipeline.command import OK, PARTIAL_FAILURE, TRY_AGAIN, console, run
from pipeline.errors import UserError
from pipeline.model_store import ModelInfo, scoring_model
from pipeline.night_lock import LockLostError, hold_night
from pipeline.progress import ScoringProgress, show_totals, size_text
from pipeline.ray_session import ray_session
from pipeline.results import MapFormat
from pipeline.storage import Location
from pipeline.storage_checks import require_writable
from pipeline.totals import ShardOutcome


@dataclass(frozen=True)
class Options:
    """Options of score_archives."""

    archives: tuple[str, ...]
    """Tar (.tar, .tar.gz, .tgz, .tar.zst, .tzst) or zip files, or folders of them or of loose images; paths or s3:// URIs."""
    models: str
    """Where train_all stored the models."""
    results: str
    """Where the tables are written."""
    category: str | None = None
    """Category of all archives; otherwise a category=C part of the path, or the archive's parent folder."""
    night: str = ""
    """Partition of the results, YYYY-MM-DD; today (UTC) when omitted."""
    maps: MapFormat = "float16"
    """How anomaly maps are stored: float16 (about 83 KiB each), uint8 (about 19 KiB) or none."""
    shard_images: int = 256
    """Images per shard, the unit of work and retry: 1 to 256."""
    actors: int = 0
    """Scoring actors; 0 takes one per GPU, or without GPUs one."""
    max_failure_fraction: float = 0.1
    """Exit status 1 when more of a category's images failed than this, 0 to 1; whatever was not scored at all makes it 1
    anyway. Single broken photographs are everyday and wait in the failures table: at 0 each of them would make a
    scheduler repeat and report the night. A tenth of a category is a fault of camera, upload or archive, which at 1 would
    pass for a good night."""
    stall_minutes: float = STALL_MINUTES
    """Stop with exit status 75 when nothing went on for so long, or what hangs would keep its night from every other run. More
    than the slowest shard takes; inf waits without end."""
    wait: bool = False
    """Wait while another run works on the same night, instead of refusing."""
    dry_run: bool = False
    """Print the plan, with sizes and what is scored already, and stop."""


def models_for(archives: list[Archive], models: Location) -> dict[str, ModelInfo]:
    """The latest model of every category among the archives. Raises UserError when one is missing."""
    return {category: scoring_model(models, category) for category in sorted({a.category for a in archives})}


def score(options: Options) -> int:
    """Score; returns the exit status."""
    night = options.night or f"{datetime.now(UTC):%Y-%m-%d}"
    try:
        night = date.fromisoformat(night).isoformat()
    except ValueError as error:
        raise UserError(f"--night {night}: write the date as YYYY-MM-DD") from error
    check_options(options.actors, options.shard_images, options.max_failure_fraction, options.stall_minutes)
    results = Location.parse(options.results)
    if options.dry_run:
        plan = plan_night(options, results, night)
        sizes = [archive.size() for archive in plan.archives]
        show_plan(plan, sizes)
        show_archives(plan, sizes)
        return OK
    require_writable(results)
    try:
        # Planned within the lock: what it waits for may change archives, models and what is done.
        with hold_night(results, night, wait=options.wait, tell=partial(console.print, markup=False)) as lock:
            plan = plan_night(options, results, night)
            sizes = [archive.size() for archive in plan.archives]
            show_plan(plan, sizes)
            with ray_session() as resources, ScoringProgress(sizes) as progress:

                def committed(outcome: ShardOutcome) -> None:
                    progress(outcome)
                    lock.check()

                totals = score_archives(
                    plan, resources.scoring_workers(options.actors), committed, options.stall_minutes
                )
    except (LockLostError, OSError, BotoCoreError, ClientError) as error:
        console.print(f"stopped: {' '.join(str(error).split())}; run the same command again", style="red", markup=False)
        return TRY_AGAIN
    show_totals(totals, plan.max_failure_fraction)
    return OK if totals.fine(plan.max_failure_fraction) else PARTIAL_FAILURE


def plan_night(options: Options, results: Location, night: str) -> BatchPlan:
    """What there is to score at this moment."""
    archives = find_archives(options.archives, category=options.category)
    return BatchPlan(
        archives=tuple(archive.fingerprinted() for archive in archives),
        models=models_for(archives, Location.parse(options.models)),
        results=results,
        night=night,
        map_format=options.maps,
        shard_images=options.shard_images,
        started=datetime.now(UTC),
        max_failure_fraction=options.max_failure_fraction,
    )


def show_plan(plan: BatchPlan, sizes: Sequence[int]) -> None:
    """What will be scored by which models."""
    total = f"{len(plan.archives)} archives, {size_text(sum(sizes))}"
    console.print(f"night {plan.night}: {total}, results to {plan.results}", markup=False)
    for category, info in plan.models.items():
        own = [size for archive, size in zip(plan.archives, sizes, strict=True) if archive.category == category]
        console.print(f"  {category}: {len(own)} archives, {size_text(sum(own))}, model {info.version}", markup=False)


def show_archives(plan: BatchPlan, sizes: Sequence[int]) -> None:
    """Every archive with its size and how many of its shards are scored already."""
    for archive, size, done in zip(plan.archives, sizes, all_committed_shards(plan), strict=True):
        scored = f", {len(done)} shards scored already" if done else ""
        console.print(f"    {archive.kind} {archive.location}: {size_text(size)}{scored}", markup=False)


if __name__ == "__main__":
    run(score, Options, __doc__ or "")

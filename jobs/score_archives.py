"""Score archives of photographs with the trained models and append scores, maps and failures to the results tables."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime

from pipeline.archives import Archive, find_archives
from pipeline.batch import BatchPlan, score_archives
from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.errors import UserError
from pipeline.model_store import ModelInfo, model_info
from pipeline.progress import ScoringProgress, show_totals
from pipeline.ray_session import ray_session
from pipeline.results import MapFormat
from pipeline.storage import Location, require_writable


@dataclass(frozen=True)
class Options:
    """Options of score_archives."""

    archives: tuple[str, ...]
    """Tar or zip files, or folders of them or of loose images; local paths or s3:// URIs."""
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
    dry_run: bool = False
    """Print the plan and stop."""


def models_for(archives: list[Archive], models: Location) -> dict[str, ModelInfo]:
    """The latest model of every category among the archives. Raises UserError when one is missing."""
    return {category: model_info(models, category) for category in sorted({a.category for a in archives})}


def score(options: Options) -> int:
    """Score; returns the exit status."""
    started = datetime.now(UTC)
    night = options.night or f"{started:%Y-%m-%d}"
    try:
        night = date.fromisoformat(night).isoformat()
    except ValueError as error:
        raise UserError(f"--night {night}: write the date as YYYY-MM-DD") from error
    if options.actors < 0:
        raise UserError(f"--actors {options.actors}: choose 1 or more, or 0 to choose by itself")
    if not 1 <= options.shard_images <= 256:
        raise UserError(f"--shard-images {options.shard_images}: choose 1 to 256")
    results = Location.parse(options.results)
    archives = find_archives(options.archives, category=options.category)
    plan = BatchPlan(
        archives=tuple(archive.fingerprinted() for archive in archives),
        models=models_for(archives, Location.parse(options.models)),
        results=results,
        night=night,
        map_format=options.maps,
        shard_images=options.shard_images,
        started=started,
    )
    console.print(f"night {night}: {len(archives)} archives, results to {results}", markup=False)
    for category, info in plan.models.items():
        count = sum(archive.category == category for archive in archives)
        console.print(f"  {category}: {count} archives, model {info.version}", markup=False)
    if options.dry_run:
        for archive in archives:
            console.print(f"    {archive.kind} {archive.location}", markup=False)
        return OK
    require_writable(results)
    with ray_session() as resources:
        totals = score_archives(plan, resources.scoring_workers(options.actors), ScoringProgress())
    show_totals(totals)
    return OK if totals.balanced and not totals.errors else PARTIAL_FAILURE


if __name__ == "__main__":
    run(score, Options, __doc__ or "")

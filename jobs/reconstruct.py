"""Restore photographs: what they would look like without the defects that the trained models find in them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.archives import Archive, find_archives
from pipeline.batch import STALL_MINUTES, restore_archives
from pipeline.batch_plan import BatchPlan, check_options
from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.datasets import Layout, categories, detect_layout
from pipeline.errors import UserError
from pipeline.evaluation import labelled_archive
from pipeline.model_store import model_categories, scoring_model
from pipeline.progress import ScoringProgress, show_totals, size_text
from pipeline.ray_session import ray_session
from pipeline.restoration_methods import METHODS, MethodName, require_able
from pipeline.shard_restoring import RestorePlan, restored_shards
from pipeline.storage import Location
from pipeline.storage_checks import require_writable


@dataclass(frozen=True)
class Options:
    """Options of reconstruct."""

    models: str
    """Where train_all stored the models."""
    output: str
    """Folder or s3:// URI for the pictures, in the model's size (256 x 256): restored, and the difference in grey levels."""
    images: tuple[str, ...] = ()
    """Folders of photographs, or tar and zip files, or folders of them; paths or s3:// URIs."""
    dataset: str = ""
    """Instead of --images: the test photographs of this labelled data set, whose masks come into the sheets. After correcting a
    mask choose another --output."""
    layout: Layout | None = None
    """How the data set is laid out; found out by looking when omitted."""
    category: str | None = None
    """Category of all photographs; otherwise a category=C part of the path, or the parent folder. Of a data set the only one
    that is restored; otherwise all of it that have a model."""
    method: MethodName = "conditioned"
    """conditioned: noise the photograph partly and sample back, pulled towards it where it is normal; gradient: descend on
    how far features lie from normal, and let the network clean up (Lu et al. 2023), which takes several times longer."""
    sheets: bool = False
    """Also a sheet of each: photograph, ground truth with --dataset, restored, heat map, difference."""
    steps_strip: bool = False
    """Also the states on the way side by side."""
    shard_images: int = 32
    """Photographs per shard, the unit of work and retry: 1 to 256."""
    actors: int = 0
    """Restoring actors; 0 takes one per GPU, or without GPUs one."""
    max_failure_fraction: float = 0.1
    """Exit status 1 when more of a category's photographs failed than this, 0 to 1; whatever was not restored at all makes
    it 1 anyway."""
    stall_minutes: float = STALL_MINUTES
    """Stop with exit status 75 when nothing went on for so long. More than the slowest shard takes; inf waits without end."""
    dry_run: bool = False
    """Print the plan and stop."""


def reconstruct(options: Options) -> int:
    """Restore; returns the exit status."""
    plan, settings = planned(options)
    sizes = [archive.size() for archive in plan.archives]
    console.print(
        f"{len(plan.archives)} archives, {size_text(sum(sizes))}, method {options.method}; pictures to {plan.results}",
        markup=False,
    )
    if options.dry_run:
        for archive, done in zip(plan.archives, restored_shards(plan, settings), strict=True):
            already = f", {len(done)} shards restored already" if done else ""
            console.print(f"  {archive.kind} {archive.location}: {archive.category}{already}", markup=False)
        return OK
    require_writable(plan.results)
    with ray_session() as resources, ScoringProgress(sizes, verb="restored") as progress:
        workers = resources.scoring_workers(options.actors)
        totals = restore_archives(plan, workers, settings, progress, options.stall_minutes)
    show_totals(totals, plan.max_failure_fraction, verb="restored", failures_in=f"{settings.done}/*.json")
    return OK if totals.fine(plan.max_failure_fraction) else PARTIAL_FAILURE


def planned(options: Options) -> tuple[BatchPlan, RestorePlan]:
    """What there is to restore, and how. Raises UserError for options that do not go together."""
    check_options(options.actors, options.shard_images, options.max_failure_fraction, options.stall_minutes)
    output, models = Location.parse(options.output), Location.parse(options.models)
    for images in map(Location.parse, [*options.images, *filter(None, [options.dataset])]):
        if output == images or output.uri.startswith(images.uri.rstrip("/") + "/"):
            raise UserError(f"--output {output} lies in {images}: pictures would be restored again and again")
    archives, masks = labelled(options) if options.dataset else (given(options), None)
    plan = BatchPlan(
        archives=archives,
        models={category: scoring_model(models, category) for category in sorted({each.category for each in archives})},
        results=output,
        night="",
        map_format="none",
        shard_images=options.shard_images,
        started=datetime.now(UTC),
        max_failure_fraction=options.max_failure_fraction,
    )
    for model in plan.models.values():
        require_able(model.config, METHODS[options.method])
    settings = RestorePlan(output, METHODS[options.method], options.sheets, options.steps_strip, masks)
    return plan, settings


def given(options: Options) -> tuple[Archive, ...]:
    """The photographs named by --images."""
    if not options.images:
        raise UserError("give --images or --dataset: there is nothing to restore")
    if options.layout:
        raise UserError("--layout goes with --dataset")
    return tuple(each.fingerprinted() for each in find_archives(options.images, category=options.category))


def labelled(options: Options) -> tuple[tuple[Archive, ...], dict[str, Location | None]]:
    """The test photographs of --dataset, and the mask of each by image id."""
    if options.images:
        raise UserError("--images and --dataset: give one of them")
    dataset = Location.parse(options.dataset)
    layout = options.layout or detect_layout(dataset)
    trained = model_categories(Location.parse(options.models))
    chosen = [options.category] if options.category else [c for c in categories(dataset, layout) if c in trained]
    if not chosen:
        raise UserError(f"no category of {dataset} has a model in {options.models} (there: {', '.join(trained)})")
    found = [labelled_archive(dataset, layout, category) for category in chosen]
    return tuple(archive for archive, _ in found), {key: mask for _, masks in found for key, mask in masks.items()}


if __name__ == "__main__":
    run(reconstruct, Options, __doc__ or "")

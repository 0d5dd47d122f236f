"""Score the labelled test split and measure how well the maps find the defects: pixel AUROC, AP, PRO and image AUROC."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import evaluation
from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.datasets import Layout, detect_layout
from pipeline.errors import UserError
from pipeline.model_store import model_categories
from pipeline.progress import ScoringProgress, metrics_table, show_totals
from pipeline.ray_session import ray_session
from pipeline.storage import Location
from pipeline.storage_checks import require_writable


@dataclass(frozen=True)
class Options:
    """Options of evaluate."""

    dataset: str
    """Folder or s3:// URI around the categories, with test images and masks."""
    models: str
    """Where train_all stored the models."""
    results: str
    """Where the tables are written; labelled runs go to night=evaluation."""
    layout: Layout | None = None
    """How the data set is laid out; found out by looking when omitted."""
    categories: tuple[str, ...] = ()
    """Categories to evaluate; every one that has a model when omitted."""
    json: str | None = None
    """Also write the metrics to this JSON file."""
    fpr_limit: float = 0.3
    """False-positive rate up to which PRO is integrated; part of the column's name."""
    actors: int = 0
    """Scoring actors; 0 takes one per GPU, or without GPUs one."""
    dry_run: bool = False
    """Print the plan and stop."""


def main(options: Options) -> int:
    """Evaluate; returns the exit status."""
    dataset, models = Location.parse(options.dataset), Location.parse(options.models)
    results = Location.parse(options.results)
    layout = options.layout or detect_layout(dataset)
    chosen = options.categories or tuple(model_categories(models))
    if options.actors < 0:
        raise UserError(f"--actors {options.actors}: choose 1 or more, or 0 to choose by itself")
    plan = evaluation.plan(dataset, layout, chosen, models, results)
    for category, masks in plan.masks.items():
        defective = sum(mask is not None for mask in masks.values())
        version = plan.batch.models[category].version
        console.print(
            f"  {category}: {len(masks)} labelled images ({defective} defective), model {version}",
            markup=False,
        )
    if options.dry_run:
        return OK
    require_writable(results)
    if options.json:
        require_writable(Location.parse(options.json).parent)
    sizes = [archive.size() for archive in plan.batch.archives]
    with ray_session() as resources, ScoringProgress(sizes) as progress:
        found = evaluation.run(plan, resources.scoring_workers(options.actors), progress, options.fpr_limit)
    show_totals(found.totals, plan.batch.max_failure_fraction)
    console.print(metrics_table(found.metrics))
    for category, reasons in found.reasons.items():
        for metric, reason in reasons.items():
            console.print(f"{category}: {metric} is undefined: {reason}", markup=False)
    if options.json:
        Location.parse(options.json).write_json(found.metrics)
    if found.missing:
        console.print(f"{found.missing} labelled images could not be scored and count in no metric", style="bold red")
    return OK if found.totals.fine(plan.batch.max_failure_fraction) and not found.missing else PARTIAL_FAILURE


if __name__ == "__main__":
    run(main, Options, __doc__ or "")

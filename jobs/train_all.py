"""Fit one diffusion model per category, several at once, and store each as the category's latest model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.config import PresetName, load_config
from pipeline.datasets import Layout, categories, detect_layout, training_records
from pipeline.errors import UserError
from pipeline.progress import show_training
from pipeline.ray_session import Resources, ray_session
from pipeline.storage import Location, require_writable
from pipeline.training import TrainingJob, train_categories


@dataclass(frozen=True)
class Options:
    """Options of train_all."""

    dataset: str
    """Folder or s3:// URI around the categories."""
    models: str
    """Folder or s3:// URI where models are stored."""
    layout: Layout | None = None
    """How the data set is laid out; found out by looking when omitted."""
    categories: tuple[str, ...] = ()
    """Categories to train; all of the data set when omitted."""
    preset: PresetName = "fast"
    """Named settings: demo and fast for a CPU (minutes a category), paper (as published) and unified (the same with one
    network for all categories) for a GPU."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SECTION.FIELD=VALUE ...")] = ()
    """Settings that differ from the preset, such as training.iterations=200."""
    workers_per_category: int = 1
    """Training workers that share one category's batch."""
    max_concurrent: int = 0
    """Categories trained at the same time; 0 takes one per GPU, or without GPUs one per CPU."""
    dry_run: bool = False
    """Print the plan and stop."""


def share(resources: Resources, count: int, workers: int, max_concurrent: int) -> tuple[int, int, float]:
    """How many categories run at once, and the CPUs and GPUs of each of their workers. UserError when it does not fit."""
    available = resources.gpus or resources.cpus
    concurrent = min(count, max_concurrent or max(1, available // workers))
    if concurrent * workers > available:
        kind = "GPUs" if resources.gpus else "CPUs"
        raise UserError(
            f"{concurrent} categories x {workers} workers need {concurrent * workers} {kind}, there are {available}: "
            "lower --max-concurrent or --workers-per-category"
        )
    cpus = max(1, min(resources.cpus // (concurrent * workers), resources.cpus_of_largest_node))
    return concurrent, cpus, 1.0 if resources.gpus else 0.0


def train_all(options: Options) -> int:
    """Train; returns the exit status."""
    dataset, models = Location.parse(options.dataset), Location.parse(options.models)
    config = load_config(options.preset, options.set)
    layout = options.layout or detect_layout(dataset)
    chosen = tuple(dict.fromkeys(options.categories)) or tuple(categories(dataset, layout))
    counts = {category: len(training_records(dataset, layout, category)) for category in chosen}
    if options.workers_per_category < 1 or options.max_concurrent < 0:
        raise UserError("--workers-per-category must be at least 1 and --max-concurrent at least 0")
    if not options.dry_run:
        require_writable(models)
    groups = {"joint": chosen} if config.joint else {category: (category,) for category in chosen}
    with ray_session() as resources:
        concurrent, cpus, gpus = share(resources, len(groups), options.workers_per_category, options.max_concurrent)
        console.print(
            f"{len(chosen)} categories of {dataset} ({layout}), preset {options.preset} [{config.digest()}], "
            f"{config.training.iterations} iterations; {concurrent} at once, "
            f"{options.workers_per_category} worker(s) each with {cpus} CPU(s) and {gpus:g} GPU(s); models to {models}",
            markup=False,
        )
        if options.dry_run:
            for category, count in counts.items():
                console.print(f"  {category}: {count} normal training images")
            return OK
        jobs = [
            TrainingJob(
                name=name,
                categories=group,
                dataset=dataset,
                layout=layout,
                models=models,
                config=config,
                workers=options.workers_per_category,
                cpus_per_worker=cpus,
                gpus_per_worker=gpus,
            )
            for name, group in groups.items()
        ]
        outcome = show_training(train_categories(jobs, max_concurrent=concurrent))
    failed = [category for row in outcome if row.state == "failed" for category in groups[row.name]]
    if failed:
        console.print(f"{len(failed)} of {len(chosen)} categories failed: {', '.join(failed)}", style="bold red")
        return PARTIAL_FAILURE
    return OK


if __name__ == "__main__":
    run(train_all, Options, __doc__ or "")

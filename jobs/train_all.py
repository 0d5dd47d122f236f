"""Fit one diffusion model per category, several at once, and store each as the category's latest model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.config import PresetName
from pipeline.datasets import Layout, categories, detect_layout, training_records
from pipeline.errors import UserError
from pipeline.model_store import model_info, publish
from pipeline.progress import model_line, show_training
from pipeline.ray_session import Resources, ray_session
from pipeline.selection import DEFAULT_SPACE, best, candidates
from pipeline.storage import Location
from pipeline.storage_checks import require_exists, require_writable
from pipeline.training import Progress, TrainingJob, train_categories


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
    """Named settings: demo and fast for a CPU (minutes a category); for a GPU best, paper (as published) and unified
    (the same with one network for all categories)."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SECTION.FIELD=VALUE ...")] = ()
    """Settings that differ from the preset, such as training.iterations=200."""
    select: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="SECTION.FIELD=[VALUE,VALUE] ...")] = None
    """Try every combination of these settings and keep what finds defects implanted in held-out normal images best; no
    labelled defect is needed. Without a list: smoothing, image score and window of the pixel branch. Settings outside
    `scoring` train a network for every value."""
    false_alarm_rate: float | None = None
    """Share of normal images that may be called anomalous, such as 0.01; the preset's when omitted."""
    initial_weights: str | None = None
    """A published guided-diffusion checkpoint (file or s3:// URI) that the networks start from, such as
    256x256_diffusion.pt for the preset paper."""
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
    overrides = list(options.set)
    if options.false_alarm_rate is not None:
        overrides.append(f"scoring.false_alarm_rate={options.false_alarm_rate}")
    listed = () if options.select is None else options.select or DEFAULT_SPACE
    networks = candidates(options.preset, overrides, listed)
    config = networks[0].config
    ways = sum(len(network.variants) for network in networks)
    initial_weights = None if options.initial_weights is None else Location.parse(options.initial_weights)
    if initial_weights is not None:
        require_exists(initial_weights, "--initial-weights")
    layout = options.layout or detect_layout(dataset)
    chosen = tuple(dict.fromkeys(options.categories)) or tuple(categories(dataset, layout))
    counts = {category: len(training_records(dataset, layout, category)) for category in chosen}
    if options.workers_per_category < 1 or options.max_concurrent < 0:
        raise UserError("--workers-per-category must be at least 1 and --max-concurrent at least 0")
    if not options.dry_run:
        require_writable(models)
    groups = {"joint": chosen} if config.joint else {category: (category,) for category in chosen}
    with ray_session() as resources:
        count, workers = len(groups) * len(networks), options.workers_per_category
        concurrent, cpus, gpus = share(resources, count, workers, options.max_concurrent)
        console.print(
            f"{len(chosen)} categories of {dataset} ({layout}), preset {options.preset} [{config.digest()}], "
            f"{config.training.iterations} iterations; "
            + (f"{len(networks)} networks and {ways} ways of scoring tried; " if ways > 1 else "")
            + f"{concurrent} at once, "
            f"{workers} worker(s) each with {cpus} CPU(s) and {gpus:g} GPU(s); models to {models}",
            markup=False,
        )
        for number, network in enumerate(networks if len(networks) > 1 else [], 1):
            console.print(
                f"  ~{number}: {', '.join(network.settings)}, {len(network.variants)} ways of scoring", markup=False
            )
        if options.dry_run:
            for category, count in counts.items():
                console.print(f"  {category}: {count} normal training images")
            return OK
        jobs = [
            TrainingJob(
                name=name if len(networks) == 1 else f"{name}~{number}",
                categories=group,
                dataset=dataset,
                layout=layout,
                models=models,
                config=network.config,
                workers=options.workers_per_category,
                cpus_per_worker=cpus,
                gpus_per_worker=gpus,
                initial_weights=initial_weights,
                variants=network.variants,
                publish=len(networks) == 1,
            )
            for name, group in groups.items()
            for number, network in enumerate(networks, 1)
        ]
        outcome = show_training(train_categories(jobs, max_concurrent=concurrent))
    failed = [category for category in chosen if not conclude(category, jobs, outcome, listed)]
    if failed:
        console.print(f"{len(failed)} of {len(chosen)} categories failed: {', '.join(failed)}", style="bold red")
    elif any(row.state == "failed" for row in outcome):
        console.print("some of the networks tried failed; the best of the others is in use")
    return PARTIAL_FAILURE if failed else OK


def conclude(category: str, jobs: list[TrainingJob], outcome: list[Progress], listed: Sequence[str]) -> bool:
    """Put the category's best model in use and say what it is; False when it has none."""
    found = {row.name: row.found[category] for row in outcome if category in row.found}
    if not found:
        return False
    name = best(found)
    (job,) = [job for job in jobs if job.name == name]
    version = found[name]["version"]
    if not job.publish:
        publish(job.models, category, version)
    config = model_info(job.models, category, version).config.model_dump(mode="json")
    settings = {}
    for item in listed:
        section, _, setting = item.partition("=")[0].strip().partition(".")
        settings[f"{section}.{setting}"] = config[section][setting]
    console.print(model_line(category, found[name], settings), markup=False)
    return True


if __name__ == "__main__":
    run(train_all, Options, __doc__ or "")

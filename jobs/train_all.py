"""Fit one diffusion model per category, several at once, and store each as the category's latest model.

With --list, --promote, --pin or --unpin it trains nothing and shows or changes which versions are in use.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.datasets import Layout, categories, detect_layout, training_records
from pipeline.errors import UserError
from pipeline.fleet import train_fleet
from pipeline.model_store import model_info
from pipeline.model_versions import (
    networks_in_use,
    pin,
    promote,
    publish,
    stored_versions,
    trained_categories,
    unpin,
    up_to_date,
)
from pipeline.presets import PresetName
from pipeline.progress import model_line, show_training, versions_table
from pipeline.ray_session import ray_session
from pipeline.resources import Slots
from pipeline.selection import DEFAULT_SPACE, Candidate, best, candidates
from pipeline.storage import Location
from pipeline.storage_checks import require_exists, require_writable
from pipeline.tracking import require_tracking
from pipeline.training_board import Progress
from pipeline.training_images import files_fingerprint
from pipeline.training_job import TrainingJob

SMALL_PRESETS = ("demo", "fast", "texture", "gaussian")
"""Several of their networks share a GPU."""


@dataclass(frozen=True)
class Options:
    """Options of train_all."""

    models: str
    """Folder or s3:// URI where models are stored."""
    dataset: str | None = None
    """Folder or s3:// URI around the categories."""
    layout: Layout | None = None
    """How the data set is laid out; found out by looking when omitted."""
    categories: tuple[str, ...] = ()
    """Categories to train, or to list; all when omitted."""
    only_missing: bool = False
    """Leave out categories whose model was trained with the same settings on the same files and can score as it is."""
    preset: PresetName = "fast"
    """Named settings: for a CPU (minutes a category) demo, fast, texture (restored photographs beside the given ones) and
    gaussian (PaDiM, a baseline without training); for a GPU best, paper (as published) and unified (the same with one
    network for all categories)."""
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
    calibrate_only: bool = False
    """Train nothing: calibrate the networks of the models in use anew with the scoring settings of this command, on the
    photographs that they were trained on; for another --false-alarm-rate, another way of scoring, or a new release."""
    workers_per_category: int = 1
    """Training workers that share one category's batch."""
    gpus_per_worker: float | None = None
    """GPUs of a worker, 1 or a part of one; when omitted 0.25 for the presets meant for a CPU, else 1. Without GPUs it
    does not matter."""
    max_concurrent: int = 0
    """Categories trained at the same time; 0 takes as many as there is room for on the GPUs, or without GPUs one per CPU."""
    in_memory_gib: float = 4.0
    """Decoded photographs of a category beyond this (GiB) are decoded once into a file on the worker's disk."""
    dry_run: bool = False
    """Print the plan and stop."""
    list: bool = False
    """Show the stored versions of every category, and stop."""
    promote: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CATEGORY=VERSION ...")] = ()
    """Put these versions in use, and stop."""
    pin: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CATEGORY ...")] = ()
    """Keep the versions of these categories in use whatever is trained, and stop."""
    unpin: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CATEGORY ...")] = ()
    """Let the next training of these categories put its model in use again, and stop."""


@dataclass(frozen=True)
class Plan:
    """What is to be trained."""

    dataset: Location
    layout: Layout
    models: Location
    counts: dict[str, int]
    """Normal photographs of every category that is trained."""
    skipped: int
    """Categories that --only-missing leaves out."""
    unusable: dict[str, str]
    """Categories that were found but cannot be trained, and why, one line."""
    networks: tuple[Candidate, ...]
    listed: tuple[str, ...]
    """Settings of which the best are chosen."""
    jobs: tuple[TrainingJob, ...]
    """One per network; those with the most photographs first, since they end last."""


def train_all(options: Options) -> int:
    """Train, or show and change versions; returns the exit status."""
    if options.list or options.promote or options.pin or options.unpin:
        return manage(options)
    plan = planned(options)
    if plan.skipped:
        console.print(f"{plan.skipped} categories are trained with these settings on these files already")
    for reason in plan.unusable.values():
        console.print(reason, markup=False)
    if not plan.jobs:
        return PARTIAL_FAILURE if plan.unusable else OK
    with ray_session() as resources:
        shared = 0.25 if options.preset in SMALL_PRESETS and options.workers_per_category == 1 else 1.0
        slots = resources.training_slots(
            len(plan.jobs),
            workers=options.workers_per_category,
            max_concurrent=options.max_concurrent,
            gpus_per_worker=shared if options.gpus_per_worker is None else options.gpus_per_worker,
            in_memory_gib=options.in_memory_gib,
        )
        for network in plan.networks:
            network.config.training.share(slots.workers)
        show_plan(plan, slots, options.preset)
        if options.dry_run:
            for category, count in plan.counts.items():
                console.print(f"  {category}: {count} normal training images")
            return PARTIAL_FAILURE if plan.unusable else OK
        outcome = show_training(train_fleet(plan.jobs, slots))
    failed = [category for category in plan.counts if not conclude(category, plan, outcome)] + [*plan.unusable]
    if failed:
        asked = len(plan.counts) + len(plan.unusable)
        console.print(f"{len(failed)} of {asked} categories failed: {', '.join(failed)}", style="bold red")
    elif any(row.state == "failed" for row in outcome):
        console.print("some of the networks tried failed; the best of the others is in use")
    return PARTIAL_FAILURE if failed else OK


def planned(options: Options) -> Plan:
    """Which networks to train on what. Raises UserError for settings, categories and folders that cannot be."""
    if options.dataset is None:
        raise UserError("--dataset is missing: name the folder or s3:// URI around the categories")
    require_tracking()
    dataset, models = Location.parse(options.dataset), Location.parse(options.models)
    overrides = list(options.set)
    if options.false_alarm_rate is not None:
        overrides.append(f"scoring.false_alarm_rate={options.false_alarm_rate}")
    listed = () if options.select is None else options.select or DEFAULT_SPACE
    networks = candidates(options.preset, overrides, listed)
    initial_weights = None if options.initial_weights is None else Location.parse(options.initial_weights)
    if initial_weights is not None:
        require_exists(initial_weights, "--initial-weights")
    if options.calibrate_only and len(networks) > 1:
        raise UserError("--calibrate-only trains no networks: --select settings of scoring")
    layout = options.layout or detect_layout(dataset)
    chosen = tuple(dict.fromkeys(options.categories)) or tuple(categories(dataset, layout))
    if not options.dry_run:
        require_writable(models)
    joint, source = networks[0].config.joint, revision()
    counts: dict[str, int] = {}
    unusable: dict[str, str] = {}
    jobs: list[TrainingJob] = []
    for group in [chosen] if joint else [(category,) for category in chosen]:
        try:
            records = {category: training_records(dataset, layout, category) for category in group}
            start = None if initial_weights is None else initial_weights.uri
            versions = networks_in_use(models, group, networks[0].config, start) if options.calibrate_only else ()
        except UserError as error:
            if joint or options.categories or len(chosen) == 1:
                raise  # asked for by name, or all there is
            unusable[group[0]] = str(error)
            continue
        files = files_fingerprint([record for found in records.values() for record in found])
        tried = [
            TrainingJob(
                name=("joint" if joint else group[0]) + (f"~{number}" if len(networks) > 1 else ""),
                categories=group,
                dataset=dataset,
                layout=layout,
                models=models,
                config=network.config,
                initial_weights=initial_weights,
                variants=network.variants,
                versions=versions,
                publish=len(networks) == 1,
                files_fingerprint=files,
                revision=source,
            )
            for number, network in enumerate(networks, 1)
        ]
        asked = {job.settings_digest for job in tried}
        if options.only_missing and all(up_to_date(models, category, asked, files) for category in group):
            continue
        counts |= {category: len(found) for category, found in records.items()}
        jobs += tried
    jobs.sort(key=lambda job: -sum(counts[category] for category in job.categories))
    skipped = len(chosen) - len(counts) - len(unusable)
    return Plan(dataset, layout, models, counts, skipped, unusable, tuple(networks), listed, tuple(jobs))


def show_plan(plan: Plan, slots: Slots, preset: PresetName) -> None:
    """What will be trained, where."""
    config = plan.networks[0].config
    work = "calibrated only" if plan.jobs[0].versions else f"{config.training.iterations} iterations"
    ways = sum(len(network.variants) for network in plan.networks)
    console.print(
        f"{len(plan.counts)} categories of {plan.dataset} ({plan.layout}), preset {preset} [{config.digest()}], "
        f"{work}; "
        + (f"{len(plan.networks)} networks and {ways} ways of scoring tried; " if ways > 1 else "")
        + f"{slots.count} at once, "
        f"{slots.workers} worker(s) each with {slots.cpus} CPU(s) and {slots.gpus:g} GPU(s); models to {plan.models}",
        markup=False,
    )
    for number, network in enumerate(plan.networks if len(plan.networks) > 1 else [], 1):
        console.print(
            f"  ~{number}: {', '.join(network.settings)}, {len(network.variants)} ways of scoring", markup=False
        )


def conclude(category: str, plan: Plan, outcome: Sequence[Progress]) -> bool:
    """Put the category's best model in use and say what it is; False when it has none."""
    found = {row.name: row.found[category] for row in outcome if category in row.found}
    if not found:
        return False
    name = best(found)
    (job,) = [job for job in plan.jobs if job.name == name]
    version = found[name]["version"]
    kept_back = found[name]["kept_back"] if job.publish else publish(job.models, category, version)
    config = model_info(job.models, category, version).config.model_dump(mode="json")
    settings = {}
    for item in plan.listed:
        setting = item.partition("=")[0].strip()
        settings[setting] = reduce(getitem, setting.split("."), config)
    console.print(model_line(category, found[name], settings), markup=False)
    if kept_back:
        console.print(
            f"{category}: another version, pinned or chosen meanwhile, stays in use; --promote {category}={version} changes that"
        )
    return True


def manage(options: Options) -> int:
    """Change which versions are in use, then list those that were asked for."""
    models = Location.parse(options.models)
    for item in options.promote:
        category, separator, version = item.rpartition("=")
        if not separator:
            raise UserError(f"--promote {item}: write CATEGORY=VERSION, as --list shows them")
        promote(models, category, version)
        console.print(f"{category}: {version} is in use", markup=False)
    for category in options.pin:
        console.print(f"{category}: {pin(models, category)} stays in use whatever is trained", markup=False)
    for category in options.unpin:
        console.print(f"{category}: {unpin(models, category)} is in use until the next training", markup=False)
    if options.list:
        known = trained_categories(models)
        if unknown := sorted({*options.categories} - {*known}):
            raise UserError(f"no model of {', '.join(unknown)} in {models} (there: {', '.join(known) or 'none'})")
        found = [version for category in options.categories or known for version in stored_versions(models, category)]
        console.print(versions_table(found))
    return OK


def revision() -> str | None:
    """The source code's: DEFECTMAP_REVISION, which images set, else git's where this is a checkout."""
    if given := os.environ.get("DEFECTMAP_REVISION"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    run(train_all, Options, __doc__ or "")

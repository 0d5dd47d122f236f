"""How fast it is: ours against what people would otherwise run and against what the machine can do, in one run.

Each benchmark prints its figures and, with --json, writes them with the machine and the versions. With --compare OLD.json it
also prints new / old of every figure. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.benchmarks.decode import measure_decode
from pipeline.benchmarks.fleet import measure_fleet
from pipeline.benchmarks.machine import chosen_device, machine, versions
from pipeline.benchmarks.made import random_scorer
from pipeline.benchmarks.measured import Measured, differences, figures_table
from pipeline.benchmarks.metrics import measure_metrics
from pipeline.benchmarks.night import measure_night
from pipeline.benchmarks.restore import measure_restore
from pipeline.benchmarks.score import measure_score
from pipeline.benchmarks.train import measure_train
from pipeline.command import OK, console, run
from pipeline.datasets import detect_layout, training_records
from pipeline.errors import UserError
from pipeline.memory import reuse_freed_memory
from pipeline.model_store import scoring_model
from pipeline.model_weights import load_scorer
from pipeline.presets import PresetName, load_config
from pipeline.ray_session import ray_session
from pipeline.scoring import Scorer
from pipeline.storage import Location
from pipeline.storage_checks import require_writable
from pipeline.training_images import load_photographs, split_holdout

if TYPE_CHECKING:  # pipeline.benchmarks says how threads wait before torch is loaded
    import torch


@dataclass(frozen=True)
class Report:
    """What every benchmark takes."""

    json: str | None = None
    """Also write figures, machine, versions and sizes to this JSON file."""
    compare: str | None = None
    """A JSON file of an earlier run of the same benchmark: print new / old of every figure."""


@dataclass(frozen=True)
class Network(Report):
    """What benchmarks of a network take."""

    preset: PresetName = "fast"
    """The settings of the network; its weights are random."""
    set: tuple[str, ...] = ()
    """Settings that differ from the preset, such as scoring.batch_size=16."""
    device: str = ""
    """Where it runs: cpu or cuda; cuda where there is one when omitted."""
    rounds: int = 5
    """Samples of each piece of work; figures are medians."""
    matrix: int = 0
    """Side of the matrices whose product is the ceiling; 0 takes 4096 on a CPU and 8192 on a GPU."""


@dataclass(frozen=True)
class Score(Network):
    """Photographs in memory to maps and scores: images/s against the published recipe, and utilisation."""

    models: str | None = None
    """Where train_all stored a model to measure instead of random weights; needs --category."""
    category: str | None = None
    """Whose model."""
    batches: int = 2
    """Full batches that ours scores in a round."""
    baseline_images: int = 2
    """Photographs that the published recipe scores in a round."""


@dataclass(frozen=True)
class Train(Network):
    """One optimiser step: seconds against an eager float32 step, and utilisation."""

    steps: int = 2
    """Of ours in a round; the baseline takes one."""


@dataclass(frozen=True)
class Metrics(Report):
    """Exact pixel AUROC and PRO against scikit-learn with a loop over thresholds, and adeval."""

    maps: int = 1725
    """Made maps, in categories of 115; MVTec AD's test set has 1 725."""
    side: int = 256
    """Side of a map in pixels."""


@dataclass(frozen=True)
class Decode(Report):
    """PNG and JPEG files to the map's size: images/s of one core by ours and by the decoders that are installed."""

    images: int = 8
    """Files of each format."""
    side: int = 1024
    """Side of the photographs in pixels."""
    map_size: int = 256
    """Side that they are shrunk to."""
    target: float = 600.0
    """Images per second for which the cores are counted."""
    rounds: int = 5
    """Samples of each decoder; figures are medians."""


@dataclass(frozen=True)
class Pipeline(Report):
    """A night's archives to Parquet by the real job, against the model alone on photographs in memory."""

    preset: PresetName = "fast"
    """The settings of the network; its weights are random."""
    set: tuple[str, ...] = ()
    """Settings that differ from the preset."""
    storage: str = ""
    """An empty folder or s3:// prefix; when omitted a SeaweedFS server of the dev extra, or else a local folder."""
    images: int = 512
    """Photographs of the night, in tars of 128; at least two shards for each actor."""
    side: int = 1024
    """Their side in pixels."""
    shard_images: int = 64
    """Images per shard."""
    actors: int = 0
    """Scoring actors; 0 takes one per GPU, or without GPUs one."""
    rounds: int = 5
    """Samples of the model alone, before the job and after it."""


@dataclass(frozen=True)
class Fleet(Report):
    """Many small categories through train_all, against their bare training one after the other."""

    preset: PresetName = "demo"
    """The settings of the networks."""
    set: tuple[str, ...] = ("training.iterations=30",)
    """Settings that differ from the preset."""
    categories: int = 8
    """Made categories."""
    images: int = 40
    """Photographs of each."""
    side: int = 64
    """Their side in pixels."""


@dataclass(frozen=True)
class Restore(Report):
    """Defects implanted in held-out photographs, restored by each method: nearness to the clean originals, and time."""

    models: str = ""
    """Where train_all stored the model."""
    dataset: str = ""
    """Folder or s3:// URI that it was trained on."""
    category: str = ""
    """Whose model."""
    images: int = 4
    """Held-out photographs at the most; each gets three defects, in copies."""
    device: str = ""
    """Where it runs: cpu or cuda; cuda where there is one when omitted."""


Benchmark = Score | Train | Metrics | Decode | Pipeline | Fleet | Restore


def benchmark(options: Benchmark) -> int:
    """Measure, print, and write what was asked; returns the exit status."""
    name = type(options).__name__.lower()
    old = None if options.compare is None else old_report(Location.parse(options.compare), name)
    if options.json:
        require_writable(Location.parse(options.json).parent)
    measured = measure(options)
    report = {
        "benchmark": name,
        "command": shlex.join(["python", *sys.argv]),
        "measured": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine(),
        "versions": versions(),
        "sizes": measured.sizes,
        "figures": measured.figures,
        "samples_seconds": measured.samples,
        "notes": list(measured.notes),
    }
    show(report, old)
    if options.json:
        Location.parse(options.json).write_json(report)
    return OK


def measure(options: Benchmark) -> Measured:
    """Run the benchmark. Raises UserError where it cannot run as asked."""
    reuse_freed_memory()  # as workers and actors do
    if isinstance(options, Metrics):
        return measure_metrics(options.maps, options.side)
    if isinstance(options, Decode):
        return measure_decode(
            images=options.images,
            side=options.side,
            map_size=options.map_size,
            target_images_per_second=options.target,
            rounds=options.rounds,
        )
    if isinstance(options, Pipeline):
        return measure_pipeline(options)
    if isinstance(options, Fleet):
        with tempfile.TemporaryDirectory() as folder:
            return measure_fleet(
                Path(folder),
                load_config(options.preset, options.set),
                ["--preset", options.preset, "--set", *options.set],
                categories=options.categories,
                images=options.images,
                side=options.side,
            )
    device = chosen_device(options.device)
    if isinstance(options, Restore):
        if not (options.models and options.dataset and options.category):
            raise UserError("--models, --dataset and --category: name the model to restore with, and its photographs")
        if options.images < 1:
            raise UserError(f"--images {options.images}: choose 1 or more")
        scorer = load_scorer(scoring_model(Location.parse(options.models), options.category), device=device)
        held_out = held_out_photographs(scorer, Location.parse(options.dataset), options.category)
        # Other defects than those that calibration chose by.
        return measure_restore(scorer, held_out[: options.images], scorer.config.training.seed + 1)
    matrix_side = options.matrix or (8192 if device.type == "cuda" else 4096)
    if isinstance(options, Train):
        config = load_config(options.preset, options.set)
        if config.training.iterations == 0:
            raise UserError(f"preset {config.preset} trains no network: choose another preset")
        return measure_train(
            config,
            device,
            steps=options.steps,
            matrix_side=matrix_side,
            rounds=options.rounds,
        )
    return measure_score(
        chosen_scorer(options, device),
        batches=options.batches,
        baseline_images=options.baseline_images,
        matrix_side=matrix_side,
        rounds=options.rounds,
    )


def held_out_photographs(scorer: Scorer, dataset: Location, category: str) -> np.ndarray:
    """The normal photographs that training kept for calibration: uint8 (n, map_size, map_size, 3)."""
    records = training_records(dataset, detect_layout(dataset), category)
    training = scorer.config.training
    _, held_out = split_holdout(len(records), training.holdout_fraction, training.seed)
    return load_photographs([records[i] for i in held_out], scorer.config.scoring.map_size)


def measure_pipeline(options: Pipeline) -> Measured:
    """The night on the storage that was asked for, or on one of its own that is gone afterwards."""
    if options.images < 2 * options.shard_images * max(1, options.actors):
        raise UserError(f"--images {options.images}: take at least two shards of {options.shard_images} for each actor")
    scorer = random_scorer(load_config(options.preset, options.set), chosen_device("cpu"))
    with storage_of(options.storage) as storage, ray_session() as resources:
        return measure_night(
            storage,
            scorer,
            resources,
            images=options.images,
            side=options.side,
            shard_images=options.shard_images,
            actors=options.actors,
            rounds=options.rounds,
        )


@contextmanager
def storage_of(uri: str) -> Iterator[Location]:
    """What the user named; else a new bucket of the tests' S3 server; else, where that cannot be had, a new folder."""
    if uri:
        storage = Location.parse(uri)
        if storage.exists() and storage.listing():
            raise UserError(f"--storage {storage}: it must be empty")
        yield storage
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.path.append(str(Path(__file__).parent.parent))  # where tests/ lies in a checkout
        try:
            from tests.seaweed_server import new_bucket, seaweed_server
        except ImportError:
            yield Location.parse(folder)
            return
        with seaweed_server(Path(folder)) as server:
            os.environ.update(server.environment(*server.key("owner")))
            yield new_bucket()


def chosen_scorer(options: Score, device: torch.device) -> Scorer:
    """A stored model, or random weights."""
    if (options.models is None) != (options.category is None):
        raise UserError("--models and --category go together: give both, or neither for random weights")
    model = None
    if options.models is not None and options.category is not None:
        model = scoring_model(Location.parse(options.models), options.category)
    config = model.config if model else load_config(options.preset, options.set)
    if config.scoring.method != "noise":
        raise UserError(
            f"preset {config.preset}: score compares with the published code, which scores by noise scales; "
            "choose another preset or model"
        )
    return load_scorer(model, device=device) if model else random_scorer(config, device)


def old_report(file: Location, name: str) -> dict[str, Any]:
    """An earlier run's JSON. Raises UserError when it is none of this benchmark."""
    try:
        old = file.read_json()
        complete = {"benchmark", "machine", "versions", "sizes", "figures"} <= old.keys()
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise UserError(f"--compare {file}: not a report that --json wrote") from error
    if not complete:
        raise UserError(f"--compare {file}: not a report that --json wrote")
    if old["benchmark"] != name:
        raise UserError(f"--compare {file}: it is a report of {old['benchmark']}, not of {name}")
    return old


def show(report: dict[str, Any], old: dict[str, Any] | None) -> None:
    """The table, what the reader must know, and where the old report was measured on something else."""
    where, sizes = report["machine"], report["sizes"]
    gpu = f", {', '.join(where['gpu'])}" if where["gpu"] else ""
    console.print(f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB{gpu}", markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in sizes.items()), markup=False)
    console.print(figures_table(report["benchmark"], report["figures"], old and old["figures"]))
    for note in report["notes"]:
        console.print(f"* {note}", markup=False)
    for line in differences(report, old) if old else ():
        console.print(f"not the same: {line}", markup=False, style="yellow")


if __name__ == "__main__":
    run(benchmark, Benchmark, __doc__ or "")  # type: ignore[arg-type]  # mypy knows no type of unions

"""Running the jobs as users do, on a small data set and with tiny models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.dataset as ds

from pipeline.datasets import training_records
from pipeline.presets import load_config
from pipeline.storage import Location
from pipeline.textures import write_dataset
from pipeline.training import train
from pipeline.training_images import files_fingerprint, load_photographs
from pipeline.training_job import TrainingJob

ROOT = Path(__file__).parent.parent
TINY = [
    "--set",
    "training.iterations=4",
    "training.batch_size=4",
    "network.image_size=32",
    "network.channel_mult=[1,2]",
    "network.attention_resolutions=[]",
    "scoring.pixel_grid=16",
    "features.grid=16",
    "scoring.map_size=64",
    "scoring.batch_size=4",
]
TEXTURES = ("brick", "gravel")
JOB_S = 600
"""Far more than anything takes on a quiet machine."""


def job(name: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command as it ended. One that hangs is told to say where."""
    command = [sys.executable, "-X", "faulthandler", str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {})
    ) as process:
        try:
            output, errors = process.communicate(timeout=JOB_S)
        except subprocess.TimeoutExpired as expired:
            process.send_signal(signal.SIGABRT)
            output, errors = process.communicate(timeout=30)
            raise AssertionError(f"{name} hangs:\n{output}{errors}") from expired
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """What it printed."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return result.stdout


def rows(results: Path | Location, table: str) -> list[dict[str, object]]:
    filesystem, path = (Location.parse(results) / table).arrow_filesystem()
    return ds.dataset(path, filesystem=filesystem, partitioning="hive").to_table().to_pylist()


def make_dataset(folder: Path) -> Path:
    """12 photographs to train on and 9 to test of both textures, 64 px."""
    write_dataset(
        Location.parse(folder), textures=TEXTURES, image_size=64, train_images=12, test_normal=4, test_defective=5
    )
    return folder


def train_tiny(dataset: Path, models: Path) -> Path:
    """Tiny models of both textures."""
    train_here(Location.parse(dataset), Location.parse(models), TEXTURES, TINY[1:])
    return models


def train_here(dataset: Location, models: Location, names: Sequence[str], settings: Sequence[str]) -> None:
    """Models as `train_all --preset demo --set` would train them, but without Ray, whose workers take five times as long to
    start."""
    config = load_config("demo", settings)
    for name in names:
        job = TrainingJob(
            name=name,
            categories=(name,),
            dataset=dataset,
            layout="mvtec",
            models=models,
            config=config,
            variants=(config.scoring,),
            files_fingerprint=files_fingerprint(training_records(dataset, "mvtec", name)),
        )
        train(job, load=load_photographs, report=lambda _: None)

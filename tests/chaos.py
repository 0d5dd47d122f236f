"""Nights that are killed at random moments and started again, compared with one that nobody disturbed.

    python -m tests.chaos --runs 20

Each run kills scoring actors, reading and decoding workers, the raylet or the whole job at seeded numbers of committed shards,
starts the job again until it ends by itself, and compares the tables: nothing lost, nothing twice, nothing different.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.dataset as ds

from pipeline.images import encode_png
from pipeline.textures import photograph
from tests.job_runs import ROOT, job, make_dataset, succeeded, train_tiny

ARCHIVES, IMAGES, SHARD_IMAGES = 3, 24, 3
TARGETS = ("actor", "worker", "raylet", "job")


def make_night(folder: Path) -> Path:
    """A tar, a zip and a folder of 24 small photographs each, every eighth of them cut off."""
    rng = np.random.default_rng(0)
    brick = photograph("brick")
    files = []
    for _ in range(ARCHIVES * IMAGES):
        y, x = rng.integers(0, 400, 2)
        data = encode_png(brick[y : y + 64, x : x + 64])
        files.append(data[: len(data) // 2] if len(files) % 8 == 7 else data)
    brick_folder = folder / "category=brick"
    (brick_folder / "loose").mkdir(parents=True)
    with tarfile.open(brick_folder / "a.tar", "w") as tar:
        for i, data in enumerate(files[:IMAGES]):
            member = tarfile.TarInfo(f"{i:02d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with zipfile.ZipFile(brick_folder / "b.zip", "w") as archive:
        for i, data in enumerate(files[IMAGES : 2 * IMAGES]):
            archive.writestr(f"{i:02d}.png", data)
    for i, data in enumerate(files[2 * IMAGES :]):
        (brick_folder / "loose" / f"{i:02d}.png").write_bytes(data)
    return folder


def arguments(night: Path, models: Path, results: Path) -> list[object]:
    return [
        *("--archives", night, "--models", models, "--results", results, "--night", "2026-01-31"),
        *("--shard-images", SHARD_IMAGES, "--max-failure-fraction", 1, "--wait"),
    ]


def tables(results: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of scores, maps and failures, sorted, without the time of scoring."""
    found = {}
    for name in ("scores", "maps", "failures"):
        table = ds.dataset(results / name, partitioning="hive").to_table()
        kept = [column for column in table.column_names if column != "scored_at"]
        rows = [tuple(str(row[column]) for column in kept) for row in table.to_pylist()]
        found[name] = sorted(rows)
    return found


def disturbed(night: Path, models: Path, results: Path, targets: list[str], rng: random.Random) -> int:
    """Run the night, killing one target after the other; returns how often the job was started."""
    shards, starts = ARCHIVES * IMAGES // SHARD_IMAGES, 0
    waiting = [*targets]
    while True:
        starts += 1
        command = [sys.executable, str(ROOT / "jobs/score_archives.py"), *map(str, arguments(night, models, results))]
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        while waiting and run.poll() is None:
            due = rng.randint(1, shards - 1)
            while run.poll() is None and committed(results) < due:
                time.sleep(0.05)
            if run.poll() is None and kill(run.pid, waiting[0]):
                waiting.pop(0)
                if run.poll() is None:
                    time.sleep(1)
        output, _ = run.communicate(timeout=300)
        if run.returncode == 0:
            return starts
        if starts > 4 + len(targets):
            raise AssertionError(f"not done after {starts} starts:\n{output}")


def committed(results: Path) -> int:
    return sum(1 for _ in (results / "scores").rglob("*.parquet"))


def kill(pid: int, target: str) -> bool:
    """SIGKILL one process of this kind below the job; False where there is none right now."""
    if target == "job":
        os.killpg(pid, signal.SIGKILL)
        return True
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if _kind(process.cmdline()) == target:
                process.kill()
                return True
        except psutil.Error:  # it ended by itself
            continue
    return False


def _kind(command: list[str]) -> str | None:
    """What a process of Ray is, by its title."""
    title = command[0] if command else ""
    if title.startswith("ray::"):
        return "actor" if "MapWorker" in title else "worker"
    return "raylet" if title.endswith("/raylet") else None


def differences(
    found: dict[str, list[tuple[object, ...]]], expected: dict[str, list[tuple[object, ...]]]
) -> Counter[str]:
    """Rows lost and rows too many, by table."""
    counted: Counter[str] = Counter()
    for name, rows in expected.items():
        ours, theirs = Counter(found[name]), Counter(rows)
        counted[f"{name} lost"] += (theirs - ours).total()
        counted[f"{name} too many"] += (ours - theirs).total()
    return +counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = train_tiny(make_dataset(root / "dataset"), root / "models")
        night = make_night(root / "night")
        succeeded(job("score_archives", *arguments(night, models, root / "calm")))
        expected = tables(root / "calm")
        worst: Counter[str] = Counter()
        for seed in range(options.seed, options.seed + options.runs):
            rng = random.Random(seed)
            targets = rng.choices(TARGETS, k=2)
            starts = disturbed(night, models, root / "disturbed", targets, rng)
            found = differences(tables(root / "disturbed"), expected)
            worst += found
            shutil.rmtree(root / "disturbed")
            sys.stdout.write(f"seed {seed}: killed {', '.join(targets)}; {starts} starts; differences {dict(found)}\n")
            sys.stdout.flush()
        sys.stdout.write(f"{options.runs} runs, rows lost, doubled or different: {worst.total()}\n")
        sys.exit(1 if worst else 0)


if __name__ == "__main__":
    main()

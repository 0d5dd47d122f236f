"""Nights that are killed at random moments and started again, compared with one that nobody disturbed.

    python -m tests.chaos --runs 20

Each run kills two things at seeded numbers of committed shards, starts the job again until it ends by itself, and
compares the tables: nothing lost, nothing twice, nothing different. Even runs have Ray and their results on this
machine and kill scoring actors, reading and decoding workers, the raylet or the whole job. Odd runs read from and write
to an S3 server, work on a cluster of two nodes, and may also lose the second node or the server.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow.dataset as ds
from ray.cluster_utils import Cluster

from pipeline.images import encode_png
from pipeline.storage import Location
from pipeline.textures import photograph
from tests.job_runs import JOB_S, ROOT, job, make_dataset, succeeded, train_tiny
from tests.seaweed_server import Seaweed, new_bucket, seaweed_server

ARCHIVES, IMAGES, SHARD_IMAGES = 3, 24, 3
TRIES = 5
TARGETS = ("actor", "worker", "raylet", "job")
CLUSTER_TARGETS = ("actor", "worker", "node", "server", "job")

Kill = Callable[[int, str], bool]
"""kill(process of the job, target): False where there is no such thing to kill right now."""


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


def arguments(night: Location, models: Path, results: Location) -> list[object]:
    return [
        *("--archives", night, "--models", models, "--results", results, "--night", "2026-01-31"),
        *("--shard-images", SHARD_IMAGES, "--max-failure-fraction", 1, "--wait"),
    ]


def tables(results: Location) -> dict[str, list[tuple[object, ...]]]:
    """All rows of scores, maps and failures, sorted, without the time of scoring."""
    found = {}
    for name in ("scores", "maps", "failures"):
        filesystem, path = (results / name).arrow_filesystem()
        table = ds.dataset(path, filesystem=filesystem, partitioning="hive").to_table()
        kept = [column for column in table.column_names if column != "scored_at"]
        rows = [tuple(str(row[column]) for column in kept) for row in table.to_pylist()]
        found[name] = sorted(rows)
    return found


def disturbed(
    night: Location, models: Path, results: Location, targets: list[str], rng: random.Random, kill: Kill
) -> tuple[int, list[str]]:
    """Run the night, killing one target after the other; returns how often the job was started and what was killed."""
    shards, starts = ARCHIVES * IMAGES // SHARD_IMAGES, 0
    waiting = [*targets]
    while True:
        starts += 1
        command = [sys.executable, str(ROOT / "jobs/score_archives.py"), *map(str, arguments(night, models, results))]
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        while waiting and run.poll() is None:
            # A worker reads or decodes for moments only: whenever one is met.
            due = 0 if waiting[0] == "worker" else rng.randint(1, shards - 1)
            while run.poll() is None and committed(results) < due:
                time.sleep(0.05)
            if run.poll() is None and kill(run.pid, waiting[0]):
                waiting.pop(0)
                if run.poll() is None:
                    time.sleep(1)
            time.sleep(rng.uniform(0, 0.05))
        output, _ = run.communicate(timeout=JOB_S)
        if run.returncode == 0:
            return starts, targets[: len(targets) - len(waiting)]
        sys.stdout.write(f"start {starts} ended with {run.returncode}:\n{output}")
        if starts > 4 + len(targets):
            raise AssertionError(f"not done after {starts} starts:\n{output}")


def committed(results: Location) -> int:
    return sum(1 for file in (results / "scores").files(recursive=True) if file.name.endswith(".parquet"))


def kill_process(job: int, target: str) -> bool:
    """SIGKILL one process of this kind, of Ray below this process; False where there is none right now."""
    if target == "job":
        os.killpg(job, signal.SIGKILL)
        return True
    for process in psutil.Process().children(recursive=True):
        try:
            if _kind(process.cmdline()) == target:
                process.kill()
                return True
        except psutil.Error:  # it ended by itself
            continue
    return False


_TITLES = {
    "actor": ("ScoringActor",),
    "worker": ("list_archive", "read_unit", "decode_shard"),
    "trainer": ("RayTrainWorker",),
    "controller": ("TrainController",),
}


def _kind(command: list[str]) -> str | None:
    """What a process of Ray is, by its title. Its own helpers are none: with its agent a raylet ends too."""
    title = command[0] if command else ""
    if title.startswith("ray::"):
        return next((kind for kind, names in _TITLES.items() if any(name in title for name in names)), None)
    return "raylet" if title.endswith("/raylet") else None


@contextmanager
def one_machine() -> Iterator[Kill]:
    """Ray of the job's own, whatever else runs on this machine; what kills there."""
    with patch.dict(os.environ, RAY_ADDRESS="local"):
        yield kill_process


@contextmanager
def two_nodes(server: Seaweed) -> Iterator[Kill]:
    """A cluster of two nodes for jobs to work on; what kills there, and puts a new node or server in the place of the old."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = [cluster.add_node(num_cpus=1)]

    def kill(job: int, target: str) -> bool:
        if target == "node":
            cluster.remove_node(second.pop(), allow_graceful=False)
            time.sleep(2)
            second.append(cluster.add_node(num_cpus=1))
        elif target == "server":
            server.kill()
            time.sleep(2)
            server.start()
        else:
            return kill_process(job, target)
        return True

    try:
        with patch.dict(os.environ, RAY_ADDRESS=cluster.address):
            yield kill
    finally:
        cluster.shutdown()


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


def chaos(runs: range, night: Path, models: Path, results: Path, server: Seaweed) -> int:
    """Disturb so many nights; returns how many rows were lost, doubled or different in all of them."""
    bucket = new_bucket()
    for file in Location.parse(night).files(recursive=True):
        (bucket / "night" / file.relative_to(Location.parse(night))).write_bytes(file.read_bytes())
    places = [(Location.parse(night), Location.parse(results)), (bucket / "night", bucket / "results")]
    expected = []
    for where, kept in places:
        succeeded(job("score_archives", *arguments(where, models, kept / "calm")))
        expected.append(tables(kept / "calm"))
    worst = 0
    for seed in runs:
        rng = random.Random(seed)
        where, kept = places[seed % 2]
        targets = rng.choices(CLUSTER_TARGETS if seed % 2 else TARGETS, k=2)
        with two_nodes(server) if seed % 2 else one_machine() as kill:
            for _ in range(TRIES):
                starts, killed = disturbed(where, models, kept / "disturbed", targets, rng, kill)
                if killed:
                    break
                (kept / "disturbed").remove_tree()  # it ended before its moment came, and shows nothing
        assert killed, f"nothing could be killed in {TRIES} nights"
        found = differences(tables(kept / "disturbed"), expected[seed % 2])
        worst += found.total()
        (kept / "disturbed").remove_tree()
        sys.stdout.write(
            f"seed {seed}: killed {', '.join(killed) or 'nothing'}; {starts} starts; differences {dict(found)}\n"
        )
        sys.stdout.flush()
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = train_tiny(make_dataset(root / "dataset"), root / "models")
        (root / "server").mkdir()
        with seaweed_server(root / "server") as server:
            os.environ.update(server.environment(*server.key("owner")))
            runs = range(options.seed, options.seed + options.runs)
            worst = chaos(runs, make_night(root / "night"), models, root / "results", server)
    sys.stdout.write(f"{options.runs} runs, rows lost, doubled or different: {worst}\n")
    sys.exit(1 if worst else 0)


if __name__ == "__main__":
    main()

"""Trainings that are killed at random moments and started again, compared with one that nobody disturbed.

    python -m tests.training_chaos --runs 5

Each run fits six categories, kills two things at seeded moments, starts the job again where it ended, and compares the
weights of all six models, bit for bit. Even runs have Ray and their models on this machine and kill training workers, Ray
Train's controllers, the raylet or the whole job. Odd runs read from and write to an S3 server, work on a cluster of two
nodes, and may also lose the second node or the server. Meant for a machine of two cores: with more of them a training here
has more threads than one there, and sums round differently.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.benchmarks.made import photographs
from pipeline.images import encode_png
from pipeline.model_store import model_categories, model_info
from pipeline.storage import Location
from tests.chaos import Kill, one_machine, two_nodes
from tests.job_runs import JOB_S, ROOT, TINY, job, succeeded
from tests.seaweed_server import Seaweed, new_bucket, seaweed_server

CATEGORIES = tuple(f"part{number}" for number in range(6))
CHANGES = [*TINY[1:], "training.iterations=60", "training.checkpoint_every=5"]
SETTINGS = ["--preset", "demo", "--set", *CHANGES]
TARGETS = ("trainer", "trainer", "controller", "raylet", "job")
CLUSTER_TARGETS = ("trainer", "controller", "node", "server", "job")


def make_categories(folder: Location, names: Sequence[str] = CATEGORIES) -> Location:
    """Ten photographs of 64 px of each."""
    for seed, name in enumerate(names):
        for i, photograph in enumerate(photographs(10, 64, seed=seed)):
            (folder / name / "train/good" / f"{i:02d}.png").write_bytes(encode_png(photograph))
    return folder


def arguments(dataset: Location, models: Location) -> list[object]:
    return ["--dataset", dataset, "--models", models, *SETTINGS, "--max-concurrent", 2]


def weights(models: Location) -> dict[str, bytes]:
    """The weights of every category's model in use."""
    return {
        name: (model_info(models, name).location / "weights.safetensors").read_bytes()
        for name in model_categories(models)
    }


def disturbed(
    dataset: Location,
    models: Location,
    targets: Sequence[str],
    rng: random.Random,
    kill: Kill,
    latest: int = 4,
    more: Sequence[object] = (),
) -> tuple[int, list[str]]:
    """Train, killing one target after the other; returns how often the job was started and what was killed.

    A moment comes soon after more than some number of categories have begun, `latest` at the most; `more` are further
    options of the job.
    """
    starts, waiting = 0, [*targets]
    while True:
        starts += 1
        asked = [*arguments(dataset, models), "--only-missing", *more]
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs/train_all.py"), *map(str, asked)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while waiting and run.poll() is None:
            due, pause = rng.randint(0, latest), rng.uniform(0, 4)
            while run.poll() is None and _begun(models) <= due:
                time.sleep(0.05)
            time.sleep(pause)
            if run.poll() is None and kill(run.pid, waiting[0]):
                waiting.pop(0)
        output, _ = run.communicate(timeout=JOB_S)
        if run.returncode == 0:
            return starts, [*targets][: len(targets) - len(waiting)]
        sys.stdout.write(f"start {starts} ended with {run.returncode}:\n{output}")
        if starts > 3 + len(targets):
            raise AssertionError(f"not done after {starts} starts:\n{output}")


def _begun(models: Location) -> int:
    """Categories that have a checkpoint or a model."""
    try:
        runs = {folder.name.partition("-")[0] for folder in (models / "_runs").folders()}
        done = {folder.name for folder in models.folders() if not folder.name.startswith("_")}
        return len(runs | done)
    except OSError:  # the server has just been killed
        return 0


def chaos(runs: range, root: Path, server: Seaweed) -> int:
    """Disturb so many trainings; returns how many models differ from those of the undisturbed one."""
    bucket = new_bucket()
    places = [Location.parse(root / "here"), bucket / "there"]
    expected: dict[str, bytes] = {}
    for place in places:
        make_categories(place / "data")
    succeeded(job("train_all", *arguments(places[0] / "data", places[0] / "calm"), env={"RAY_ADDRESS": "local"}))
    expected = weights(places[0] / "calm")
    assert len(expected) == len(CATEGORIES)
    worst = 0
    for seed in runs:
        rng = random.Random(seed)
        place, models = places[seed % 2], places[seed % 2] / f"models{seed}"
        targets = rng.choices(CLUSTER_TARGETS if seed % 2 else TARGETS, k=2)
        with two_nodes(server) if seed % 2 else one_machine() as kill:
            starts, killed = disturbed(place / "data", models, targets, rng, kill)
        assert killed, "nothing could be killed: the training ended before its moment came"
        found = weights(models)
        different = [name for name in CATEGORIES if found.get(name) != expected[name]]
        worst += len(different)
        resumed = [name for name in found if model_info(models, name).provenance["resumed_at_step"]]
        models.remove_tree()
        sys.stdout.write(
            f"seed {seed}: killed {', '.join(killed) or 'nothing'}; {starts} starts; went on from a checkpoint: "
            f"{', '.join(resumed) or 'none'}; different models: {', '.join(different) or 'none'}\n"
        )
        sys.stdout.flush()
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "server").mkdir()
        with seaweed_server(root / "server") as server:
            os.environ.update(server.environment(*server.key("owner")))
            worst = chaos(range(options.seed, options.seed + options.runs), root, server)
    sys.stdout.write(f"{options.runs} runs, models that differ: {worst}\n")
    sys.exit(1 if worst else 0)


if __name__ == "__main__":
    main()

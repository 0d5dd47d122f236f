"""The front door: `ray job submit` to a cluster of several nodes with its data on S3, from training to tables."""

from __future__ import annotations

import base64
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from s3fs import S3FileSystem

from pipeline.model_store import model_categories, model_info
from pipeline.storage import Location
from tests import training_chaos
from tests.ray_cluster import RayCluster, ray_cluster, state_of
from tests.seaweed_server import Seaweed, new_bucket
from tests.tensorboard_events import curves
from tests.training_chaos import make_categories

pytestmark = pytest.mark.slow
NAMES = training_chaos.CATEGORIES[:2]


@pytest.fixture(scope="module")
def bucket(seaweed: Seaweed) -> Iterator[Location]:
    """Two categories to train, in data/, and a night of one of them, in night/."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweed.environment(*seaweed.key("owner")).items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        bucket = new_bucket()
        make_categories(bucket / "data", NAMES)
        for image in (bucket / "data" / NAMES[0] / "train/good").files():
            image.copy_to(bucket / "night" / f"category={NAMES[0]}" / image.name)
        yield bucket
        S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def cluster(seaweed: Seaweed, bucket: Location) -> Iterator[RayCluster]:
    """Head and two workers of one CPU; the nodes have the storage's credentials."""
    environment = seaweed.environment(*seaweed.key("owner"))
    # Sockets want short paths.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, ray_cluster(Path(folder), environment) as running:
        yield running


def said(run: subprocess.CompletedProcess[str]) -> str:
    """Its output in one line: logs are wrapped."""
    return " ".join(run.stdout.split())


def training(bucket: Location, models: str, *more: object) -> list[object]:
    settings = [*training_chaos.SETTINGS, "training.iterations=20"]
    return ["jobs/train_all.py", "--dataset", bucket / "data", "--models", bucket / models, *settings, *more]


@pytest.fixture(scope="module")
def trained(cluster: RayCluster, bucket: Location) -> subprocess.CompletedProcess[str]:
    """A training of one worker per category."""
    return cluster.submit(*training(bucket, "models"))


def test_submitted_training_leaves_models_and_a_log(
    trained: subprocess.CompletedProcess[str], bucket: Location
) -> None:
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "2 at once, 1 worker(s) each with 1 CPU(s)" in said(trained)
    assert all(f"{name}: done 20/20" in said(trained) for name in NAMES)
    assert model_categories(bucket / "models") == list(NAMES)
    assert not (bucket / "models/_runs").files(recursive=True)


def test_two_workers_on_two_nodes_learn_as_one_does(
    trained: subprocess.CompletedProcess[str], cluster: RayCluster, bucket: Location
) -> None:
    run = cluster.submit(*training(bucket, "pairs", "--workers-per-category", 2))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 at once, 2 worker(s) each with 1 CPU(s)" in said(run)
    for name in NAMES:
        (one,) = [each for each in (bucket / "models/_tensorboard").folders() if each.name.startswith(name)]
        alone, together = curves(one), curves(bucket / "pairs/_tensorboard" / one.name)
        for loss in ("noise", "bound", "feature"):
            assert together[loss] == pytest.approx(alone[loss], rel=0.02), loss
            assert len(alone[loss]) == 4


def test_submitted_scoring_leaves_a_row_for_every_image(
    trained: subprocess.CompletedProcess[str], cluster: RayCluster, bucket: Location
) -> None:
    (bucket / "night" / f"category={NAMES[0]}" / "cut.png").write_bytes(b"\x89PNG")
    options = ["--archives", bucket / "night", "--models", bucket / "models", "--results", bucket / "results"]
    run = cluster.submit("jobs/score_archives.py", *options, "--night", "2026-01-31", "--max-failure-fraction", 1)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "11 images in = 10 scored" in said(run)
    filesystem, path = (bucket / "results/scores").arrow_filesystem()
    rows = ds.dataset(path, filesystem=filesystem, partitioning="hive").to_table().to_pylist()
    version = model_info(bucket / "models", NAMES[0]).version
    assert [(row["category"], row["model_version"]) for row in rows] == [(NAMES[0], version)] * 10


def test_nothing_is_left_on_the_cluster(trained: subprocess.CompletedProcess[str], cluster: RayCluster) -> None:
    actors = "[actor.class_name for actor in state.list_actors(filters=[('state', '=', 'ALIVE')])]"
    kept = state_of(cluster, actors)
    assert "Train" not in kept and "PlacementGroupCleaner" not in kept and "Board" not in kept
    groups = "[group['state'] for group in ray.util.placement_group_table().values() if group['state'] != 'REMOVED']"
    assert state_of(cluster, groups) == "[]"
    assert state_of(cluster, "ray.available_resources()['CPU']") == "2.0"


def test_only_code_was_uploaded(trained: subprocess.CompletedProcess[str], cluster: RayCluster) -> None:
    packages = [
        path.parent for session in cluster.sessions for path in session.resolve().rglob("working_dir_files/*/pipeline")
    ]
    assert packages
    for package in packages:
        assert {"jobs", "pipeline", "pyproject.toml"} <= {path.name for path in package.iterdir()}
        assert not {".git", "tests", ".docs", ".venv", "models"} & {path.name for path in package.iterdir()}


def test_no_secret_is_in_models_results_logs_or_job_records(
    trained: subprocess.CompletedProcess[str], cluster: RayCluster, bucket: Location, seaweed: Seaweed
) -> None:
    _, secret = seaweed.key("owner")
    wanted = (secret.encode(), base64.b64encode(secret.encode()))
    texts = [file.read_bytes() for file in bucket.files(recursive=True)]
    logs = [path for session in cluster.sessions for path in (session / "logs").resolve().rglob("*")]
    texts += [path.read_bytes() for path in logs if path.is_file()]
    texts += [state_of(cluster, "state.list_jobs(detail=True)").encode(), trained.stdout.encode()]
    assert len(texts) > 20
    assert not [text for text in texts if any(each in text for each in wanted)]

"""The command lines as users run them: real Ray, real training of tiny models, real files; where a claim is about what is
written and not about the job, the stages in this process."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors

from jobs.reconstruct import Options as Restoring
from jobs.reconstruct import planned
from jobs.score_archives import Options, plan_night
from pipeline.model_store import model_info
from pipeline.shard_restoring import RestoringActor, earlier_restored, restored_shards
from pipeline.shard_scoring import ScoringActor
from pipeline.storage import Location
from pipeline.totals import total
from tests.job_runs import TEXTURES, TINY, job, rows, succeeded
from tests.ray_cluster import one_node
from tests.stages import ONE_THREAD, stream


@pytest.fixture(scope="module")
def ray_node() -> Iterator[dict[str, str]]:
    """A Ray that runs already: the environment of jobs that work in it."""
    # Sockets want short paths.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        one_node(Path(folder)) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def night(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of one night: a folder and a tar, with a truncated, a foreign and an empty file among the images."""
    archives = tmp_path_factory.mktemp("archives") / "night"
    folder, tar_folder = archives / "category=brick", archives / "gravel"
    folder.mkdir(parents=True)
    tar_folder.mkdir()
    for i, image in enumerate(sorted((dataset / "brick/test").glob("*/*.png"))):
        (folder / f"{i}.png").write_bytes(image.read_bytes())
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "notes.png").write_text("no image")
    with tarfile.open(tar_folder / "line-3.tar", "w") as tar:
        for i, image in enumerate(sorted((dataset / "gravel/test").glob("*/*.png"))):
            tar.add(image, f"part/{i}.png")
        tar.addfile(tarfile.TarInfo("part/empty.png"), io.BytesIO())
    return archives


class Scored(NamedTuple):
    """A night that was scored: the command's arguments, its results and how it ended."""

    arguments: list[object]
    results: Path
    run: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def scored(ray_node: dict[str, str], models: Path, night: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """The night as it is scored the first time. Whoever changes it comes last."""
    results = tmp_path_factory.mktemp("scored") / "results"
    arguments = ["--archives", night, "--models", models, "--results", results, "--night", "2026-01-31"]
    return Scored(arguments, results, job("score_archives", *arguments, env=ray_node))


@pytest.mark.slow
def test_a_night_that_hangs_ends_and_is_free_again(
    ray_node: dict[str, str], models: Path, night: Path, tmp_path: Path
) -> None:
    # No worker starts in so short a time.
    arguments = ["--archives", night, "--models", models, "--results", tmp_path, "--night", "2026-01-31"]
    hung = job("score_archives", *arguments, "--stall-minutes", 0.002, env=ray_node)
    assert (hung.returncode, hung.stderr) == (75, ""), hung.stdout + hung.stderr
    assert hung.stdout.splitlines()[-1] == "stopped: nothing went on for 0.002 minutes; run the same command again"
    assert not list((tmp_path / "locks").iterdir())


@pytest.mark.slow
class TestScoring:
    def test_shard_size_and_storage_do_not_change_any_map(
        self, scored: Scored, models: Path, night: Path, s3: Location
    ) -> None:
        for folder in night / "category=brick", models / "brick":
            for file in filter(Path.is_file, folder.rglob("*")):
                (s3 / folder.parent.name / file.relative_to(folder.parent).as_posix()).write_bytes(file.read_bytes())
        options = Options((str(s3 / "night"),), str(s3 / models.name), str(s3 / "results"), shard_images=4)
        plan = plan_night(options, s3 / "results", "2026-01-31")
        stream(plan, ScoringActor(plan, ONE_THREAD))
        assert len((s3 / "results/scores").files(recursive=True)) == 3
        found = []
        for results in (Location.parse(scored.results), s3 / "results"):
            members = {row["image_id"]: row["member"] for row in rows(results, "scores") if row["category"] == "brick"}
            maps = {row["image_id"]: row["map"] for row in rows(results, "maps")}
            found.append({member: np.array(maps[image], np.float64) for image, member in members.items()})
        assert len(found[0]) == 9
        assert found[0].keys() == found[1].keys()
        for key, one in found[0].items():
            np.testing.assert_allclose(one, found[1][key], rtol=2e-3, atol=2e-3)

    def test_every_image_is_scored_or_has_a_failures_row(
        self,
        ray_node: dict[str, str],
        scored: Scored,
        night: Path,
        start: Callable[..., tuple[object, str, str]],
    ) -> None:
        arguments, results, first = scored
        assert first.returncode == 1, first.stdout + first.stderr
        assert "21 images in = 18 scored" in first.stdout
        assert "3 failed" in first.stdout
        assert "brick: 18.2 % of the images failed, --max-failure-fraction allows 10 %" in first.stdout
        scores, failures = rows(results, "scores"), rows(results, "failures")
        assert sorted(row["category"] for row in scores) == ["brick"] * 9 + ["gravel"] * 9
        assert {row["night"] for row in scores} == {"2026-01-31"}
        assert len({row["image_id"] for row in scores}) == 18
        reasons = {Path(str(row["member"])).name: row["error"] for row in failures}
        assert reasons == {"cut.png": "truncated", "notes.png": "not_an_image", "empty.png": "empty_file"}
        maps = rows(results, "maps")
        assert {row["image_id"] for row in maps} == {row["image_id"] for row in scores}
        assert all(len(row["map"]) == 64 * 64 for row in maps)  # type: ignore[arg-type]
        (record,) = (json.loads(path.read_text()) for path in (results / "runs").glob("*.json"))
        assert record["counts"]["images"] == 21
        with tarfile.open(night / "gravel/line-3.tar") as tar:
            read = sum(member.size for member in tar)
        assert record["counts"]["bytes"] == read + sum(f.stat().st_size for f in (night / "category=brick").iterdir())
        assert record["failures"] == {"truncated": 1, "not_an_image": 1, "empty_file": 1}
        assert (record["exit_status"], record["not_scored"]) == (1, [])
        status, told, _ = start("score_archives", *arguments, "--dry-run")
        assert (status, told.count(", 1 shards scored already")) == (0, 2)

        # A compacted night is done as well.
        assert start("compact", "--results", results, "--nights", "2026-01-31")[0] == 0
        before = {path: path.read_bytes() for path in results.rglob("*.parquet")}
        again = job("score_archives", *arguments, env=ray_node)
        assert (again.returncode, "nothing to do" in again.stdout) == (1, True), "a bad night stays one"
        assert "brick: 18.2 % of the images failed" in again.stdout
        assert {path: path.read_bytes() for path in results.rglob("*.parquet")} == before


@pytest.mark.slow
def test_one_network_scores_the_textures_of_a_dtd_layout_by_restoration(
    ray_node: dict[str, str], dataset: Path, tmp_path: Path
) -> None:
    named = dict(zip(("Blotchy_099", "Fibrous_183"), TEXTURES, strict=True))
    for name, source in named.items():
        texture = tmp_path / "dtd" / name
        shutil.copytree(dataset / source / "train/good", texture / "train/good")
        shutil.copytree(dataset / source / "test/good", texture / "test/good")
        for folder in ("test/bad", "ground_truth/bad"):
            (texture / folder).mkdir(parents=True)
        for mask in (dataset / source / "ground_truth").glob("*/*_mask.png"):
            image, bad = mask.name.replace("_mask", ""), f"{mask.parent.name}_{mask.name}"
            shutil.copy(mask, texture / "ground_truth/bad" / bad)
            shutil.copy(
                dataset / source / "test" / mask.parent.name / image, texture / "test/bad" / bad.replace("_mask", "")
            )
    models = tmp_path / "models"
    settings = [*TINY, "features.input_size=null", "joint=true"]
    select = ["--select", "scoring.restoration.eta=[0,1]"]
    command = ["train_all", "--dataset", tmp_path / "dtd", "--models", models, "--preset", "texture"]
    told = succeeded(job(*command, *settings, *select, env=ray_node))
    assert "(dtd), preset texture" in told
    assert "scoring.restoration.eta" in told.split("implanted defects")[0], "the choice is told"
    infos = [model_info(Location.parse(models), name) for name in named]
    assert [info.classes for info in infos] == [tuple(named)] * 2
    first, other = (load_tensors((info.location / "weights.safetensors").read_bytes()) for info in infos)
    network = [name for name in first if name.startswith("denoiser.unet.")]
    assert network and all(torch.equal(first[name], other[name]) for name in network)
    report = tmp_path / "metrics.json"
    arguments = ["--dataset", tmp_path / "dtd", "--models", models, "--results", tmp_path / "results"]
    assert "18 images in = 18 scored" in succeeded(job("evaluate", *arguments, "--json", report, env=ray_node))
    for metrics in json.loads(report.read_text())["categories"].values():
        assert (metrics["images"], metrics["regions"] >= 5) == (9, True)
        assert metrics["pixel_auroc"] > 0.5
    scores = rows(tmp_path / "results", "scores")
    assert len({row["kl_score"] for row in scores}) == 18, "the restored photographs' own score"


@pytest.mark.slow
def test_archives_are_restored_once_and_what_cannot_be_is_named(
    ray_node: dict[str, str],
    models: Path,
    night: Path,
    tmp_path: Path,
    start: Callable[..., tuple[object, str, str]],
) -> None:
    output = tmp_path / "restored"
    arguments = ["--images", night, "--models", models, "--output", output, "--shard-images", 6]
    command = ["reconstruct", *arguments, "--method", "conditioned", "--sheets", "--steps-strip"]
    first = job(*command, env=ray_node)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "21 images in = 18 restored" in first.stdout
    assert "3 failed" in first.stdout
    assert "brick: 18.2 % of the images failed" in first.stdout
    records = [json.loads(path.read_text()) for path in output.glob("_shards/*/*.json")]
    reasons = {Path(row["member"]).name: row["error"] for record in records for row in record["failed"]}
    assert reasons == {"cut.png": "truncated", "notes.png": "not_an_image", "empty.png": "empty_file"}
    assert sum(len(record["restored"]) for record in records) == 18
    pictures = {
        kind: sorted(output.glob(f"*/conditioned-*/*/*/*.{kind}.png"))
        for kind in ("restored", "difference", "sheet", "steps")
    }
    assert [len(found) for found in pictures.values()] == [18] * 4
    for restored, difference, sheet in zip(*list(pictures.values())[:3], strict=True):
        picture = np.asarray(Image.open(restored)).astype(int)
        tiles = np.split(np.asarray(Image.open(sheet)).astype(int), 4, axis=1)
        assert np.array_equal(tiles[1], picture)
        expected = np.abs(picture - tiles[0]).mean(-1).round()
        assert np.array_equal(np.asarray(Image.open(difference)), expected)
    assert any(np.asarray(Image.open(difference)).any() for difference in pictures["difference"])
    status, told, _ = start(*command, "--dry-run")
    assert (status, told.count(", 2 shards restored already")) == (0, 2)
    options = Restoring(str(models), str(output), (str(night),), sheets=True, steps_strip=True, shard_images=6)
    plan, settings = planned(options)
    before = restored_shards(plan, settings)
    again = stream(plan, RestoringActor(plan, ONE_THREAD, settings), before)
    totals = total(again, len(plan.archives), earlier_restored(plan, settings, before))
    assert (totals.skipped_shards, totals.shards, totals.scored) == (4, 0, 0)
    assert not totals.fine(0.1), "what failed before is not forgotten"


def test_sheets_of_a_labelled_data_set_show_its_masks(dataset: Path, models: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "restored"
    shutil.copytree(dataset / "brick", data / "brick")
    unreadable, *_ = sorted((data / "brick/ground_truth").rglob("*_mask.png"))
    unreadable.write_bytes(b"no image")
    plan, settings = planned(Restoring(str(models), str(output), dataset=str(data), sheets=True))
    assert total(stream(plan, RestoringActor(plan, ONE_THREAD, settings)), 1).fine(0.0)
    (record,) = [json.loads(path.read_text()) for path in output.glob("_shards/*/*.json")]
    assert len(record["restored"]) == 9
    assert len(record["masks_not_read"]) == 1
    marked = 0
    for sheet in output.rglob("*.sheet.png"):
        kind, _, number = sheet.name.rpartition("-")[0].removeprefix("brick_test_").rpartition("_")
        tiles = np.split(np.asarray(Image.open(sheet)).astype(int), 5, axis=1)
        given = np.asarray(Image.open(data / f"brick/test/{kind}/{number}.png").convert("RGB"))
        assert np.array_equal(tiles[0], given)
        mask = data / f"brick/ground_truth/{kind}/{number}_mask.png"
        if mask == unreadable:
            assert (tiles[1] == 128).all()
        elif mask.exists():
            assert np.array_equal(tiles[1][..., 0] > 0, np.asarray(Image.open(mask)) > 0)
            marked += 1
        else:
            assert kind == "good"
            assert not tiles[1].any()
    assert marked == 4


@pytest.mark.slow
def test_the_demo_leaves_metrics_tables_and_a_picture(tmp_path: Path) -> None:
    every_core = {"RAY_OVERRIDE_RESOURCES": ""}
    output = succeeded(job("demo", "--output", tmp_path / "demo", "--textures", "gravel", *TINY, env=every_core))
    found = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert set(found["categories"]) == {"gravel"}
    for metrics in found["categories"].values():
        assert metrics["images"] == 50
        assert 0.5 < metrics["pixel_auroc"] <= 1
        assert {"pixel_ap", "pro_0.30", "image_auroc", "image_ap", "regions"} < set(metrics)
    assert f"{100 * found['mean']['pixel_auroc']:.1f}" in output
    table = {row["category"]: row["pixel_auroc"] for row in rows(tmp_path / "demo/results", "metrics")}
    assert table == {name: metrics["pixel_auroc"] for name, metrics in found["categories"].items()}
    with Image.open(tmp_path / "demo/contact-sheet.png") as sheet:
        assert sheet.width > 300
    assert len(rows(tmp_path / "demo/results", "scores")) == 50


@pytest.mark.slow
def test_a_mistake_is_one_line_on_a_quiet_terminal(tmp_path: Path) -> None:
    result = job("train_all", "--dataset", tmp_path / "none", "--models", tmp_path / "models")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "does not exist" in line
    assert result.stdout == ""

"""Training as users run it: real Ray, tiny models, one broken category, kills, versions."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs.train_all import Options, planned, show_plan
from pipeline.model_store import model_info
from pipeline.model_weights import load_scorer
from pipeline.resources import Slots
from pipeline.storage import Location
from tests import training_chaos
from tests.chaos import one_machine
from tests.job_runs import TINY, job, succeeded, train_here
from tests.training_chaos import make_categories, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def categories(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """Two categories of ten photographs."""
    return make_categories(Location.parse(tmp_path_factory.mktemp("categories")), training_chaos.CATEGORIES[:2])


@pytest.fixture(scope="module")
def calm(categories: Location, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of a training that nobody disturbed, in this process and with all photographs in memory."""
    models = Location.parse(tmp_path_factory.mktemp("calm"))
    train_here(categories, models, training_chaos.CATEGORIES[:2], training_chaos.CHANGES)
    return weights(models)


def test_a_killed_training_ends_with_the_very_same_weights(
    categories: Location, calm: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two categories at once, each with one thread, like the calm one's; photographs in a file on disk.
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
    models = Location.parse(tmp_path / "models")
    with one_machine() as kill:
        starts, killed = training_chaos.disturbed(
            categories, models, ["job", "trainer"], random.Random(0), kill, latest=0, more=["--in-memory-gib", 0]
        )
    assert killed == ["job", "trainer"]
    assert starts == 2, "the job is started again, the worker comes back by itself"
    assert weights(models) == calm
    resumed_at = [model_info(models, name).provenance["resumed_at_step"] for name in training_chaos.CATEGORIES[:2]]
    assert max(resumed_at) >= 5


def test_selection_from_published_weights_keeps_the_best_network_where_other_categories_are_broken(
    dataset: Path, models: Path, tmp_path: Path, start: Callable[..., tuple[object, str, str]]
) -> None:
    data, chosen = tmp_path / "data", tmp_path / "models"
    shutil.copytree(dataset, data)
    victim = data / "brick/train/good/003.png"
    victim.write_bytes(victim.read_bytes()[:200])
    shutil.copytree(dataset / "brick/test/good", data / "untaught/test/good")
    trained = load_scorer(model_info(Location.parse(models), "gravel")).denoiser.unet
    published = {k: v.half() for k, v in trained.state_dict().items() if not k.startswith("feature_head.")}
    torch.save(published | {"label_emb.weight": torch.zeros(10, 128)}, tmp_path / "published.pt")
    result = job(
        # Without the network's prediction two networks may find as much.
        *("train_all", "--dataset", data, "--models", chosen, "--preset", "demo", *TINY, "scoring.prediction=subtract"),
        *("--initial-weights", tmp_path / "published.pt", "--false-alarm-rate", "0.05"),
        *("--select", "training.learning_rate=[0.0004,0.00001]", "scoring.map_sigma=[1,2]", "--max-concurrent", 1),
    )
    assert result.returncode == 1, result.stdout + result.stderr
    line = " ".join(result.stdout.split())
    assert "2 of 3 categories failed: brick, untaught" in line
    assert "'untaught' of" in line and "has no normal training images" in line
    assert "003.png" in line.replace(" ", "")
    assert not (chosen / "brick").exists()
    assert not list((chosen / "_runs").glob("gravel*")), "checkpoints of finished runs are removed"

    assert "2 networks and 4 ways of scoring tried" in line
    assert "training.learning_rate=" in line.split("gravel:")[-1]
    assert "scoring.map_sigma=" in line.split("gravel:")[-1]
    assert "false alarms 5 % requested" in line
    versions = {path.parent.name for path in chosen.glob("gravel/*/model.json")}
    assert len(versions) == 2
    stored = {version: json.loads((chosen / "gravel" / version / "model.json").read_text()) for version in versions}
    merits = {
        version: sum(model["selection"][0][figure] for figure in ("pixel_auroc", "pro_0.30", "image_auroc"))
        for version, model in stored.items()
    }
    info = model_info(Location.parse(chosen), "gravel")
    assert info.version == max(merits, key=lambda version: merits[version])
    assert len({*merits.values()}) == 2
    assert info.provenance["initial_weights"] == str(tmp_path / "published.pt")
    assert info.provenance["training_images"] + info.provenance["held_out_images"] == 12
    assert {row["map_sigma"] for row in stored[info.version]["selection"]} == {1.0, 2.0}
    assert 0 <= info.calibration["false_alarms_low"] < 0.05 < info.calibration["false_alarms_high"] <= 1

    study = tmp_path / "study.json"
    status, output, _ = start("study", "--dataset", data, "--models", chosen, "--json", study)
    assert (status, "rank correlation" in output) == (0, True)
    rows = json.loads(study.read_text())["gravel"]
    assert {row["alpha"] for row in rows} >= {0.0, 0.5, 1.0}
    # The way that was chosen has the same figures as when it was chosen.
    (kept,) = (row for row in rows if row["chosen"])
    assert sum(kept["implanted"].values()) == pytest.approx(merits[info.version], abs=0.002)

    file = chosen / "gravel" / info.version / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"context_weight": 0.4}))
    status, _, errors = start("study", "--dataset", data, "--models", chosen)
    assert status == 2
    assert "chose a way of scoring that is none any more: calibrate it anew" in " ".join(errors.split())


def test_versions_are_listed_pinned_and_trained_only_where_missing(
    models: Path, dataset: Path, tmp_path: Path, start: Callable[..., tuple[object, str, str]]
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(models, copy)
    version = model_info(Location.parse(copy), "brick").version
    again = ["train_all", "--dataset", dataset, "--models", copy, "--preset", "demo", "--only-missing", *TINY]
    status, output, _ = start(*again)
    assert (status, "2 categories are trained with these settings on these files already" in output) == (0, True)
    status, output, _ = start("train_all", "--models", copy, "--pin", "brick", "--list")
    assert status == 0
    lines = {line.split()[0]: line for line in output.splitlines() if version in line and "stays" not in line}
    assert "*!" in lines["brick"] and "demo" in lines["brick"]
    status, output, errors = start("train_all", "--models", copy, "--promote", "brick=yesterday")
    assert (status, "no version yesterday" in errors) == (2, True)
    command = [each for each in again if each != "--only-missing"]
    status, output, _ = start(*command, "training.seed=1", "--calibrate-only")
    assert (status, " ".join(output.split()).count("was trained with other training")) == (1, 2)
    # With a setting that differs, both are missing again; planning them changes nothing.
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    output = succeeded(job(*again, "training.seed=1", "--dry-run"))
    assert "2 categories of" in output
    assert "brick: 12 normal training images" in output
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_an_outdated_model_is_listed_refused_and_may_be_calibrated_again(
    models: Path,
    dataset: Path,
    tmp_path: Path,
    start: Callable[..., tuple[object, str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(models, copy)
    info = model_info(Location.parse(copy), "brick")
    file = copy / "brick" / info.version / "model.json"
    # As releases left models that look at context when their networks predicted it, too.
    known = json.loads(file.read_text())
    known["config"]["features"]["context_stages"] = [4]
    file.write_text(json.dumps(known | {"format": 5, "context_weight": 0.25}))
    _, output, _ = start("train_all", "--models", copy, "--list")
    assert ["outdated" in line for line in output.splitlines() if info.version in line] == [True]
    evaluate = ["evaluate", "--dataset", dataset, "--models", copy, "--results", tmp_path / "results", "--dry-run"]
    status, _, errors = start(*evaluate)
    assert (status, "with --calibrate-only" in errors, len(errors.strip().splitlines())) == (2, True, 1)
    settings = {"categories": ("brick",), "preset": "demo", "set": tuple(TINY[1:]), "false_alarm_rate": 0.05}
    plan = planned(Options(str(copy), str(dataset), calibrate_only=True, **settings))
    (again,) = plan.jobs
    assert again.versions == (info.version,)
    show_plan(plan, Slots(1, 1, 1, 0.0), "demo")
    assert "calibrated only" in capsys.readouterr().out

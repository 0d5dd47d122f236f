"""One training from photographs to a stored model: interrupted or not, its weights, curves and provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.images import decode, encode_png
from pipeline.model_store import model_info
from pipeline.model_versions import up_to_date
from pipeline.model_weights import load_scorer
from pipeline.presets import load_config
from pipeline.storage import Location
from pipeline.training import ODDEST, oddest, train
from pipeline.training_images import load_photographs
from pipeline.training_job import TrainingJob
from tests.conftest import make_photographs
from tests.job_runs import TINY
from tests.tensorboard_events import curves


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def write_photographs(folder: Location, count: int = 12, seed: int = 4) -> None:
    for i, photograph in enumerate(make_photographs(count, seed)):
        (folder / f"{i:02d}.png").write_bytes(encode_png(photograph))


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Where data and models lie."""
    return request.getfixturevalue("s3") if getattr(request, "param", "local") == "s3" else Location.parse(tmp_path)


@pytest.fixture
def job(folder: Location, variant: Callable[..., Config]) -> TrainingJob:
    """A training of 12 steps with a checkpoint every 3."""
    write_photographs(folder / "data/cloth/train/good")
    return TrainingJob(
        name="cloth",
        categories=("cloth",),
        dataset=folder / "data",
        layout="mvtec",
        models=folder / "models",
        config=variant(training={"iterations": 12, "checkpoint_every": 3}),
        files_fingerprint="0123",
        revision="4567",
    )


def run(
    job: TrainingJob, stop_at: int | None = None, reported: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Train, and stop where that step is kept; all that was reported."""
    reported = [] if reported is None else reported

    def report(facts: dict[str, Any]) -> None:
        reported.append(facts)
        if facts.get("checkpoint") == stop_at and stop_at is not None:
            raise StoppedError

    train(job, load=load_photographs, report=report)
    return reported


def stored_weights(job: TrainingJob, category: str = "cloth") -> bytes:
    return (model_info(job.models, category).location / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("folder", ["local", "s3"], indirect=True)
def test_an_interrupted_training_ends_with_the_very_same_weights_and_curves(job: TrainingJob) -> None:
    calm = dataclasses.replace(job, models=job.models / "calm")
    run(calm)
    for stop_at in (3, 9):
        with pytest.raises(StoppedError):
            run(job, stop_at)
        assert [file.name for file in job.run_folder.files()] == ["fit.pt"]
    run(job)
    info = model_info(job.models, "cloth")
    assert info.provenance["resumed_at_step"] == 9
    assert stored_weights(job) == stored_weights(calm)
    assert not job.run_folder.exists()
    found, expected = (curves(each.models / "_tensorboard" / each.run_name) for each in (job, calm))
    assert found == expected
    assert sorted(expected["noise"]) == [3, 5, 6, 9, 10, 12]
    assert {"bound", "feature", "learning_rate", "cloth/pixel_auroc"} < expected.keys()


def test_what_is_reported_ends_with_the_last_step(job: TrainingJob) -> None:
    reported = run(job)
    steps = [facts["step"] for facts in reported if "step" in facts]
    assert steps == [3, 5, 6, 9, 10, 12]
    assert [facts["checkpoint"] for facts in reported if "checkpoint" in facts] == [3, 6, 9, 12]
    assert {"state": "calibrating"} in reported


def test_a_checkpoint_of_other_photographs_is_not_continued(job: TrainingJob) -> None:
    with pytest.raises(StoppedError):
        run(job, 6)
    write_photographs(job.dataset / "cloth/train/good", seed=5)
    run(job)
    assert model_info(job.models, "cloth").provenance["resumed_at_step"] == 0


@pytest.mark.parametrize("number", range(0, 12, 3))
def test_the_oddest_normal_photograph_is_named_whether_held_out_or_not(job: TrainingJob, number: int) -> None:
    files = sorted((job.dataset / "cloth/train/good").listing())
    strange = job.dataset / "cloth/train/good" / files[number]
    strange.write_bytes(encode_png(np.ascontiguousarray(np.rot90(decode(strange.read_bytes())))))
    run(job)
    odd = model_info(job.models, "cloth").provenance["oddest_normal"]
    assert odd[0]["image"] == f"cloth/train/good/{files[number]}"
    assert odd[0]["score"] > 2 * odd[1]["score"]


def test_the_oddest_are_those_with_the_highest_scores_that_are_known() -> None:
    scores = np.array([3.0, np.nan, 5.0, 4.0, np.nan])
    assert oddest("abcde", scores) == [{"image": i, "score": s} for i, s in (("c", 5.0), ("d", 4.0), ("a", 3.0))]
    assert len(oddest([str(i) for i in range(50)], np.arange(50.0))) == ODDEST


def test_provenance_tells_where_a_model_comes_from(job: TrainingJob) -> None:
    run(job)
    known = model_info(job.models, "cloth").provenance
    assert known["training_images"] + known["held_out_images"] == 12
    odd = known["oddest_normal"]
    assert len(odd) == 10 and len({each["image"] for each in odd}) == 10
    assert all((job.dataset / each["image"]).read_bytes() for each in odd)
    assert [each["score"] for each in odd] == sorted((each["score"] for each in odd), reverse=True)
    assert known["known_by_heart"] is False
    assert (known["files_fingerprint"], known["revision"]) == ("0123", "4567")
    assert known["settings_digest"] == job.settings_digest
    assert {"defectmap", "torch", "ray"} < known["packages"].keys()
    assert up_to_date(job.models, "cloth", {job.settings_digest}, "0123")
    assert not up_to_date(job.models, "cloth", {job.settings_digest}, "0124")
    other = dataclasses.replace(job, variants=(job.config.scoring,))
    assert not up_to_date(job.models, "cloth", {other.settings_digest}, "0123")


class TestFailures:
    def test_a_diverged_training_says_so_and_stores_nothing(
        self, job: TrainingJob, variant: Callable[..., Config]
    ) -> None:
        diverging = dataclasses.replace(job, config=variant(training={"learning_rate": 1e30}))
        with pytest.raises(FloatingPointError, match=r"not finite at step 5: lower training.learning_rate"):
            run(diverging)
        assert not (job.models / "cloth").exists()

    def test_too_few_photographs_are_named(self, job: TrainingJob) -> None:
        for file in (job.dataset / "cloth/train/good").files()[7:]:
            file.remove()
        with pytest.raises(UserError, match="'cloth' has 7 normal training images: at least 8"):
            run(job)

    def test_a_broken_photograph_is_named(self, job: TrainingJob) -> None:
        (job.dataset / "cloth/train/good/03.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=r"03\.png: .*replace or remove it"):
            run(job)


class TestCalibratingAnew:
    @pytest.fixture
    def again(self, job: TrainingJob, variant: Callable[..., Config]) -> TrainingJob:
        """The trained network of the job, to be calibrated for fewer false alarms."""
        run(job)
        version = model_info(job.models, "cloth").version
        lenient = variant(training={"iterations": 12, "checkpoint_every": 3}, scoring={"false_alarm_rate": 0.2})
        return dataclasses.replace(job, config=lenient, versions=(version,))

    def test_the_network_stays_and_the_threshold_follows(self, job: TrainingJob, again: TrainingJob) -> None:
        reported = run(again)
        old, new = (model_info(job.models, "cloth", version) for version in (*again.versions, None))
        assert new.version != old.version
        assert (new.config.scoring.false_alarm_rate, new.provenance["network_of"]["version"]) == (0.2, old.version)
        assert new.provenance["losses"] == old.provenance["losses"]
        assert new.normal_scores == old.normal_scores
        assert new.calibration["threshold"] < old.calibration["threshold"]
        before, after = (load_scorer(info).denoiser.state_dict() for info in (old, new))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not [facts for facts in reported if facts.get("losses")]
        assert up_to_date(job.models, "cloth", {again.settings_digest}, "0123")

    def test_what_people_chose_meanwhile_stays_in_use(self, again: TrainingJob) -> None:
        run(again)
        chosen = model_info(again.models, "cloth").version
        stricter = again.config.model_copy(update={"scoring": again.config.scoring.model_copy(update={"alpha": 0.25})})
        run(dataclasses.replace(again, config=stricter))
        assert model_info(again.models, "cloth").version == chosen != again.versions[0]
        assert len((again.models / "cloth").folders()) == 3

    def test_photographs_that_may_have_shaped_it_are_refused(self, again: TrainingJob) -> None:
        write_photographs(again.dataset / "cloth/train/good", seed=5)
        with pytest.raises(UserError, match="was trained on other photographs"):
            run(again)
        assert model_info(again.models, "cloth").version == again.versions[0]


def test_one_network_of_two_categories_knows_which_is_which(job: TrainingJob) -> None:
    write_photographs(job.dataset / "wool/train/good", count=9, seed=6)
    joint = job.config.model_copy(update={"joint": True})
    both = dataclasses.replace(job, name="joint", categories=("cloth", "wool"), config=joint)
    run(both)
    version = model_info(job.models, "wool").version
    stricter = joint.model_copy(update={"scoring": joint.scoring.model_copy(update={"false_alarm_rate": 0.001})})
    run(dataclasses.replace(both, config=stricter, versions=(version, version)))
    assert model_info(job.models, "wool").version != version
    infos = {name: model_info(job.models, name) for name in both.categories}
    assert {info.classes for info in infos.values()} == {("cloth", "wool")}
    assert [info.provenance["training_images"] for info in infos.values()] == [8, 5]
    assert stored_weights(both, "cloth") != stored_weights(both, "wool")


def test_the_unified_preset_in_small_trains_and_scores(job: TrainingJob) -> None:
    write_photographs(job.dataset / "wool/train/good", count=9, seed=6)
    small = ["features.extractor=tf_efficientnet_lite0", "network.model_channels=32", "network.num_head_channels=32"]
    config = load_config("unified", [*TINY[1:], *small, "training.iterations=2"])
    run(dataclasses.replace(job, name="joint", categories=("cloth", "wool"), config=config, variants=(config.scoring,)))
    scorers = [load_scorer(model_info(job.models, name)) for name in ("cloth", "wool")]
    maps = [scorer.score(make_photographs(3, seed=7, side=64)).maps for scorer in scorers]
    assert all(np.isfinite(each).all() for each in maps)
    assert [scorer.label for scorer in scorers] == [0, 1]


@pytest.mark.parametrize(
    ("iterations", "scoring"),
    [
        (24, {"method": "restoration", "pixel": "gaussian", "respaced_steps": 40, "timesteps": (9,)}),
        (0, {"method": "features", "pixel": "none", "alpha": 0.0, "prediction": "ignore", "covariance": "place"}),
    ],
)
def test_other_ways_of_scoring_are_stored_and_read_like_the_first(
    job: TrainingJob, variant: Callable[..., Config], iterations: int, scoring: dict[str, object]
) -> None:
    config = variant(training={"iterations": iterations}, scoring=scoring)
    run(dataclasses.replace(job, config=config))
    info = model_info(job.models, "cloth")
    assert info.config == config
    photographs = make_photographs(6, seed=3)
    spoiled = photographs.copy()
    spoiled[:, 8:16, 16:24] = 255
    scorer = load_scorer(info)
    scores = scorer.score(spoiled).scores
    assert (scores > scorer.score(photographs).scores.max()).all()
    assert (scores > info.calibration["threshold"]).all()


class TestMlflow:
    @pytest.fixture(autouse=True)
    def client(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MlflowClient:
        """MLflow's store of files, as this process and its user see it."""
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlflow'}")
        return MlflowClient()

    def test_an_interrupted_training_is_one_run(self, job: TrainingJob, client: MlflowClient) -> None:
        with pytest.raises(StoppedError):
            run(job, 6)
        run(job)
        experiment = client.get_experiment_by_name("defectmap")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.run_name, found.info.status) == (job.run_name, "FINISHED")
        assert found.data.metrics.keys() > {"noise", "bound", "feature", "cloth/image_auroc"}
        steps = [metric.step for metric in client.get_metric_history(found.info.run_id, "noise")]
        assert steps == [3, 5, 6, 9, 10, 12]

    def test_a_store_that_fails_is_a_warning(self, job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        warnings = [facts["warning"] for facts in run(job) if "warning" in facts]
        assert warnings[-1] == "no more of it in MLflow: no space left"
        assert model_info(job.models, "cloth").version


def test_an_mlflow_server_that_is_not_there_costs_no_training_and_shows_no_password(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:s3cret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    reported = run(job)
    assert model_info(job.models, "cloth").version
    assert any("no more of it in MLflow" in str(facts.get("warning")) for facts in reported)
    assert "s3cret" not in str(reported)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", "format"])
def test_a_checkpoint_that_cannot_be_used_costs_its_steps_and_no_more(job: TrainingJob, damage: bytes | str) -> None:
    with pytest.raises(StoppedError):
        run(job, 3)
    file = job.run_folder / "fit.pt"
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    else:
        state = torch.load(file.uri, weights_only=True)
        torch.save(state | {"format": 0}, file.uri)
    reported: list[dict[str, Any]] = []
    with pytest.raises(StoppedError):
        run(job, 3, reported)
    assert any("training begins anew" in str(facts.get("warning")) for facts in reported)
    assert [facts["step"] for facts in reported if "step" in facts] == [3]


def test_stages_that_the_extractor_has_not_fail_before_the_first_step(
    job: TrainingJob, variant: Callable[..., Config]
) -> None:
    reported: list[dict[str, Any]] = []
    config = variant(features={"context_stages": (1, 7)})
    with pytest.raises(UserError, match=r"no stage 7: lower features.stages or features.context_stages"):
        train(dataclasses.replace(job, config=config), load=load_photographs, report=reported.append)
    assert not any("step" in facts for facts in reported)


def test_a_model_that_must_be_calibrated_again_is_not_up_to_date(
    job: TrainingJob, variant: Callable[..., Config]
) -> None:
    scoring = {"context_weight": 0.5, "covariance": "general"}
    job = dataclasses.replace(job, config=variant(features={"context_stages": (1,)}, scoring=scoring))
    run(job)
    known = "cloth", {job.settings_digest}, "0123"
    assert up_to_date(job.models, *known)
    file = model_info(job.models, "cloth").location / "model.json"
    file.write_json(file.read_json() | {"format": 5})
    assert not up_to_date(job.models, *known)


def test_names_of_runs_follow_from_what_decides_them(job: TrainingJob, variant: Callable[..., Config]) -> None:
    names = {
        dataclasses.replace(job, **changes).run_name
        for changes in (
            {},
            {"categories": ("wool",)},
            {"dataset": job.dataset / "other"},
            {"config": variant(training={"seed": 1})},
        )
    }
    assert len(names) == 4
    assert dataclasses.replace(job, revision="89", publish=False).run_name == job.run_name

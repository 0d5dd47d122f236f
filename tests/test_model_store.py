"""A stored model scores as the one that was saved, holds no pickle, and every damage is told in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import BatchNorm2d

from pipeline.calibration import calibrate
from pipeline.denoiser import Denoiser
from pipeline.errors import UserError
from pipeline.features import FeatureExtractor
from pipeline.model_store import (
    model_categories,
    model_info,
    new_version,
    package_versions,
    replace_threshold,
    scoring_model,
    weights_of,
)
from pipeline.model_versions import networks_in_use, publish
from pipeline.model_weights import load_scorer, load_uncalibrated, save_model
from pipeline.scoring import Scorer
from pipeline.storage import Location

NOW = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
PROVENANCE = {"dataset": "/data/cloth", "training_images": 16, "losses": {"noise": 0.25}}


@pytest.fixture
def models(tmp_path):
    """A folder of models that holds nothing yet."""
    return Location.parse(tmp_path / "models")


@pytest.fixture
def stored(models, scorer, tiny):
    """The folder of the one stored model, of category cloth, as a pathlib path."""
    folder = as_path(save_model(models, "cloth", new_version(tiny, NOW), scorer, None, PROVENANCE))
    publish(models, "cloth", folder.name)
    return folder


def as_path(location):
    return Path(location.uri)


def told(call, *arguments, **options):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_batch_norms(scorer):
    """The scorer as releases before format 7 make it of the same model."""
    config = scorer.config.features
    extractor = FeatureExtractor.of(config, context=bool(scorer.extractor.context_stages), folded=False)
    return Scorer(scorer.denoiser, extractor, scorer.calibration)


# ---- Round trip ----


def test_what_a_loaded_model_multiplies_begins_at_a_cache_line(models, stored):
    calibration = load_scorer(model_info(models, "cloth")).calibration
    factors = asdict(calibration.measure.feature).values()
    assert [tensor.data_ptr() % 64 for tensor in factors] == [0, 0, 0]


def test_a_loaded_model_scores_as_the_saved_one(models, stored, scorer, fresh):
    loaded = load_scorer(model_info(models, "cloth"))
    before, after = scorer.score(fresh), loaded.score(fresh)
    np.testing.assert_array_equal(before.maps, after.maps)
    for name in ("scores", "kl_scores", "feature_scores"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert loaded.calibration.threshold == scorer.calibration.threshold
    assert loaded.calibration.pixel_threshold == scorer.calibration.pixel_threshold
    np.testing.assert_array_equal(loaded.calibration.normal_scores, scorer.calibration.normal_scores)


def test_context_reach_and_turns_come_back(models, calibrated, fresh):
    by_place = {"covariance": "place", "place_dimensions": 7, "context_weight": 0.25, "place_reach": 1, "alpha": 0.0}
    turned = {"prediction": "ignore", "place_turns": True}
    scorer = calibrated(features={"context_stages": (1,)}, scoring=by_place | turned)
    save_model(models, "cloth", "v1", scorer, None, {})
    publish(models, "cloth", "v1")
    info = model_info(models, "cloth")
    assert (info.context_weight, info.reach, info.turned) == (0.25, 1, True)
    np.testing.assert_array_equal(load_scorer(info).score(fresh).maps, scorer.score(fresh).maps)


def test_gaussians_of_kinds_come_back(models, calibrated, fresh):
    by_kind = {"covariance": "kind", "prediction": "ignore", "kinds": 9, "place_dimensions": 7, "place_turns": True}
    scorer = calibrated(scoring=by_kind | {"alpha": 0.2})
    folder = as_path(save_model(models, "cloth", "v1", scorer, None, {}))
    publish(models, "cloth", "v1")
    info = model_info(models, "cloth")
    loaded = load_scorer(info)
    assert (info.turned, loaded.calibration.measure.covariance) == (True, "kind")
    np.testing.assert_array_equal(loaded.score(fresh).maps, scorer.score(fresh).maps)
    assert json.loads((folder / "model.json").read_text())["format"] == 9
    rewrite(folder / "model.json", format=10)
    with pytest.raises(UserError, match="newer"):
        model_info(models, "cloth")


def test_models_by_kinds_of_releases_that_knew_nothing_usual_score_as_they_did(models, calibrated, fresh):
    by_kind = {"covariance": "kind", "prediction": "ignore", "kinds": 9, "place_dimensions": 7, "alpha": 0.2}
    scorer = calibrated(scoring=by_kind)
    folder = as_path(save_model(models, "cloth", "v1", scorer, None, {}))
    publish(models, "cloth", "v1")
    tensors = load_file(folder / "weights.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "feature_gaussian.usual"}, folder / "weights.safetensors")
    rewrite(folder / "model.json", format=8)
    found = load_scorer(model_info(models, "cloth")).score(fresh)
    calibration = scorer.calibration
    earlier = replace(calibration.measure.feature, usual=None)
    scorer.calibration = replace(calibration, measure=calibration.measure._replace(feature=earlier))
    np.testing.assert_array_equal(found.maps, scorer.score(fresh).maps)
    save_model(models, "copy", "v1", load_scorer(model_info(models, "cloth")), None, {})
    publish(models, "copy", "v1")
    np.testing.assert_array_equal(load_scorer(model_info(models, "copy")).score(fresh).maps, found.maps)


def test_models_of_releases_that_knew_no_reach_have_none(models, stored, scorer, fresh):
    text = json.loads((stored / "model.json").read_text())
    del text["reach"], text["config"]["scoring"]["place_reach"]
    (stored / "model.json").write_text(json.dumps(text | {"format": 3}))
    info = model_info(models, "cloth")
    assert info.reach == 0
    np.testing.assert_array_equal(load_scorer(info).score(fresh).maps, with_batch_norms(scorer).score(fresh).maps)


@pytest.mark.parametrize(("format", "norms"), [(6, True), (7, False), (8, False), (9, False)])
def test_models_see_through_the_extractor_that_they_were_calibrated_with(models, stored, format, norms):
    """Whose features are rounded as those of normal photographs were."""
    rewrite(stored / "model.json", format=format)
    seeing = load_scorer(model_info(models, "cloth"))
    assert any(isinstance(module, BatchNorm2d) for module in seeing.extractor.modules()) == norms
    copied = as_path(save_model(models, "copy", "v1", seeing, None, {})) / "model.json"
    assert json.loads(copied.read_text())["format"] == (6 if norms else 9)


@pytest.fixture
def networks(models, fitted, variant, photographs, held_out):
    """networks(stages, context_stages, covariance, weight): a calibrated model of them, stored as "now" and as "then", in use, as
    releases stored it whose networks predicted context, too."""

    def build(stages, context_stages, covariance, weight):
        scoring = {"covariance": covariance, "place_dimensions": 7, "context_weight": weight, "alpha": 0.0}
        config = variant(features={"stages": stages, "context_stages": context_stages}, scoring=scoring)
        details = slice(0, 16) if stages == (0,) else slice(16, 40)
        denoiser, predicting_both = Denoiser(config, len(range(40)[details])), fitted.result().state_dict()
        denoiser.load_state_dict(
            {name: tensor[details] if len(tensor) == 40 else tensor for name, tensor in predicting_both.items()}
        )
        scorer = Scorer(denoiser, FeatureExtractor.of(config.features, context=True))
        calibrate(scorer, held_out, photographs)
        for version in ("now", "then"):
            folder = as_path(save_model(models, "cloth", version, scorer, None, {}))
        publish(models, "cloth", "then")
        rewrite(folder / "model.json", format=5)
        tensors = load_file(folder / "weights.safetensors")
        tensors |= {f"denoiser.{name}": tensor for name, tensor in predicting_both.items()}
        projection = tensors["feature_gaussian.projection"]
        wider = projection.new_zeros(len(projection), 40)
        wider[:, details] = projection
        save_file(tensors | {"feature_gaussian.projection": wider}, folder / "weights.safetensors")
        return scorer

    return build


@pytest.mark.parametrize("covariance", ["place", "general"])
@pytest.mark.parametrize(("stages", "context_stages"), [((0,), (1,)), ((1,), (0,)), ((0,), (0, 1))])
def test_models_whose_networks_predict_context_score_without_it(
    models, networks, fresh, stages, context_stages, covariance
):
    scorer = networks(stages, context_stages, covariance, 0.0)
    expected = with_batch_norms(scorer).score(fresh).maps
    np.testing.assert_array_equal(load_scorer(scoring_model(models, "cloth")).score(fresh).maps, expected)
    copy = replace_threshold(
        model_info(models, "cloth"), 7.25, rate=0.05, false_alarms=(0.01, 0.2), reason={"night": "x"}, now=NOW
    )
    assert model_info(models, "cloth").version == copy
    np.testing.assert_array_equal(load_scorer(model_info(models, "cloth")).score(fresh).maps, expected)


def test_weights_that_predict_other_channels_than_these_stages_have(models, networks):
    networks((0,), (1,), "place", 0.0)
    path = as_path(models) / "cloth/then/model.json"
    config = json.loads(path.read_text())["config"]
    config["features"]["context_stages"] = [1, 2]
    rewrite(path, config=config)
    assert "cannot be used" in told(load_scorer, model_info(models, "cloth"))


def test_models_that_measured_context_otherwise_are_calibrated_again_before_they_score(
    models, networks, photographs, held_out
):
    scorer = networks((0,), (1,), "place", 0.25)
    assert model_info(models, "cloth").outdated
    assert not model_info(models, "cloth", "now").outdated
    with pytest.raises(UserError, match=r"calibrated for what this release measures otherwise: run .*--calibrate-only"):
        scoring_model(models, "cloth")
    assert networks_in_use(models, ("cloth",), scorer.config, None) == ("then",)
    network = load_uncalibrated(model_info(models, "cloth"), scorer.config)
    assert network.calibration is None
    calibrate(network, held_out, photographs)
    np.testing.assert_array_equal(network.score(held_out).maps, scorer.score(held_out).maps)


def test_which_stages_are_context_is_nothing_to_the_network(models, scorer, variant):
    apart = variant(features={"context_stages": (1,)})
    assert apart != scorer.config
    save_model(models, "cloth", "v1", scorer, None, {})
    publish(models, "cloth", "v1")
    assert networks_in_use(models, ("cloth",), apart, None) == ("v1",)
    with pytest.raises(UserError, match="was trained with other features"):
        networks_in_use(models, ("cloth",), variant(features={"stages": (0,)}), None)


def test_what_is_known_of_a_model_without_its_weights(models, stored, scorer, tiny):
    (stored / "weights.safetensors").unlink()
    info = model_info(models, "cloth")
    assert info.location == models / "cloth" / f"20260131T093000Z-{tiny.digest()}"
    assert (info.category, info.version) == ("cloth", info.location.name)
    assert info.config == tiny
    assert info.provenance == PROVENANCE
    assert {"threshold", "pixel_threshold"} <= set(info.calibration)
    for name, value in info.calibration.items():
        assert value == getattr(scorer.calibration, name)


def test_files_are_json_and_safetensors_and_nothing_else(models, stored):
    root = as_path(models)
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    version = stored.name
    assert set(files) == {
        "cloth/latest.json",
        f"cloth/{version}/model.json",
        f"cloth/{version}/weights.safetensors",
    }
    for name, path in files.items():
        if name.endswith(".json"):
            assert isinstance(json.loads(path.read_text("utf-8")), dict)
        else:
            with safe_open(path, "pt") as tensors:
                assert any(key.startswith("denoiser.unet.") for key in tensors.keys())  # noqa: SIM118 (no mapping)


def test_versions_sort_by_time_and_name_the_settings(tiny, variant):
    later = NOW + timedelta(seconds=1)
    assert new_version(tiny, NOW) == f"20260131T093000Z-{tiny.digest()}"
    assert new_version(tiny, NOW) < new_version(variant(scoring={"alpha": 0.1}), later)
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    assert new_version(tiny, elsewhere) == new_version(tiny, NOW)


def test_latest_is_what_was_published_last_and_older_versions_stay(models, stored, scorer):
    save_model(models, "cloth", "second", scorer, None, {"training_images": 17})
    assert model_info(models, "cloth").version == stored.name
    publish(models, "cloth", "second")
    assert model_info(models, "cloth").version == "second"
    older = model_info(models, "cloth", stored.name)
    assert older.version == stored.name
    assert older.provenance == PROVENANCE


def test_categories_are_those_with_a_latest_model(models, stored, scorer):
    save_model(models, "bolt", "first", scorer, None, {})
    publish(models, "bolt", "first")
    (as_path(models) / "unfinished" / "first").mkdir(parents=True)
    assert model_categories(models) == ["bolt", "cloth"]


def test_versions_of_what_decides_the_numbers_are_known():
    versions = package_versions()
    assert {"defectmap", "torch", "timm", "numpy"} <= set(versions)
    assert all(versions.values())


# ---- Another threshold ----


def replaced(models, now=NOW + timedelta(hours=1), threshold=7.25, used=None):
    return replace_threshold(
        used or model_info(models, "cloth"),
        threshold,
        rate=0.05,
        false_alarms=(0.01, 0.2),
        reason={"night": "x"},
        now=now,
    )


def test_another_threshold_is_another_version_that_scores_the_same(models, stored, scorer, fresh):
    rewrite(stored / "model.json", format=3)
    before = {path: path.read_bytes() for path in stored.iterdir()}
    version = replaced(models)
    info = model_info(models, "cloth")
    assert info.version == version > stored.name
    assert info.config.scoring.false_alarm_rate == 0.05
    assert version.endswith(info.config.digest())
    assert json.loads((stored.parent / version / "model.json").read_text())["format"] == 3, (
        "its weights are as they were"
    )
    loaded = load_scorer(info)
    assert loaded.calibration.threshold == 7.25
    assert (loaded.calibration.false_alarms_low, loaded.calibration.false_alarms_high) == (0.01, 0.2)
    assert loaded.calibration.pixel_threshold == scorer.calibration.pixel_threshold
    np.testing.assert_array_equal(loaded.score(fresh[:2]).maps, with_batch_norms(scorer).score(fresh[:2]).maps)
    assert info.provenance == PROVENANCE | {"recalibrated": {"night": "x", "weights_of": stored.name}}
    assert {path: path.read_bytes() for path in stored.iterdir()} == before


def test_versions_know_whose_weights_they_have(models, stored):
    replaced(models)
    replaced(models, now=NOW + timedelta(hours=2), threshold=8.5)
    info = model_info(models, "cloth")
    assert info.calibration["threshold"] == 8.5
    assert weights_of(info) == weights_of(model_info(models, "cloth", stored.name)) == stored.name


def test_a_model_published_meanwhile_stays_in_use(models, stored, scorer):
    used = model_info(models, "cloth")
    save_model(models, "cloth", "second", scorer, None, {})
    publish(models, "cloth", "second")
    assert "came into use meanwhile" in told(replaced, models, used=used)
    assert model_info(models, "cloth").version == "second"


def test_a_version_that_is_there_is_never_written_again(models, stored):
    version = replaced(models)
    assert "already" in told(replaced, models)
    assert model_info(models, "cloth").version == version


# ---- What the user may have done to it ----


def test_no_models_at_all(models, stored):
    assert "nowhere" in told(model_categories, models / "nowhere")
    (stored.parent / "latest.json").unlink()
    assert "no trained category" in told(model_categories, models)


def test_unknown_category_names_the_known_ones(models, stored):
    line = told(model_info, models, "bolt")
    assert "'bolt'" in line
    assert "cloth" in line


def test_unknown_version(models, stored):
    line = told(model_info, models, "cloth", "20200101T000000Z-0123456789ab")
    assert "20200101T000000Z-0123456789ab" in line


def test_renamed_category(models, stored):
    stored.parent.rename(stored.parent.with_name("bolt"))
    line = told(model_info, models, "bolt")
    assert "trained for category 'cloth', not 'bolt'" in line


@pytest.mark.parametrize("file", ["latest.json", "model.json"])
@pytest.mark.parametrize("content", [b"", b'{"version": ', b"[]", b'"text"', b"{}", b"\xff\xfe\x00"])
def test_damaged_json(models, stored, file, content):
    path = stored.parent / file if file == "latest.json" else stored / file
    path.write_bytes(content)
    line = told(model_info, models, "cloth")
    assert "cloth" in line
    assert "train" in line


@pytest.mark.parametrize("changes", [{"format": "one"}, {"config": []}, {"config": {"colour": 1}}, {"config": None}])
def test_json_of_other_makes(models, stored, changes):
    rewrite(stored / "model.json", **changes)
    assert "train" in told(model_info, models, "cloth")


def test_newer_format(models, stored):
    rewrite(stored / "model.json", format=99)
    line = told(model_info, models, "cloth")
    assert "format 99, newer than this release reads: upgrade" in line


def test_missing_weights(models, stored):
    (stored / "weights.safetensors").unlink()
    assert "weights" in told(load_scorer, model_info(models, "cloth"))


@pytest.mark.parametrize("kept", [0, 5, 200, -1000])
def test_damaged_weights(models, stored, kept):
    path = stored / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    line = told(load_scorer, model_info(models, "cloth"))
    assert "weights" in line
    assert "train the category again" in line


def test_weights_of_another_network(models, stored, variant):
    config = variant(network={"channel_mult": (1, 3)})
    rewrite(stored / "model.json", config=config.model_dump(mode="json"))
    line = told(load_scorer, model_info(models, "cloth"))
    assert "weights" in line
    assert "cannot be used" in line


def test_weights_without_calibration(models, stored):
    path = stored / "weights.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if name != "calibration.pixel_mean"}
    save_file(tensors, path)
    assert "pixel_mean" in told(load_scorer, model_info(models, "cloth"))


def test_thresholds_that_are_not_there(models, stored):
    rewrite(stored / "model.json", calibration={"threshold": 3.0})
    assert "pixel_threshold" in told(load_scorer, model_info(models, "cloth"))


def test_a_copied_model_still_loads(models, stored, scorer, fresh, tmp_path):
    moved = Location.parse(shutil.copytree(as_path(models), tmp_path / "elsewhere"))
    loaded = load_scorer(model_info(moved, "cloth"))
    np.testing.assert_array_equal(loaded.score(fresh[:1]).maps, scorer.score(fresh[:1]).maps)


@pytest.mark.slow
def test_the_core_imports_no_ray():
    code = "import sys, pipeline.fit, pipeline.calibration, pipeline.model_weights; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

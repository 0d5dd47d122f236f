"""Benchmarks in a tiny form: what they promise to write, that baselines compute the same, that operations are counted right."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.benchmarks.ceilings import convolution
from pipeline.benchmarks.decode import encode_jpeg
from pipeline.benchmarks.decoders import decoders
from pipeline.benchmarks.flops import Convolution, count_flops, largest_convolution
from pipeline.benchmarks.made import maps_and_masks, photographs, settled
from pipeline.benchmarks.measured import differences, ratios
from pipeline.benchmarks.metrics import exact
from pipeline.benchmarks.night import steady_state
from pipeline.benchmarks.published import PublishedDoubling, PublishedScorer, published_fit
from pipeline.benchmarks.rivals import adeval_auroc_and_pro, loop_pro, sklearn_auroc, trapz_put_back
from pipeline.benchmarks.timing import interleaved, medians
from pipeline.diffusion.doubling import DoublingConv2d
from pipeline.diffusion.group_norm import GroupNorm
from pipeline.fit import Fit
from pipeline.images import encode_png, resize
from pipeline.presets import PRESETS, load_config
from pipeline.totals import ShardOutcome
from tests.job_runs import TINY, job, succeeded

SETTINGS = TINY[1::2]
CPU = torch.device("cpu")
EVERY_REPORT = {
    "benchmark",
    "command",
    "measured",
    "machine",
    "versions",
    "sizes",
    "figures",
    "samples_seconds",
    "notes",
}
UTILISATION = {
    "speedup",
    "images_per_second",
    "tflop_per_second",
    "matrix_product_tflop_per_second",
    "largest_convolution_tflop_per_second",
    "matrix_product_utilisation",
    "largest_convolution_utilisation",
}
PROMISED = {
    "score": UTILISATION | {"baseline_images_per_second", "gflop_per_image", "gflop_per_image_unet"},
    "train": UTILISATION | {"seconds_per_step", "baseline_seconds_per_step", "gflop_per_step"},
    "metrics": {"ours_seconds", "sklearn_and_loop_seconds", "speedup_over_sklearn_and_loop"},
    "decode": {
        *(f"{kind}_ours_images_per_second_per_core" for kind in ("png", "jpeg")),
        *(f"{kind}_cores_for_target" for kind in ("png", "jpeg")),
        "jpeg_pillow_reduced_differs_by_grey_levels",
    },
}
NETWORK = ["--preset", "demo", "--set", *SETTINGS, "--device", "cpu", "--rounds", "1", "--matrix", "32"]
ARGUMENTS = {
    "score": [*NETWORK, "--batches", "1", "--baseline-images", "1"],
    "train": [*NETWORK, "--steps", "1"],
    "metrics": ["--maps", "5", "--side", "64"],
    "decode": ["--images", "1", "--side", "64", "--map-size", "16", "--rounds", "1"],
}


@pytest.fixture
def measured(start):
    """measured(arguments...): exit status, output and errors of the job, run in this process."""
    return partial(start, "benchmark")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_benchmark_writes_what_it_promises(measured, name, tmp_path):
    status, output, errors = measured(name, *ARGUMENTS[name], "--json", tmp_path / "new.json")
    assert status == 0, errors
    report = json.loads((tmp_path / "new.json").read_text())
    assert report.keys() == EVERY_REPORT
    assert report["benchmark"] == name
    assert {"cpu", "cores", "memory_gib", "gpu"} <= report["machine"].keys()
    assert {"python", "torch", "numpy"} <= report["versions"].keys()
    assert f"benchmark.py {name}" in report["command"]
    assert PROMISED[name] <= report["figures"].keys()
    assert all(figure in output for figure in report["figures"])
    assert all(np.isfinite(value) and value >= 0 for value in report["figures"].values())
    assert all(np.isfinite(samples).all() and samples for samples in report["samples_seconds"].values())


def test_comparing_prints_ratios_and_what_is_not_the_same(measured, tmp_path):
    status, _, errors = measured("metrics", *ARGUMENTS["metrics"], "--json", tmp_path / "old.json")
    assert status == 0, errors
    old = json.loads((tmp_path / "old.json").read_text())
    old["figures"] = {"ours_seconds": 1e9, "gone": 1.0}
    old["sizes"]["maps"] = 7
    (tmp_path / "old.json").write_text(json.dumps(old))
    status, output, errors = measured("metrics", *ARGUMENTS["metrics"], "--compare", tmp_path / "old.json")
    assert status == 0, errors
    assert "new / old" in output
    assert "not the same: sizes.maps: 7 -> 5" in output
    status, _, errors = measured("decode", "--compare", tmp_path / "old.json")
    assert status == 2
    assert "a report of metrics, not of decode" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["metrics", "--compare", "{tmp}/none.json"], "not a report"),
        (["score", "--category", "bottle"], "go together"),
        (["score", "--preset", "fast", "--set", "network.imagesize=1"], "network.imagesize"),
        (["pipeline", "--images", "64"], "two shards"),
        pytest.param(
            ["train", "--device", "cuda"],
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line(measured, arguments, expected, tmp_path):
    status, _, errors = measured(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 2
    (line,) = errors.strip().splitlines()
    assert expected in line


@pytest.mark.slow
def test_the_whole_job_is_measured_on_a_local_folder(tmp_path):
    arguments = ["--preset", "demo", *TINY, "--images", 12, "--side", 96, "--shard-images", 4, "--rounds", 1]
    succeeded(job("benchmark", "pipeline", *arguments, "--storage", tmp_path / "s", "--json", tmp_path / "p.json"))
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["sizes"]["storage"] == "local disk"
    stages = ("read", "decode", "score_and_commit")
    costs = {f"{stage}_{kind}_per_image" for stage in stages for kind in ("ms", "cpu_ms")}
    fractions = {"fraction_of_model_only", "steady_fraction_of_model_only", "actors_waiting_fraction"}
    assert costs | fractions | {"images_per_second", "first_commit_seconds"} <= report["figures"].keys()
    assert all(np.isfinite(value) for value in report["figures"].values())


# ---- Baselines compute the same ----


@pytest.mark.parametrize(("precision", "apart"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_the_published_way_gives_the_same_maps(calibrated, precision, apart, fresh):
    """To the rounding of what we compute in: in bfloat16 a map moves by a few hundredths of its own spread."""
    scorer = calibrated(scoring={"pixel": "gaussian", "alpha": 0.5}, training={"precision": precision})
    published = PublishedScorer(scorer)
    assert published.config.training.precision == "float32"
    assert published.config.scoring.batch_size == 1
    found, expected = published.score(fresh), scorer.score(fresh)
    maps, wanted = found.maps.astype(float), expected.maps.astype(float)
    assert np.abs(maps - wanted).mean() < apart * wanted.std()
    assert np.corrcoef(maps.ravel(), wanted.ravel())[0, 1] > 1 - apart**2
    assert np.abs(found.scores - expected.scores).max() < apart * wanted.max()
    assert scorer.config.scoring.batch_size == 4  # the scorer itself is as it was


def test_the_published_way_gives_the_same_kl(calibrated, fresh):
    scorer = calibrated(scoring={"alpha": 0.5, "covariance": "none"})
    found, expected = PublishedScorer(scorer).evidence(fresh[:1]), scorer.evidence(fresh[:1])
    for part in ("pixel", "denoising", "features", "feature", "residuals"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-3, atol=1e-3)


def test_the_baseline_takes_the_same_training_steps(tiny, photographs, extractor):
    ours = Fit(tiny, photographs, extractor)
    baseline = published_fit(tiny, photographs, extractor, labels=None, device=CPU)
    kinds = {type(module) for module in baseline.denoiser.unet.modules()}
    assert PublishedDoubling in kinds
    assert not {GroupNorm, DoublingConv2d} & kinds
    for _ in range(3):
        for one, other in zip(baseline.advance(), ours.advance(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_rivals_measure_the_same():
    maps, masks = maps_and_masks(8, 64, defective=0.75, seed=0)
    assert [mask.any() for mask in masks] == [True] * 6 + [False] * 2
    auroc, pro = exact(maps, masks)
    assert sklearn_auroc(maps.astype(np.float32), masks) == pytest.approx(auroc, abs=1e-9)
    assert loop_pro(maps.astype(np.float32), masks) == pytest.approx(pro, abs=0.01)
    assert loop_pro(maps.astype(np.float32), masks, thresholds=5000) == pytest.approx(pro, abs=5e-4)


@pytest.mark.skipif(find_spec("adeval") is None, reason="adeval is not installed")
def test_adeval_measures_the_same_and_numpy_is_left_as_it_was():
    had = hasattr(np, "trapz")
    maps, masks = maps_and_masks(8, 64, defective=0.75, seed=0)
    found = adeval_auroc_and_pro(maps.astype(np.float32), masks.astype(np.uint8))
    assert found == pytest.approx(exact(maps, masks), abs=5e-3)
    assert hasattr(np, "trapz") is had
    with trapz_put_back():
        assert np.trapz([1.0, 1.0]) == 1.0


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_every_decoder_that_is_installed_gives_the_photograph(format):
    (image,) = photographs(1, 128, camera_noise=0.0)
    data = encode_png(image) if format == "png" else encode_jpeg(image)
    for name, decoder in decoders(format).items():
        found = decoder(data, 32)
        assert found.shape == (32, 32, 3), name
        assert found.dtype == np.uint8, name
        assert np.abs(found - resize(image, 32).astype(float)).mean() < 8, name


# ---- The small functions ----


def test_operations_of_one_convolution_are_as_counted_by_hand():
    layer = nn.Conv2d(5, 7, 3, padding=1)
    x = torch.randn(2, 5, 8, 6)
    by_hand = 2 * (2 * 8 * 6) * (5 * 3 * 3) * 7  # a multiplication and an addition for each output value and weight
    assert count_flops(lambda: layer(x))["Global"] == by_hand
    shapes = Convolution((2, 5, 8, 6), (7, 5, 3, 3), 1)
    assert shapes.flops == by_hand
    alone = convolution(shapes, CPU)
    assert alone.flops == count_flops(alone.run)["Global"] == by_hand
    trained = convolution(shapes, CPU, backward=True)
    assert trained.flops == count_flops(trained.run)["Global"] == 3 * by_hand


def test_operations_of_a_whole_photograph(calibrated, fresh):
    scorer = calibrated(scoring={"alpha": 0.5})
    found = count_flops(lambda: scorer.score(fresh[:4]))
    assert found["UNet"] + found["FeatureExtractor"] <= found["Global"]
    published = count_flops(lambda: PublishedScorer(scorer).score(fresh[:4]))
    # The same network twice; ours asks the feature head apart from the rest, once about the mean of both noise scales, and makes
    # kernels of 16 weights from 9 for images that are doubled.
    modules = dict(scorer.denoiser.unet.named_modules())
    doubling = {name: module for name, module in modules.items() if isinstance(module, DoublingConv2d)}
    kernels = sum(2 * 16 * 9 * module.in_channels * module.out_channels for module in doubling.values())
    doubled = sum(found[f"UNet.{name}"] for name in doubling) - kernels
    assert doubled > 0
    # Ours embeds a timestep once for all four images.
    linear = [f"UNet.{name}" for name, module in modules.items() if isinstance(module, nn.Linear)]
    embedding, embeddings = (sum(counted[name] for name in linear) for counted in (found, published))
    assert embeddings == 2 * 4 * embedding > 0
    ours = found["UNet"] - embedding - kernels + doubled * (36 / 16 - 1)
    assert published["UNet"] - published["UNet.feature_head"] - embeddings == 2 * ours
    assert published["FeatureExtractor"] == found["FeatureExtractor"]


def test_the_largest_convolution_is_found():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1, stride=2))
    found = largest_convolution(network, lambda: network(torch.zeros(1, 3, 6, 6)))
    assert found == Convolution((1, 8, 6, 6), (8, 8, 3, 3), 1)


def test_pieces_of_work_take_turns():
    done: list[str] = []
    works = {name: (lambda name=name: done.append(name)) for name in "ab"}
    samples = interleaved(works, rounds=3, device=CPU, shortest_s=0)
    assert "".join(done[-6:]) == "ababab"
    assert [len(values) for values in samples.values()] == [3, 3]
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_ratios_are_of_figures_that_both_have():
    assert ratios({"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 2.0, "b": 0.0, "d": 1.0}) == {"a": 1.5}
    old = {"machine": {"cpu": "x"}, "versions": {}, "sizes": {"batch": 1}}
    new = {"machine": {"cpu": "x"}, "versions": {"torch": "2"}, "sizes": {"batch": 2}}
    assert differences(new, old) == ["versions.torch: None -> 2", "sizes.batch: 1 -> 2"]


@pytest.mark.parametrize(
    ("preset", "settings"),
    [*((preset, ()) for preset in PRESETS), ("fast", ("scoring.covariance=kind", "scoring.prediction=ignore"))],
)
def test_every_preset_can_be_measured_without_calibration_choosing(preset, settings):
    scoring = settled(load_config(preset, settings)).scoring
    assert "select" not in (scoring.covariance, scoring.prediction)
    chosen = (scoring.alpha, scoring.top_pixels, scoring.context_weight, scoring.place_reach, scoring.place_turns)
    assert None not in chosen


def test_photographs_differ_and_repeat():
    first, second = photographs(2, 64)
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(first, second)
    assert np.array_equal(photographs(2, 64)[1], second)


def test_a_steady_night_begins_with_the_first_commit():
    commits = [
        ShardOutcome(0, "s", 4, scored=scored, seconds=busy, committed=at)
        for at, scored, busy in [(100.0, 4, 90.0), (50.0, 0, 0.0), (110.0, 4, 8.0), (120.0, 4, 7.0)]
    ]
    rate, working = steady_state(commits, actors=1)
    assert rate == pytest.approx(8 / 20)
    assert working == pytest.approx(15 / 20)


def test_a_steady_night_of_two_actors_begins_when_both_have_committed():
    # In step: each takes 10 s for a shard, half a second apart.
    commits = [
        ShardOutcome(0, "s", 4, scored=4, seconds=10.0, committed=at)
        for at in (110.0, 110.5, 120.0, 120.5, 130.0, 130.5)
    ]
    rate, working = steady_state(commits, actors=2)
    assert rate == pytest.approx(16 / 20)
    assert working == pytest.approx(1)

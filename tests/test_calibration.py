"""Calibration centres normal images, thresholds come from held-out ones, and choices are made on implanted defects."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.calibration import ALPHAS, implanted, place_statistics, prediction_bound, select
from pipeline.scoring import RawMaps


def all_raw_maps(scorer, images):
    batch = scorer.config.scoring.batch_size
    raws = [scorer.raw_maps(images[start : start + batch]) for start in range(0, len(images), batch)]
    return RawMaps(*(torch.cat(parts) for parts in zip(*raws, strict=True)))


@pytest.mark.parametrize("covariance", ["none", "general"])
def test_calibrated_normal_maps_have_mean_0_and_deviation_1(calibrated, held_out, covariance):
    scorer = calibrated(scoring={"timesteps": (50,), "map_sigma": 0.0, "covariance": covariance})
    maps = scorer.maps(all_raw_maps(scorer, held_out), scorer.calibration)
    for branch in (maps.kl, maps.feature):
        assert branch.mean().item() == pytest.approx(0, abs=1e-3)
        assert branch.std().item() == pytest.approx(1, abs=0.15)  # bilinear enlarging smooths


def test_alpha_weighs_the_kl_branch(calibrated, fresh):
    ends = {alpha: calibrated(scoring={"alpha": alpha}) for alpha in (0.0, 0.25, 1.0)}
    maps = {alpha: scorer.maps(scorer.raw_maps(fresh[:4]), scorer.calibration) for alpha, scorer in ends.items()}
    torch.testing.assert_close(maps[1.0].combined, maps[1.0].kl)
    torch.testing.assert_close(maps[0.0].combined, maps[0.0].feature)
    torch.testing.assert_close(maps[0.25].combined, 0.25 * maps[1.0].kl + 0.75 * maps[0.0].feature)
    assert not torch.allclose(maps[0.0].combined, maps[1.0].combined)


def test_alpha_0_and_1_score_like_their_branch(calibrated, fresh):
    kl, feature = calibrated(scoring={"alpha": 1.0}).score(fresh), calibrated(scoring={"alpha": 0.0}).score(fresh)
    np.testing.assert_allclose(kl.scores, kl.kl_scores, rtol=1e-3)
    np.testing.assert_allclose(feature.scores, feature.feature_scores, rtol=1e-3)


def test_a_model_may_choose_the_weight_that_finds_implanted_defects(calibrated, fresh, held_out):
    scorer = calibrated(scoring={"alpha": None})
    chosen = scorer.calibration.alpha
    assert chosen in ALPHAS
    maps = scorer.maps(scorer.raw_maps(fresh[:4]), scorer.calibration)
    torch.testing.assert_close(maps.combined, chosen * maps.kl + (1 - chosen) * maps.feature)
    # A branch that sees nothing is never trusted alone.
    blind_kl = dataclasses.replace(scorer.calibration, kl_std=scorer.calibration.kl_std * 1e30)
    blind_feature = dataclasses.replace(scorer.calibration, feature_std=scorer.calibration.feature_std * 1e30)
    assert select(scorer, [blind_kl], ALPHAS, held_out).alpha < 1
    assert select(scorer, [blind_feature], ALPHAS, held_out).alpha > 0


def test_image_normalisation_scales_kl_by_its_own_image_and_leaves_features(calibrated, fresh):
    settings = {"normalisation": "image", "timesteps": (50,), "covariance": "none", "map_sigma": 0.0}
    scorer = calibrated(scoring=settings)
    raw = scorer.raw_maps(fresh[:4])
    maps = scorer.maps(raw, scorer.calibration)
    for image in maps.kl:
        assert image.mean().item() == pytest.approx(0, abs=1e-4)
        assert image.std().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(maps.feature, scorer.upsample(raw.squares)[:, 0])
    assert np.isfinite(scorer.calibration.threshold)


def test_thresholds_come_from_the_held_out_photographs(scorer, held_out):
    found = scorer.score(held_out)
    calibration = scorer.calibration
    np.testing.assert_allclose(calibration.normal_scores, np.sort(found.scores), rtol=1e-6)
    assert calibration.threshold == pytest.approx(prediction_bound(found.scores, 0.01))
    peaks = found.maps.reshape(len(held_out), -1).max(axis=1).astype(np.float64)
    assert calibration.pixel_threshold == pytest.approx(prediction_bound(peaks, 0.01))


def test_a_stricter_false_alarm_rate_raises_both_thresholds(calibrated):
    loose, strict = (calibrated(scoring={"false_alarm_rate": rate}).calibration for rate in (0.1, 0.001))
    assert strict.threshold > loose.threshold
    assert strict.pixel_threshold > loose.pixel_threshold


def test_the_better_way_of_measuring_residuals_is_chosen(calibrated, held_out):
    scorer = calibrated(scoring={"alpha": 0.0})
    good = scorer.calibration
    assert good.gaussian is not None
    blind = dataclasses.replace(
        good, gaussian=dataclasses.replace(good.gaussian, projection=torch.zeros_like(good.gaussian.projection))
    )
    assert select(scorer, [blind, good], (0.0,), held_out).gaussian is good.gaussian
    assert select(scorer, [good, blind], (0.0,), held_out).gaussian is good.gaussian


@pytest.mark.parametrize("covariance", ["general", "place", "select"])
def test_every_way_of_measuring_residuals_scores(calibrated, fresh, covariance):
    scorer = calibrated(scoring={"covariance": covariance, "alpha": None})
    found = scorer.score(fresh)
    assert np.isfinite(found.maps).all()
    assert (
        len(scorer.calibration.gaussian.whitening) in {"general": (1,), "place": (64,), "select": (1, 64)}[covariance]
    )


def test_implanted_defects_are_the_same_every_time_and_all_marked(held_out):
    images, masks = implanted(held_out, seed=1)
    again, _ = implanted(held_out, seed=1)
    np.testing.assert_array_equal(images, again)
    assert len(images) == 2 * len(held_out)
    assert masks.any(axis=(1, 2)).all()


def test_place_statistics_are_moments_of_the_neighbourhood():
    values = torch.randn(500, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[..., 3:] = values[..., 3:] * 5 + 20
    sums = torch.stack([values.mean(0), values.square().mean(0)])
    mean, std = place_statistics(sums, 0)
    assert (mean == mean[:, :1, :1]).all()
    torch.testing.assert_close(std[0, 0, 0].double(), values[:, 0].std(correction=0), rtol=1e-4, atol=0)
    mean, std = place_statistics(sums, 0.4)
    assert abs(mean[0, 2, 0]) < 1 < 18 < mean[0, 2, 5]
    assert std[0, 2, 5] / std[0, 2, 0] == pytest.approx(5, rel=0.2)


@pytest.mark.parametrize(("count", "rate"), [(4, 0.01), (10, 0.05), (60, 0.01)])
def test_prediction_bound_keeps_its_rate(count, rate):
    rng = np.random.default_rng(count)
    bounds = [prediction_bound(rng.normal(5, 3, count), rate) for _ in range(1500)]
    # The chance that a further value exceeds each bound, averaged over many calibrations.
    exceeded = stats.norm.sf(bounds, 5, 3)
    assert exceeded.mean() == pytest.approx(rate, abs=4 * exceeded.std() / np.sqrt(len(bounds)))
    assert exceeded.mean() == pytest.approx(rate, rel=0.2)

"""Calibration centres normal images, thresholds come from held-out ones, and choices are made on implanted defects."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import measures
from pipeline.calibration import calibrate
from pipeline.choice import ALPHAS, TOP_PIXELS
from pipeline.cross_fitting import cross_fitted
from pipeline.features import FeatureExtractor
from pipeline.measures import CONTEXT_WEIGHTS, fit_measures
from pipeline.scoring import BranchMaps, Scorer
from pipeline.thresholds import false_alarm_bound, normal_bound
from tests.conftest import make_photographs


def all_branch_maps(scorer, images):
    batch, measure = scorer.config.scoring.batch_size, scorer.calibration.measure
    starts = range(0, len(images), batch)
    parts = [scorer.branch_maps(scorer.evidence(images[start : start + batch]), measure) for start in starts]
    return BranchMaps(*(torch.cat(maps) for maps in zip(*parts, strict=True)))


@pytest.mark.parametrize("covariance", ["none", "general"])
def test_calibrated_normal_maps_have_mean_0_and_deviation_1(calibrated, held_out, covariance):
    scorer = calibrated(scoring={"timesteps": (50,), "map_sigma": 0.0, "covariance": covariance})
    maps = scorer.maps(all_branch_maps(scorer, held_out), scorer.calibration)
    for branch in (maps.pixel, maps.feature):
        assert branch.mean().item() == pytest.approx(0, abs=0.02)  # so does enlarging
        assert branch.std().item() == pytest.approx(1, abs=0.25)  # bilinear enlarging smooths


def maps_of(scorer, images):
    return scorer.maps(scorer.branch_maps(scorer.evidence(images), scorer.calibration.measure), scorer.calibration)


def test_alpha_weighs_the_pixel_branch(calibrated, fresh):
    maps = {alpha: maps_of(calibrated(scoring={"alpha": alpha}), fresh[:4]) for alpha in (0.0, 0.25, 1.0)}
    torch.testing.assert_close(maps[1.0].combined, maps[1.0].pixel)
    torch.testing.assert_close(maps[0.0].combined, maps[0.0].feature)
    torch.testing.assert_close(maps[0.25].combined, 0.25 * maps[1.0].pixel + 0.75 * maps[0.0].feature)
    assert not torch.allclose(maps[0.0].combined, maps[1.0].combined)


def test_alpha_0_and_1_score_like_their_branch(calibrated, fresh):
    pixel, feature = calibrated(scoring={"alpha": 1.0}).score(fresh), calibrated(scoring={"alpha": 0.0}).score(fresh)
    np.testing.assert_allclose(pixel.scores, pixel.kl_scores, rtol=1e-3)
    np.testing.assert_allclose(feature.scores, feature.feature_scores, rtol=1e-3)


class HalfBlind(Scorer):
    """A scorer one of whose branches sees nothing but noise."""

    blind: tuple[str, ...] = ()

    def evidence(self, images_nhwc):
        evidence = super().evidence(images_nhwc)
        # The same for a photograph in any company.
        generators = [torch.Generator().manual_seed(int(image.sum())) for image in images_nhwc]
        for name in self.blind:
            shape = getattr(evidence, name).shape[1:]
            noise = torch.stack([torch.rand(shape, generator=generator) for generator in generators])
            vars(evidence)[name] = noise  # in the place of what it was made with or would work out
        return evidence


@pytest.mark.parametrize(
    ("blind", "allowed"), [(("pixel", "denoising"), ALPHAS[:6]), (("feature", "residuals", "features"), ALPHAS[5:])]
)
@pytest.mark.parametrize("pixel", ["kl", "gaussian"])
def test_a_model_trusts_the_branch_that_finds_implanted_defects(
    fitted, variant, held_out, photographs, blind, allowed, pixel
):
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"alpha": None, "pixel": pixel, "timesteps": (5, 50)})
    scorer = HalfBlind(denoiser, fitted.extractor)
    scorer.blind = blind
    choices = calibrate(scorer, held_out, photographs).choices
    assert sorted(choice.alpha for choice in choices) == sorted(ALPHAS)
    assert scorer.calibration.alpha == choices[0].alpha
    assert choices[0].alpha in allowed, "half and half may be as good: noise hides little"
    merits = {choice.alpha: choice.merit for choice in choices}
    alone = [merits[0.0], merits[1.0]]
    assert alone[allowed[0] > 0] > alone[allowed[0] == 0] + 0.1, "the blind branch alone finds nothing"
    assert choices[0].merit == max(choice.merit for choice in choices)


def test_the_best_way_of_scoring_is_kept(calibrated, fitted, variant, held_out, photographs):
    settings = {"alpha": 0.0, "covariance": "select", "prediction": "select", "pixel_window": 1}
    denoiser = fitted.result()
    denoiser.config = variant(scoring=settings)
    scorer = Scorer(denoiser, fitted.extractor)
    variants = [variant(scoring=settings | {"map_sigma": sigma}).scoring for sigma in (0.0, 1.0, 30.0)]
    choices = calibrate(scorer, held_out, photographs, variants).choices
    assert len(choices) == 3 * 4
    assert {(choice.covariance, choice.subtract_prediction) for choice in choices} == {
        (covariance, subtract) for covariance in ("general", "place") for subtract in (True, False)
    }
    best = choices[0]
    assert best.scoring.map_sigma < 30, "a smear over the whole map finds nothing"
    assert scorer.config.scoring == best.scoring
    assert scorer.calibration.measure.subtract_prediction == best.subtract_prediction
    assert scorer.calibration.measure.feature.by_place == (best.covariance == "place")
    # The same as if only the best had been asked for.
    chosen = {"covariance": best.covariance, "prediction": "subtract" if best.subtract_prediction else "ignore"}
    alone = calibrated(scoring=settings | chosen | {"map_sigma": best.scoring.map_sigma})
    np.testing.assert_allclose(alone.score(held_out).scores, scorer.score(held_out).scores, rtol=1e-3)
    assert alone.calibration.threshold == pytest.approx(scorer.calibration.threshold, rel=1e-3)


def test_image_normalisation_scales_kl_by_its_own_image_and_leaves_features(calibrated, fresh):
    settings = {"normalisation": "image", "timesteps": (50,), "covariance": "none", "map_sigma": 0.0}
    scorer = calibrated(scoring=settings)
    maps = maps_of(scorer, fresh[:4])
    for image in maps.pixel:
        assert image.mean().item() == pytest.approx(0, abs=1e-4)
        assert image.std().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(maps.feature, scorer.upsample(scorer.evidence(fresh[:4]).feature)[:, 0])
    assert np.isfinite(scorer.calibration.threshold)


@pytest.mark.parametrize("rate", [0.01, 0.2])
@pytest.mark.parametrize("settings", [{"covariance": "general"}, {"covariance": "place"}, {"covariance": "none"}])
def test_thresholds_come_from_held_out_photographs_and_those_left_out_in_turn(
    calibrated, held_out, photographs, rate, settings
):
    scorer = calibrated(scoring=settings | {"false_alarm_rate": rate})
    calibration = scorer.calibration
    (taught,) = fit_measures(scorer, photographs)
    normal = [scorer.score(held_out), *cross_fitted(scorer, taught, photographs)]
    scores = np.concatenate([part.scores for part in normal])
    assert len(scores) == len(held_out) + (0 if settings["covariance"] == "none" else len(photographs))
    np.testing.assert_allclose(calibration.normal_scores, np.sort(scores), rtol=1e-6)
    bound = false_alarm_bound(scores, rate)
    assert calibration.threshold == pytest.approx(bound.value)
    assert (calibration.false_alarms_low, calibration.false_alarms_high) == pytest.approx((bound.low, bound.high))
    peaks = np.concatenate([part.maps.max(axis=(1, 2)) for part in normal]).astype(np.float64)
    assert calibration.pixel_threshold == pytest.approx(false_alarm_bound(peaks, rate).value)


def test_a_training_photograph_that_is_not_normal_is_told_from_the_others(fitted, variant, photographs, held_out):
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"covariance": "place", "place_dimensions": 7, "alpha": 0.2})
    shown = photographs.copy()
    shown[5] = np.rot90(shown[5])
    found = calibrate(Scorer(denoiser, fitted.extractor), held_out, shown)
    assert (found.held_out_scores.shape, found.training_scores.shape) == ((7,), (16,))
    assert found.training_scores.argmax() == 5
    assert found.training_scores[5] > 2 * np.delete(found.training_scores, 5).max()


def test_photographs_that_the_network_knows_by_heart_do_not_count(fitted, variant, photographs, held_out, monkeypatch):
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"covariance": "place", "place_dimensions": 7})
    scorer = Scorer(denoiser, fitted.extractor)
    honest = scorer.score_evidence

    def forgetful(batches, calibration):
        found = honest(batches, calibration)
        return replace(found, scores=found.scores - (100 if calibration is not scorer.calibration else 0))

    monkeypatch.setattr(scorer, "score_evidence", forgetful)
    assert calibrate(scorer, held_out, photographs).known_by_heart
    np.testing.assert_allclose(scorer.calibration.normal_scores, np.sort(scorer.score(held_out).scores), rtol=1e-6)


def test_too_few_held_out_photographs_do_not_decide_alone(fitted, variant, photographs):
    """They are alike by chance: what the others are like when they are left out, the threshold knows."""
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"covariance": "place", "place_dimensions": 7, "false_alarm_rate": 0.05})
    scorer = Scorer(denoiser, fitted.extractor)
    calibrate(scorer, photographs[:1].repeat(4, 0), photographs)
    strange = make_photographs(40, seed=9)
    assert (scorer.score(strange).scores > scorer.calibration.threshold).mean() < 0.3
    alone = normal_bound(scorer.score(photographs[:1].repeat(4, 0)).scores, 0.05).value
    assert (scorer.score(strange).scores > alone).mean() > 0.9


def test_a_stricter_false_alarm_rate_raises_both_thresholds(calibrated):
    loose, strict = (calibrated(scoring={"false_alarm_rate": rate}).calibration for rate in (0.1, 0.001))
    assert strict.threshold > loose.threshold
    assert strict.pixel_threshold > loose.pixel_threshold


@pytest.mark.parametrize("any_direction", [False, True])
def test_turned_photographs_teach_where_products_lie_in_any_direction(
    fitted, variant, photographs, held_out, any_direction, monkeypatch
):
    monkeypatch.setattr(measures, "PLACES_TELL", 1.0)
    rng = np.random.default_rng(0)
    photographs, held_out = (
        np.stack([np.rot90(image, rng.integers(4) if any_direction else 0) for image in images])
        for images in (photographs, held_out)
    )
    denoiser = fitted.result()
    settings = {"covariance": "place", "prediction": "ignore", "place_dimensions": 7, "alpha": 0.0}
    denoiser.config = variant(scoring=settings | {"place_turns": None})
    scorer = Scorer(denoiser, fitted.extractor)
    choices = calibrate(scorer, held_out, photographs).choices
    assert {choice.turned for choice in choices} == {False, True}
    assert scorer.calibration.measure.turned == choices[0].turned == any_direction


@pytest.mark.parametrize(("covariance", "reach"), [("general", 0), ("place", 0), ("place", 1)])
def test_details_and_context_are_measured_in_their_own_stages(calibrated, fresh, covariance, reach):
    settings = {"covariance": covariance, "place_dimensions": 7, "place_reach": reach, "alpha": 0.0, "map_sigma": 0.0}
    split = {"context_stages": (1,)}
    mixed = calibrated(features=split, scoring=settings | {"context_weight": 0.25})
    measure, evidence = mixed.calibration.measure, mixed.evidence(fresh[:2])
    detail, context = measure.feature.distance(evidence.residuals, reach), measure.context.distance(evidence.context)
    assert (detail.shape, context.shape) == ((2, 8, 8), (2, 4, 4))
    enlarged = torch.nn.functional.interpolate(context[:, None], size=(8, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(mixed.branch_maps(evidence, measure).feature[:, 0], 0.75 * detail + 0.25 * enlarged)
    # Stage 1 has 24 channels, half as many cells each way.
    assert (evidence.residuals.shape[1], evidence.context.shape) == (16 + 24, (2, 24, 4, 4))
    without = calibrated(features=split, scoring=settings)
    assert without.calibration.measure.context is None
    torch.testing.assert_close(without.calibration.measure.feature.whitening, measure.feature.whitening)


def test_a_model_chooses_its_context_and_its_image_score(calibrated, fitted, variant, held_out, photographs):
    split, settings = {"context_stages": (1,)}, {"alpha": 0.0, "covariance": "general"}
    denoiser = fitted.result()
    denoiser.config = variant(features=split, scoring=settings | {"context_weight": None, "top_pixels": None})
    scorer = Scorer(denoiser, FeatureExtractor.of(denoiser.config.features, context=True))
    choices = calibrate(scorer, held_out, photographs).choices
    assert {(c.context_weight, c.top_pixels) for c in choices} == set(itertools.product(CONTEXT_WEIGHTS, TOP_PIXELS))
    best = choices[0]
    assert scorer.calibration.measure.context_weight == best.context_weight
    assert scorer.calibration.top_pixels == best.top_pixels
    chosen = {"context_weight": best.context_weight, "top_pixels": best.top_pixels}
    alone = calibrated(features=split, scoring=settings | chosen)
    np.testing.assert_allclose(alone.score(held_out).scores, scorer.score(held_out).scores, rtol=1e-3)


def test_photographs_that_are_all_the_same_can_be_calibrated(fitted, variant, photographs):
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"pixel": "gaussian", "covariance": "place", "alpha": None})
    scorer = Scorer(denoiser, fitted.extractor)
    calibrate(scorer, photographs[:1].repeat(5, 0), photographs[:1].repeat(9, 0))
    assert np.isfinite(scorer.score(photographs[:1]).maps).all()
    assert np.isfinite(scorer.calibration.threshold)

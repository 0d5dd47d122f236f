"""Photographs that are left out have taught nothing: sums, kept cells and whole measures without them."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import measures
from pipeline.calibration import calibrate
from pipeline.cross_fitting import FOLDS, cross_fitted
from pipeline.features import FeatureExtractor
from pipeline.gaussian import Moments, fit_general, place_gaussians, place_projection
from pipeline.kinds import KindGaussians, KindMoments, kind_gaussians
from pipeline.measures import evidence_of, fit_measures, gaussians_of
from pipeline.nearest import NearestNormal, nearest_normal
from pipeline.scoring import Scorer

CHANNELS = 6


@pytest.fixture(scope="module")
def cells() -> torch.Tensor:
    """(20, CHANNELS, 4, 4): all of one law, some channels far from 0."""
    drawn = torch.randn(20, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1))
    return drawn + 5 * torch.arange(CHANNELS)[:, None, None]


def test_sums_of_places_without_some_photographs_are_those_of_the_others(cells: torch.Tensor) -> None:
    moments = Moments(place_projection(fit_general([cells]), CHANNELS, 0), by_place=True)
    others = copy(moments)
    moments.add(cells)
    others.add(cells[5:])
    total = moments.total
    rest, expected = place_gaussians(moments.without([cells[:2], cells[2:5]])), place_gaussians(others)
    torch.testing.assert_close(rest.mean, expected.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rest.distance(cells), expected.distance(cells), rtol=0.01, atol=0.01)
    assert moments.count == 20 and moments.total is total, "nothing is lost"
    assert not torch.allclose(place_gaussians(moments).distance(cells), expected.distance(cells), rtol=0.01, atol=0.01)


def test_sums_of_kinds_without_some_photographs_are_those_of_the_others(cells: torch.Tensor) -> None:
    samples = cells.permute(0, 2, 3, 1).flatten(0, 2)
    projection = place_projection(fit_general([cells]), CHANNELS, 0)
    moments, others = (KindMoments(samples, 4, projection, 0) for _ in range(2))
    moments.add(cells)
    before = moments.outer.clone()
    others.add(cells[5:])
    rest, expected = kind_gaussians(moments.without([cells[:2], cells[2:5]])), kind_gaussians(others)
    torch.testing.assert_close(rest.distance(cells), expected.distance(cells), rtol=0.01, atol=0.01)
    assert torch.equal(moments.outer, before)


def test_a_kind_that_only_left_out_photographs_show_is_gone(cells: torch.Tensor) -> None:
    strange = cells.clone()
    strange[0] += 40
    samples = strange.permute(0, 2, 3, 1).flatten(0, 2)
    moments = KindMoments(samples, 6, place_projection(fit_general([strange]), CHANNELS, 0), 0)
    moments.add(strange)
    whole, rest = kind_gaussians(moments), kind_gaussians(moments.without([strange[:1]]))
    assert len(rest.centres) < len(whole.centres)
    assert whole.distance(strange[:1]).max() < 5
    assert rest.distance(strange[:1]).min() > 20


def test_kept_cells_of_some_photographs_are_left_out(cells: torch.Tensor) -> None:
    strange = cells.clone()
    strange[3] += 40
    nearest = nearest_normal(strange.permute(0, 2, 3, 1).flatten(1, 2), [CHANNELS], 100, seed=0)
    assert nearest.distance(strange[3:4]).max() < 2
    rest = nearest.without(np.array([3, 7]))
    assert rest.distance(strange[3:4]).min() > 10
    others = np.setdiff1d(np.arange(20), [3, 7])
    assert rest.owners is not None and set(rest.owners.tolist()) == set(others)
    assert len(nearest.without(np.arange(20)).cells) == len(nearest.cells), "something has to be asked"


@pytest.mark.parametrize(
    "settings",
    [
        {"covariance": "general", "prediction": "subtract"},
        {"covariance": "general", "prediction": "ignore", "pixel": "kl"},
        {"covariance": "place", "prediction": "subtract"},
        {"covariance": "place", "prediction": "ignore", "place_turns": True, "place_reach": 1},
        {"covariance": "place", "prediction": "ignore", "place_turns": None},
        {"covariance": "place", "prediction": "ignore", "context_weight": 0.5},
        {"covariance": "kind", "prediction": "ignore", "kinds": 5},
        {"covariance": "kind", "prediction": "ignore", "kinds": 5, "place_turns": True},
    ],
)
def test_each_photograph_is_measured_by_what_the_others_taught(
    fitted, variant, photographs, held_out, settings, monkeypatch
):
    monkeypatch.setattr(measures, "PLACES_TELL", 1.0)
    scoring = {"pixel": "gaussian", "place_dimensions": 7, "alpha": 0.3} | settings
    denoiser = fitted.result()
    denoiser.config = variant(
        scoring=scoring, features={"context_stages": (2,)} if "context_weight" in settings else {}
    )
    scorer = Scorer(denoiser, FeatureExtractor.of(denoiser.config.features, context=True))
    calibrate(scorer, held_out, photographs)
    taught, *turned = fit_measures(scorer, photographs)
    assert len(turned) == ("place_turns" in settings and settings["place_turns"] is None)
    whole = replace(scorer.calibration, measure=taught.measure)
    scorer.calibration = whole
    parts = list(cross_fitted(scorer, taught, photographs))
    assert len(parts) == FOLDS
    assert scorer.calibration is whole
    scores = np.concatenate([part.scores for part in parts])
    assert scores.shape == (len(photographs),)
    own = scorer.score(photographs).scores
    assert (scores > own).mean() > 0.8, "what one has taught, one knows"

    # By hand, in the directions that all of them gave.
    part = np.array_split(np.arange(len(photographs)), FOLDS)[2]
    others = list(evidence_of(scorer, np.delete(photographs, part, axis=0)))
    measure = taught.measure
    if measure.pixel is not None:
        pixels = Moments(measure.pixel.projection, by_place=True)
        for evidence in others:
            pixels.add(evidence.denoising)
        measure = measure._replace(pixel=place_gaussians(pixels))
    features = copy(taught.feature)
    features.count, features.total, features.outer = (
        0 * each for each in (features.count, features.total, features.outer)
    )
    for evidence in others:
        features.add(evidence.residuals if measure.subtract_prediction else evidence.features)
    if measure.turned:
        for turn in (1, 2, 3):
            for evidence in evidence_of(scorer, np.rot90(np.delete(photographs, part, axis=0), turn, axes=(1, 2))):
                features.add(evidence.features)
    gaussians = gaussians_of(features)
    if isinstance(gaussians, KindGaussians):
        plain = replace(taught.measure.feature, usual=None)
        distances = torch.cat([plain.distance(evidence.features) for evidence in others])
        gaussians = gaussians.counting_by_place(distances.mean(0))
    measure = measure._replace(feature=gaussians)
    if measure.context is not None:
        kept = np.isin(measure.context.owners, part)
        measure = measure._replace(context=NearestNormal(measure.context.scale, measure.context.cells[~kept]))
    scorer.calibration = replace(whole, measure=measure)
    expected = scorer.score(photographs[part])
    np.testing.assert_allclose(parts[2].scores, expected.scores, rtol=0.01, atol=0.01)
    np.testing.assert_allclose(parts[2].maps, expected.maps, rtol=0.02, atol=0.05)


def test_two_remaining_photographs_are_enough(fitted, variant, photographs, monkeypatch):
    monkeypatch.setattr(measures, "PLACES_TELL", 1.0)
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"pixel": "gaussian", "covariance": "select", "prediction": "select", "kinds": 3})
    scorer = Scorer(denoiser, fitted.extractor)
    calibrate(scorer, photographs[4:6], photographs[:4])
    assert np.isfinite([scorer.calibration.threshold, scorer.calibration.pixel_threshold]).all()
    for taught in fit_measures(scorer, photographs[:3]):
        scorer.calibration = replace(scorer.calibration, measure=taught.measure)
        parts = list(cross_fitted(scorer, taught, photographs[:3]))
        assert [len(part.scores) for part in parts] == [1, 1, 1]
        assert np.isfinite(np.concatenate([part.scores for part in parts])).all()


def test_only_some_photographs_shape_what_all_places_share(fitted, variant, photographs, monkeypatch):
    """Those that did not are left out for nothing."""
    monkeypatch.setattr(measures, "GENERAL_IMAGES", 4)
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"covariance": "general", "pixel": "kl"})
    scorer = Scorer(denoiser, fitted.extractor)
    calibrate(scorer, photographs[:4], photographs)
    (taught,) = fit_measures(scorer, photographs)
    left_out = np.concatenate([part.scores for part in cross_fitted(scorer, taught, photographs)])
    own = scorer.score(photographs).scores
    teaching = np.arange(16) % 4 == 0
    assert (left_out[teaching] > own[teaching]).mean() > 0.7
    alone = np.array([part[0] in (2, 6, 10, 14) for part in np.array_split(np.arange(16), FOLDS) for _ in part])
    np.testing.assert_array_equal(left_out[alone & ~teaching], own[alone & ~teaching])


def test_parts_are_small_and_photographs_not_too_many(fitted, variant, photographs, monkeypatch):
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"covariance": "place", "place_dimensions": 7})
    scorer = Scorer(denoiser, fitted.extractor)
    calibrate(scorer, photographs[:4], photographs)
    (taught,) = fit_measures(scorer, photographs)
    monkeypatch.setattr("pipeline.cross_fitting.FOLDS", 2)
    assert [len(part.scores) for part in cross_fitted(scorer, taught, photographs)] == [8, 8]
    monkeypatch.setattr("pipeline.cross_fitting.MOST_AT_ONCE", 5)
    assert [len(part.scores) for part in cross_fitted(scorer, taught, photographs)] == [4, 4, 4, 4]
    monkeypatch.setattr("pipeline.cross_fitting.MOST_IMAGES", 6)
    assert [len(part.scores) for part in cross_fitted(scorer, taught, photographs)] == [3, 3]
    found = calibrate(scorer, photographs[:4], photographs)
    assert np.flatnonzero(np.isfinite(found.training_scores)).tolist() == [0, 3, 6, 9, 12, 15]


def test_where_only_the_network_learned_there_is_nothing_to_take_back(fitted, variant, photographs, held_out):
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"covariance": "none", "pixel": "kl"})
    scorer = Scorer(denoiser, fitted.extractor)
    found = calibrate(scorer, held_out, photographs)
    assert np.isnan(found.training_scores).all() and not found.known_by_heart
    (taught,) = fit_measures(scorer, photographs)
    assert list(cross_fitted(scorer, taught, photographs)) == []

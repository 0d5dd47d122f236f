"""Which measures settings allow, and what teaches each of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import measures
from pipeline.measures import fit_measures
from pipeline.scoring import Scorer


def measures_of(scorer, photographs):
    return [taught.measure for taught in fit_measures(scorer, photographs)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"covariance": "none"}, [(None, "none", True)]),
        ({"covariance": "none", "pixel": "gaussian"}, [(True, "none", True)]),
        ({"covariance": "general", "prediction": "ignore"}, [(None, "general", False)]),
        ({"covariance": "place", "pixel": "gaussian"}, [(True, "place", True)]),
        (
            {"covariance": "select", "prediction": "select"},
            [(None, "general", True), (None, "general", False), (None, "place", True), (None, "place", False)],
        ),
        ({"covariance": "kind", "prediction": "ignore", "kinds": 9}, [(None, "kind", False)]),
        (
            {"covariance": "select", "prediction": "select", "kinds": 9},
            [
                *[(None, "general", True), (None, "general", False), (None, "place", True), (None, "place", False)],
                (None, "kind", False),
            ],
        ),
        (
            {"covariance": "select", "prediction": "subtract", "kinds": 9},
            [(None, "general", True), (None, "place", True)],
        ),
    ],
)
def test_settings_allow_these_measures(fitted, variant, photographs, settings, expected, monkeypatch):
    monkeypatch.setattr(measures, "PLACES_TELL", 1.0)
    denoiser = fitted.result()
    denoiser.config = variant(scoring=settings | {"place_dimensions": 7})
    allowed = measures_of(Scorer(denoiser, fitted.extractor), photographs)
    assert [(m.pixel and m.pixel.by_place, m.covariance, m.subtract_prediction) for m in allowed] == expected
    for measure in allowed:
        assert measure.context is None
        if measure.feature is not None:
            assert (
                measure.feature.mean.shape == {"general": (1, 40), "place": (64, 7), "kind": (9, 7)}[measure.covariance]
            )


@pytest.mark.parametrize(("place_reach", "expected"), [(None, [0, 1, 0]), (2, [2, 0])])
def test_places_may_reach_and_the_general_gaussian_has_none(fitted, variant, photographs, place_reach, expected):
    denoiser = fitted.result()
    denoiser.config = variant(scoring={"place_dimensions": 7, "place_reach": place_reach, "covariance": "select"})
    scorer = Scorer(denoiser, fitted.extractor)
    measures = measures_of(scorer, photographs)
    assert [m.reach for m in measures if m.feature.by_place] + [
        m.reach for m in measures if not m.feature.by_place
    ] == expected
    evidence = scorer.evidence(photographs[:2])
    for measure in measures:
        found = scorer.branch_maps(evidence, measure).feature[:, 0]
        torch.testing.assert_close(found, measure.feature.distance(evidence.residuals, measure.reach))


def test_gaussians_of_places_and_kinds_learn_features_from_photographs_in_four_directions(
    fitted, variant, photographs, monkeypatch
):
    monkeypatch.setattr(measures, "PLACES_TELL", 1.0)
    denoiser = fitted.result()
    settings = {"covariance": "select", "prediction": "select", "pixel": "gaussian", "place_dimensions": 7, "kinds": 5}

    def allowed(place_turns):
        denoiser.config = variant(scoring=settings | {"place_turns": place_turns})
        found = measures_of(Scorer(denoiser, fitted.extractor), photographs)
        return {(m.subtract_prediction, m.covariance, m.turned): m for m in found}

    plain, turned, both = allowed(False), allowed(True), allowed(None)
    own, new = ({(False, covariance, turns) for covariance in ("place", "kind")} for turns in (False, True))
    assert both.keys() == plain.keys() | new
    assert turned.keys() == both.keys() - own
    for found in (plain, turned):
        for key, measure in found.items():
            assert torch.equal(measure.pixel.whitening, both[key].pixel.whitening)
            assert torch.equal(measure.feature.whitening, both[key].feature.whitening)
    scorer = Scorer(denoiser, fitted.extractor)
    for turn in range(4):
        features = scorer.evidence(np.rot90(photographs[:4], turn, axes=(1, 2))).features
        for covariance in ("place", "kind"):
            learned = [both[False, covariance, turns].feature for turns in (False, True)]
            if covariance == "kind":
                learned = [replace(each, usual=None) for each in learned]
            distances = [each.distance(features).mean().item() for each in learned]
            assert distances[1] < 1.3
            assert (distances[0] > 1.5) == (turn in (1, 3)), "stripes turn by 180"


@pytest.mark.parametrize("aligned", [False, True])
def test_kinds_and_turned_photographs_are_a_choice_where_places_tell_little(fitted, variant, photographs, aligned):
    denoiser = fitted.result()
    rng = np.random.default_rng(0)
    shown = np.stack([rng.permuted(image.reshape(-1, 3), axis=0).reshape(image.shape) for image in photographs])
    if aligned:
        shown[:, 8:24, 8:24] = 250 - shown[:, 8:24, 8:24] // 4

    def allowed(**settings):
        scoring = {"covariance": "select", "prediction": "select", "place_dimensions": 7, "kinds": 5} | settings
        denoiser.config = variant(scoring=scoring)
        found = measures_of(Scorer(denoiser, fitted.extractor), shown)
        return {(m.covariance, m.turned) for m in found if m.covariance != "general"}

    lying, turned = ({("place", turned)} | ({("kind", turned)} if not aligned else set()) for turned in (False, True))
    assert allowed() == lying
    assert allowed(place_turns=None) == (lying if aligned else lying | turned)
    assert allowed(place_turns=True) == turned | {("place", False)}, "what the prediction leaves is never turned"
    assert allowed(place_turns=None, kinds=0) == {("place", False)} | (set() if aligned else {("place", True)})
    asked = {"covariance": "kind", "prediction": "ignore"}
    assert allowed(**asked, place_turns=None) == {("kind", False)} | (set() if aligned else {("kind", True)})
    assert allowed(**asked, place_turns=True) == {("kind", True)}, "as asked, whatever places tell"


def test_features_without_the_network_are_those_of_the_evidence(scorer, fresh):
    assert torch.equal(scorer.features(fresh[:3]), scorer.evidence(fresh[:3]).features)

"""The measures that a model's settings allow, each with the Gaussians of its training photographs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from pipeline.config import ScoringConfig
from pipeline.gaussian import Moments, NormalGaussian, general_gaussian, place_gaussians, place_projection
from pipeline.scoring import Evidence, Measure, Scorer

CONTEXT_WEIGHTS = (0.0, 0.25, 0.5)
"""Weights of the context in the feature branch that are tried where a model chooses its own."""
REACHES = (0, 1)
"""Cells that parts may lie from their places that are tried where a model chooses its own."""
GENERAL_IMAGES = 32
"""Training photographs that shape the Gaussians for all places."""

Vectors = Callable[[Evidence], list[Tensor]]
"""What is measured of an image's features: with the prediction subtracted or not, details and then context."""


def fit_measures(scorer: Scorer, training_nhwc: np.ndarray) -> list[Measure]:
    """The measures that the config allows, with Gaussians of training photographs, uint8 (n, map_size, map_size, 3)."""
    scoring = scorer.config.scoring
    subtract = {"subtract": [True], "ignore": [False], "select": [True, False]}[scoring.prediction]
    stages = scorer.config.features.stages, scorer.config.features.context_stages
    groups = [scorer.extractor.selector(each).to(scorer.device) for each in stages if each]
    parts = [(subtracted, group) for subtracted in subtract for group in groups if scoring.covariance != "none"]

    def vectors(evidence: Evidence) -> list[Tensor]:
        return [evidence.residuals if subtracted else evidence.features for subtracted, _ in parts]

    of_pixels, generals = _general_gaussians(scorer, training_nhwc, [group for _, group in parts], vectors)
    pixel, places = _place_gaussians(scorer, training_nhwc, of_pixels, generals, vectors)
    if not parts:
        return [Measure(pixel, None, True)]
    kept = {"general": [generals], "place": [places], "select": [generals, places]}[scoring.covariance]
    return [
        measure
        for gaussians in kept
        for i, subtracted in enumerate(subtract)
        for measure in _mixtures(scoring, pixel, gaussians[i * len(groups) : (i + 1) * len(groups)], subtracted)
    ]


def evidence_of(scorer: Scorer, images_nhwc: np.ndarray) -> Iterator[Evidence]:
    """The evidence of images, uint8 (n, map_size, map_size, 3), batch by batch."""
    batch = scorer.config.scoring.batch_size
    for start in range(0, len(images_nhwc), batch):
        yield scorer.evidence(images_nhwc[start : start + batch])


def _general_gaussians(
    scorer: Scorer, training_nhwc: np.ndarray, groups: Sequence[Tensor], vectors: Vectors
) -> tuple[NormalGaussian | None, list[NormalGaussian]]:
    """For all places together: of the pixel branch if it is measured by one, and of each group's features."""
    of_pixels = Moments(by_place=False) if scorer.config.scoring.pixel == "gaussian" else None
    of_features = [Moments(group, by_place=False) for group in groups]
    if of_pixels is None and not of_features:
        return None, []
    # Every cell is a sample: a few images, spread over all, are many.
    for evidence in evidence_of(scorer, training_nhwc[:: max(1, len(training_nhwc) // GENERAL_IMAGES)]):
        if of_pixels is not None:
            of_pixels.add(evidence.denoising)
        for moments, cells in zip(of_features, vectors(evidence), strict=True):
            moments.add(cells)
    return general_gaussian(of_pixels) if of_pixels else None, [general_gaussian(moments) for moments in of_features]


def _place_gaussians(
    scorer: Scorer,
    training_nhwc: np.ndarray,
    of_pixels: NormalGaussian | None,
    of_features: Sequence[NormalGaussian],
    vectors: Vectors,
) -> tuple[NormalGaussian | None, list[NormalGaussian]]:
    """For each place, whitened by those for all places: of the pixel branch, and of the features where settings ask for it."""
    scoring, seed = scorer.config.scoring, scorer.config.training.seed
    if scoring.covariance not in ("place", "select"):
        of_features = []
    if of_pixels is None and not of_features:
        return None, []
    pixels = Moments(of_pixels.whitening[0], by_place=True) if of_pixels else None
    features = [
        Moments(place_projection(gaussian, scoring.place_dimensions, seed), by_place=True) for gaussian in of_features
    ]
    for evidence in evidence_of(scorer, training_nhwc):
        if pixels is not None:
            pixels.add(evidence.denoising)
        for moments, cells in zip(features, vectors(evidence) if features else [], strict=True):
            moments.add(cells)
    return place_gaussians(pixels) if pixels else None, [place_gaussians(moments) for moments in features]


def _mixtures(
    scoring: ScoringConfig, pixel: NormalGaussian | None, gaussians: Sequence[NormalGaussian], subtract: bool
) -> list[Measure]:
    """Measures with each reach and weight of the context that the config allows; gaussians: of details and perhaps of context."""
    reaches: Sequence[int] = (0,)
    if gaussians[0].by_place:
        reaches = REACHES if scoring.place_reach is None else (scoring.place_reach,)
    weights: Sequence[float] = (0.0,)
    if len(gaussians) > 1:
        weights = CONTEXT_WEIGHTS if scoring.context_weight is None else (scoring.context_weight,)
    return [
        Measure(pixel, gaussians[0], subtract, gaussians[1] if weight > 0 else None, weight, reach)
        for reach in reaches
        for weight in weights
    ]

"""The measures that a model's settings allow, each with what training photographs teach: Gaussians, and cells kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from pipeline.config import ScoringConfig
from pipeline.gaussian import Moments, NormalGaussian, general_gaussian, place_gaussians, place_projection
from pipeline.nearest import NearestNormal, SampledCells, nearest_normal
from pipeline.scoring import Evidence, Measure, Scorer

CONTEXT_WEIGHTS = (0.0, 0.5, 0.75)
"""Weights of the context in the feature branch that are tried where a model chooses its own."""
REACHES = (0, 1)
"""Cells that parts may lie from their places that are tried where a model chooses its own."""
TURNS = 4
"""Directions by quarter turns. Mirrored photographs would be another product where it is not symmetric, such as a screw."""
GENERAL_IMAGES = 32
"""Training photographs that shape the Gaussians for all places."""

Vectors = Callable[[Evidence], list[Tensor]]
"""What Gaussians measure of an image's features: with the prediction subtracted, or not, or both."""


def fit_measures(scorer: Scorer, training_nhwc: np.ndarray) -> list[Measure]:
    """The measures that the config allows, taught by training photographs, uint8 (n, map_size, map_size, 3)."""
    scoring = scorer.config.scoring
    subtract = {"subtract": [True], "ignore": [False], "select": [True, False]}[scoring.prediction]
    if scoring.covariance == "none":
        subtract = []

    def vectors(evidence: Evidence) -> list[Tensor]:
        return [evidence.residuals if subtracted else evidence.features for subtracted in subtract]

    of_pixels, generals = _general_gaussians(scorer, training_nhwc, len(subtract), vectors)
    by_place = generals if scoring.by_place else []
    with_context = bool(subtract and scorer.config.features.context_stages and scoring.context_weight != 0)
    pixel, moments, context = _of_all_photographs(scorer, training_nhwc, of_pixels, by_place, with_context, vectors)
    if not subtract:
        return [Measure(pixel, None, True)]
    details = []
    if scoring.covariance != "place":
        details += [Measure(pixel, *pair) for pair in zip(generals, subtract, strict=True)]
    for sums, subtracted in zip(moments, subtract if scoring.by_place else [], strict=True):
        turns = False if subtracted else scoring.place_turns
        if turns is not True:
            details.append(Measure(pixel, place_gaussians(sums), subtracted))
        if turns is not False:
            _add_turned(scorer, training_nhwc, sums)
            details.append(Measure(pixel, place_gaussians(sums), subtracted, turned=True))
    return [mixed for measure in details for mixed in _mixtures(scoring, measure, context)]


def evidence_of(scorer: Scorer, images_nhwc: np.ndarray) -> Iterator[Evidence]:
    """The evidence of images, uint8 (n, map_size, map_size, 3), batch by batch."""
    batch = scorer.config.scoring.batch_size
    for start in range(0, len(images_nhwc), batch):
        yield scorer.evidence(images_nhwc[start : start + batch])


def _general_gaussians(
    scorer: Scorer, training_nhwc: np.ndarray, count: int, vectors: Vectors
) -> tuple[NormalGaussian | None, list[NormalGaussian]]:
    """For all places together: of the pixel branch if it is measured by one, and of each of so many vectors."""
    of_pixels = Moments(by_place=False) if scorer.config.scoring.pixel == "gaussian" else None
    of_features = [Moments(by_place=False) for _ in range(count)]
    if of_pixels is None and not of_features:
        return None, []
    # Every cell is a sample: a few images, spread over all, are many.
    for evidence in evidence_of(scorer, training_nhwc[:: max(1, len(training_nhwc) // GENERAL_IMAGES)]):
        if of_pixels is not None:
            of_pixels.add(evidence.denoising)
        for moments, cells in zip(of_features, vectors(evidence), strict=True):
            moments.add(cells)
    return general_gaussian(of_pixels) if of_pixels else None, [general_gaussian(moments) for moments in of_features]


def _of_all_photographs(
    scorer: Scorer,
    training_nhwc: np.ndarray,
    of_pixels: NormalGaussian | None,
    of_features: Sequence[NormalGaussian],
    with_context: bool,
    vectors: Vectors,
) -> tuple[NormalGaussian | None, list[Moments], NearestNormal | None]:
    """What takes all photographs: the pixel branch's Gaussian for each place and the sums for those of features, both whitened by
    the given ones for all places, and the cells that are kept of the context."""
    scoring, seed = scorer.config.scoring, scorer.config.training.seed
    if of_pixels is None and not of_features and not with_context:
        return None, [], None
    pixels = Moments(of_pixels.whitening[0], by_place=True) if of_pixels else None
    features = [
        Moments(place_projection(gaussian, scoring.place_dimensions, seed), by_place=True) for gaussian in of_features
    ]
    sampled = SampledCells(len(training_nhwc), seed) if with_context else None
    for evidence in evidence_of(scorer, training_nhwc):
        if pixels is not None:
            pixels.add(evidence.denoising)
        for moments, cells in zip(features, vectors(evidence) if features else [], strict=True):
            moments.add(cells)
        if sampled is not None:
            assert evidence.context is not None, "an extractor with context stages"
            sampled.add(evidence.context)
    return (
        place_gaussians(pixels) if pixels else None,
        features,
        _context(scorer, sampled.samples()) if sampled else None,
    )


def _add_turned(scorer: Scorer, training_nhwc: np.ndarray, of_features: Moments) -> None:
    """Take the features of photographs in the other directions into account."""
    batch = scorer.config.scoring.batch_size
    for turn in range(1, TURNS):
        turned = np.rot90(training_nhwc, turn, axes=(1, 2))
        for start in range(0, len(turned), batch):
            of_features.add(scorer.features(turned[start : start + batch]))


def _context(scorer: Scorer, samples: Tensor) -> NearestNormal:
    config, extractor = scorer.config, scorer.extractor
    stages = [extractor.stage_channels[stage] for stage in extractor.context_stages]
    return nearest_normal(samples, stages, config.scoring.context_cells, config.training.seed)


def _mixtures(scoring: ScoringConfig, details: Measure, context: NearestNormal | None) -> list[Measure]:
    """The measure with each reach and weight of the context that the config allows."""
    assert details.feature is not None
    reaches: Sequence[int] = (0,)
    if details.feature.by_place:
        reaches = REACHES if scoring.place_reach is None else (scoring.place_reach,)
    weights: Sequence[float] = (0.0,)
    if context is not None:
        weights = CONTEXT_WEIGHTS if scoring.context_weight is None else (scoring.context_weight,)
    return [
        details._replace(context=context if weight > 0 else None, context_weight=weight, reach=reach)
        for reach in reaches
        for weight in weights
    ]

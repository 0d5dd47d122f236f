"""Training photographs scored as if they had been held out: what a model promises rests on ten times as many.

What they taught is taken back from Gaussians and from what is usual at a place, and cells kept of them are not asked. The
network has seen them all the same, and they had their share in what whitens vectors, in which kinds there are and in the scale
of kept cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from pipeline.evidence import Evidence
from pipeline.gaussian import Moments, place_gaussians
from pipeline.kinds import KindGaussians
from pipeline.measures import (
    Taught,
    distances_at_places,
    evidence_of,
    features_of_turned,
    gaussians_of,
    general_places,
)
from pipeline.scoring import Measure, ScoredImages, Scorer

FOLDS = 10
"""Parts of the photographs that are left out one after the other, at least; of neighbours in their order: what was photographed
one soon after the other may be alike."""
MOST_AT_ONCE = 32
"""Photographs of a part: their evidence, some 12 MiB each, is in memory together."""
MOST_IMAGES = 2000
"""Photographs that are scored; they tell a rate of a thousandth, and more would not tell much more."""


def cross_fitted(scorer: Scorer, taught: Taught, training_nhwc: np.ndarray) -> Iterator[ScoredImages]:
    """Of training photographs, uint8 (n, map_size, map_size, 3), n >= 3, part by part: each under what the others taught.

    Of none where photographs teach nothing but the network. taught: what the scorer's measure, calibrated but for thresholds, was
    taught by, all n of them.
    """
    if taught.pixel is None and taught.feature is None:
        return
    calibration, count = scorer.calibration, len(training_nhwc)
    assert calibration is not None
    scored = scored_places(count)
    for part in np.array_split(scored, min(len(scored), max(FOLDS, -(-len(scored) // MOST_AT_ONCE)))):
        images = training_nhwc[part]
        evidence = list(evidence_of(scorer, images))
        general = np.isin(part, np.arange(count)[general_places(count)])
        measure = _taught_by_others(scorer, taught, part, count, images, evidence, general)
        yield scorer.score_evidence(evidence, replace(calibration, measure=measure))


def scored_places(count: int) -> np.ndarray:
    """Which of so many training photographs are scored, ascending: all, or some spread over all; int64 (n,)."""
    return np.arange(0, count, -(-count // MOST_IMAGES))


def _taught_by_others(
    scorer: Scorer,
    taught: Taught,
    part: np.ndarray,
    count: int,
    images_nhwc: np.ndarray,
    evidence: Sequence[Evidence],
    general: np.ndarray,
) -> Measure:
    """The measure without what the images of a part, by their places among all `count`, and their evidence taught it.

    general: bool, which of them teach what all places share."""
    measure = taught.measure
    if taught.pixel is not None:
        rest = taught.pixel.without(each.denoising for each in evidence)
        measure = measure._replace(pixel=place_gaussians(rest))
    if taught.feature is not None:
        lessons: Iterator[Tensor] = _lessons(scorer, measure, images_nhwc, evidence)
        if isinstance(taught.feature, Moments) and not taught.feature.by_place:
            lessons = _chosen(lessons, general)
        gaussians = gaussians_of(taught.feature.without(lessons))
        if isinstance(gaussians, KindGaussians):
            assert isinstance(measure.feature, KindGaussians) and taught.distances is not None
            (own,) = distances_at_places([measure.feature], (each.features for each in evidence))
            gaussians = gaussians.counting_by_place((taught.distances - own) / (count - len(part)))
        measure = measure._replace(feature=gaussians)
    if measure.context is not None:
        measure = measure._replace(context=measure.context.without(part))
    return measure


def _lessons(
    scorer: Scorer, measure: Measure, images_nhwc: np.ndarray, evidence: Sequence[Evidence]
) -> Iterator[Tensor]:
    """What the measure's Gaussians of features learned from images, batch by batch."""
    for each in evidence:
        yield each.residuals if measure.subtract_prediction else each.features
    if measure.turned:
        yield from features_of_turned(scorer, images_nhwc)


def _chosen(batches: Iterator[Tensor], which: np.ndarray) -> Iterator[Tensor]:
    """Those images of batches (N, C, G, G) that are chosen, bool (n,) over all batches; no empty batch."""
    start = 0
    for cells in batches:
        chosen = np.flatnonzero(which[start : start + len(cells)])
        start += len(cells)
        if len(chosen):
            yield cells[chosen.tolist()]

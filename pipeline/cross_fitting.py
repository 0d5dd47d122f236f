"""Training photographs scored as if they had been held out: what a model promises rests on ten times as many.

What they taught is taken back from Gaussians, and cells kept of them are not asked. The network has seen them all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from pipeline.evidence import Evidence
from pipeline.gaussian import place_gaussians
from pipeline.measures import Taught, evidence_of, features_of_turned, gaussians_of
from pipeline.scoring import Measure, ScoredImages, Scorer

FOLDS = 10
"""Parts of the photographs that are left out one after the other, of neighbours in their order: what was photographed one soon
after the other may be alike."""


def cross_fitted(scorer: Scorer, taught: Taught, training_nhwc: np.ndarray) -> Iterator[ScoredImages]:
    """Of training photographs, uint8 (n, map_size, map_size, 3), n >= 3, part by part: each under what the others taught.

    taught: what the scorer's measure, calibrated but for thresholds, was taught by, all n of them.
    """
    calibration = scorer.calibration
    assert calibration is not None
    for part in np.array_split(np.arange(len(training_nhwc)), min(FOLDS, len(training_nhwc))):
        images = training_nhwc[part]
        evidence = list(evidence_of(scorer, images))
        measure = _taught_by_others(scorer, taught, part, images, evidence)
        yield scorer.score_evidence(evidence, replace(calibration, measure=measure))


def _taught_by_others(
    scorer: Scorer, taught: Taught, part: np.ndarray, images_nhwc: np.ndarray, evidence: Sequence[Evidence]
) -> Measure:
    """The measure without what the images of a part, by their places among all, and their evidence taught it."""
    measure = taught.measure
    if taught.pixel is not None:
        rest = taught.pixel.without(each.denoising for each in evidence)
        measure = measure._replace(pixel=place_gaussians(rest))
    if taught.feature is not None:
        of_others = taught.feature.without(_lessons(scorer, measure, images_nhwc, evidence))
        measure = measure._replace(feature=gaussians_of(of_others))
    if measure.context is not None:
        measure = measure._replace(context=measure.context.without(part))
    return measure


def _lessons(
    scorer: Scorer, measure: Measure, images_nhwc: np.ndarray, evidence: Sequence[Evidence]
) -> Iterable[Tensor]:
    """What the measure's Gaussians of features learned from images."""
    for each in evidence:
        yield each.residuals if measure.subtract_prediction else each.features
    if measure.turned:
        yield from features_of_turned(scorer, images_nhwc)

"""What normal photographs teach a scorer: Gaussians, kept cells, statistics, thresholds, and what implanted defects decide.

Nothing here looks at a labelled defect. Gaussians and cells come from the training photographs, everything else from held-out
ones, thresholds from training photographs, too, that are held out in turn: measured on the images that shaped it, a Gaussian
would promise fewer false alarms than it keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from pipeline.choice import Candidate, Choice, judge, judged_images
from pipeline.config import ScoringConfig
from pipeline.cross_fitting import cross_fitted, scored_places
from pipeline.measures import Taught, evidence_of, fit_measures
from pipeline.scoring import BranchMaps, Calibration, Measure, ScoredImages, Scorer, distance_from
from pipeline.thresholds import false_alarm_bound, known_by_heart

SMALLEST_DEVIATION = 1e-6
"""Stands in for no deviation at all."""
LATE = ("alpha", "map_sigma", "top_pixels")
"""Scoring settings that change nothing before the branches are combined."""


class Calibrated(NamedTuple):
    """What calibrating finds beside what it leaves in the scorer."""

    choices: list[Choice]
    """All ways of scoring that were tried, best first."""
    held_out_scores: np.ndarray
    """float64 (n,): the image scores of the held-out photographs."""
    training_scores: np.ndarray
    """float64 (m,): those of the training photographs under what the others taught; nan where that was not asked."""
    known_by_heart: bool
    """Whether the network knows its training photographs so well that thresholds come from held-out ones alone."""


def calibrate(
    scorer: Scorer,
    held_out_nhwc: np.ndarray,
    training_nhwc: np.ndarray,
    variants: Sequence[ScoringConfig] = (),
) -> Calibrated:
    """Calibrate a scorer on normal photographs, uint8 (n, map_size, map_size, 3), and leave the result in it.

    Of the `variants` of its scoring settings (by default only its own), and of what they leave open (null or "select"), the
    way that finds implanted defects best is kept. n >= 2 photographs are held out.
    """
    tried: list[Choice] = []
    choice, calibration, taught = _best(scorer, held_out_nhwc, training_nhwc, variants, tried)
    scorer.configure(scorer.config.model_copy(update={"scoring": choice.scoring}))
    scorer.calibration = replace(calibration, alpha=choice.alpha, top_pixels=choice.top_pixels)
    thresholds = _set_thresholds(scorer, scorer.calibration, taught, held_out_nhwc, training_nhwc)
    return Calibrated(sorted(tried, key=lambda choice: -choice.merit), *thresholds)


def _best(
    scorer: Scorer,
    held_out_nhwc: np.ndarray,
    training_nhwc: np.ndarray,
    variants: Sequence[ScoringConfig],
    tried: list[Choice],
) -> tuple[Choice, Calibration, Taught]:
    """The way of scoring that finds implanted defects best; what was tried is added to `tried`."""
    judged = judged_images(held_out_nhwc, scorer.config.training.seed)
    best: tuple[Choice, Calibration, Taught] | None = None
    ordered = sorted(variants or (scorer.config.scoring,), key=_early)
    for _, group in itertools.groupby(ordered, key=_early):
        # One group at a time: its Gaussians and maps are large.
        ways: list[Taught] = []
        candidates: list[Candidate] = []
        for scoring in group:
            scorer.configure(scorer.config.model_copy(update={"scoring": scoring}))
            ways = ways or fit_measures(scorer, training_nhwc)
            measures = [taught.measure for taught in ways]
            candidates = candidates or measured(scorer, measures, held_out_nhwc, judged.images)
            for candidate, taught in zip(candidates, ways, strict=True):
                for choice in judge(scorer, candidate, judged):
                    tried.append(choice)
                    if best is None or choice.merit > best[0].merit:
                        best = choice, candidate.calibration, taught
    assert best is not None
    return best


def _early(scoring: ScoringConfig) -> str:
    """The settings that decide Gaussians and branch maps."""
    return scoring.model_dump_json(exclude=set(LATE))


def _set_thresholds(
    scorer: Scorer, calibration: Calibration, taught: Taught, held_out_nhwc: np.ndarray, training_nhwc: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns what `Calibrated` has beside choices."""
    rate = scorer.config.scoring.false_alarm_rate
    held_out, others = _extremes([scorer.score(held_out_nhwc)]), _extremes(cross_fitted(scorer, taught, training_nhwc))
    asked = others.shape[1] > 0
    by_heart = asked and known_by_heart(held_out[0], others[0])
    scores, peaks = held_out if by_heart else np.concatenate([held_out, others], axis=1)
    of_images = false_alarm_bound(scores, rate)
    scorer.calibration = replace(
        calibration,
        normal_scores=torch.from_numpy(np.sort(scores)).float(),
        threshold=of_images.value,
        pixel_threshold=false_alarm_bound(peaks, rate).value,
        false_alarms_low=of_images.low,
        false_alarms_high=of_images.high,
    )
    of_training = np.full(len(training_nhwc), np.nan)
    if asked:
        of_training[scored_places(len(training_nhwc))] = others[0]
    return held_out[0], of_training, by_heart


def _extremes(parts: Iterable[ScoredImages]) -> np.ndarray:
    """float64 (2, n): scores and largest map values of the images of all parts."""
    found = [np.stack([part.scores, part.maps.reshape(len(part.maps), -1).max(1)]) for part in parts]
    return np.concatenate([np.empty((2, 0)), *found], axis=1)


def measured(
    scorer: Scorer, measures: Sequence[Measure], held_out_nhwc: np.ndarray, images_nhwc: np.ndarray
) -> list[Candidate]:
    """Every measure with statistics of the held-out images, and the maps of all images under each."""
    return [
        Candidate(_statistics(measure, normal, scorer.config.scoring.normalisation), parts)
        for measure, normal, parts in zip(
            measures,
            _branch_maps(scorer, measures, held_out_nhwc),
            _branch_maps(scorer, measures, images_nhwc),
            strict=True,
        )
    ]


def _branch_maps(scorer: Scorer, measures: Sequence[Measure], images_nhwc: np.ndarray) -> list[list[BranchMaps]]:
    parts: list[list[BranchMaps]] = [[] for _ in measures]
    for evidence in evidence_of(scorer, images_nhwc):
        distance = cache(distance_from)  # measures share Gaussians and context
        for kept, measure in zip(parts, measures, strict=True):
            kept.append(scorer.branch_maps(evidence, measure, distance))
    return parts


def _statistics(measure: Measure, normal: list[BranchMaps], normalisation: str) -> Calibration:
    pixel, feature = (torch.cat(maps) for maps in zip(*normal, strict=True))
    if not (pixel.isfinite().all() and feature.isfinite().all()):
        raise FloatingPointError("the network's maps of normal images are not finite: lower training.learning_rate")
    scale = _maxima if normalisation == "maxima" else _mean_and_deviation
    (pixel_mean, pixel_std), (feature_mean, feature_std) = scale(pixel), scale(feature)
    return Calibration(
        measure=measure,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        feature_mean=feature_mean,
        feature_std=feature_std,
        alpha=0.0,
        top_pixels=1,
        normal_scores=torch.zeros(0),
        threshold=0.0,
        pixel_threshold=0.0,
        false_alarms_low=0.0,
        false_alarms_high=1.0,
    )


def _mean_and_deviation(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of maps (N, T, s, s), for each of T; photographs that are all the same leave no deviation."""
    return maps.mean((0, 2, 3)), maps.std((0, 2, 3)).clamp(min=SMALLEST_DEVIATION)


def _maxima(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What divides by the largest value of normal images: nothing to subtract, and the maxima of maps (N, T, s, s)."""
    maxima = maps.amax((0, 2, 3)).clamp(min=SMALLEST_DEVIATION)
    return torch.zeros_like(maxima), maxima

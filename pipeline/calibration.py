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

from pipeline.choice import Candidate, Choice, image_auroc, judge, judged_images
from pipeline.config import ScoringConfig
from pipeline.cross_fitting import cross_fitted, scored_places
from pipeline.measures import Taught, evidence_of, fit_measures
from pipeline.scoring import BranchMaps, Calibration, Measure, ScoredImages, Scorer, distance_from, top_means
from pipeline.thresholds import false_alarm_bound, known_by_heart

SMALLEST_DEVIATION = 1e-6
"""Stands in for no deviation at all."""
FINALISTS = 5
"""Measures that are judged again."""
FINAL_DEFECTS_PER_IMAGE = 12
"""Implanted versions of every held-out image that they are judged on, other ones."""
LATE = ("alpha", "map_sigma", "top_pixels")
"""Scoring settings that change nothing before the branches are combined."""


class Calibrated(NamedTuple):
    """What calibrating finds beside what it leaves in the scorer."""

    choices: list[Choice]
    """All ways of scoring that were tried, the one that is kept first: those that were judged again, as they were then and best
    first, before the others."""
    held_out_scores: np.ndarray
    """float64 (n,): the image scores of the held-out photographs."""
    training_scores: np.ndarray
    """float64 (m,): those of the training photographs under what the others taught; nan where that was not asked."""
    known_by_heart: bool
    """Whether the network knows its training photographs so well that thresholds come from held-out ones alone."""


class Entrant(NamedTuple):
    """A measure under some settings of scoring, and what taught it."""

    scoring: ScoringConfig
    calibration: Calibration
    taught: Taught
    choices: list[Choice]
    """With each weight of the pixel branch and each image score."""

    @property
    def best(self) -> Choice:
        """The first of equals."""
        return max(self.choices, key=_merit)


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
    finalists, others = _heats(scorer, held_out_nhwc, training_nhwc, variants)
    if others or len(finalists[0].choices) > 1:
        finalists = _finals(scorer, finalists, held_out_nhwc)
    winner = max(finalists, key=lambda entrant: entrant.best.merit)
    scorer.configure(scorer.config.model_copy(update={"scoring": winner.scoring}))
    kept = _with_thresholds(scorer, winner, held_out_nhwc, training_nhwc)
    (choice,) = kept.choices
    finals = [
        each
        for entrant in finalists
        for each in entrant.choices
        if entrant is not winner or (each.alpha, each.top_pixels) != (choice.alpha, choice.top_pixels)
    ]
    ordered = [sorted(choices, key=_merit, reverse=True) for choices in (finals, others)]
    return kept._replace(choices=[choice, *ordered[0], *ordered[1]])


def _heats(
    scorer: Scorer, held_out_nhwc: np.ndarray, training_nhwc: np.ndarray, variants: Sequence[ScoringConfig]
) -> tuple[list[Entrant], list[Choice]]:
    """The entrants that find implanted defects best, best first, and what the others found."""
    judged = judged_images(held_out_nhwc, scorer.config.training.seed)
    finalists: list[Entrant] = []
    others: list[Choice] = []
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
                choices = judge(scorer, candidate, judged)
                finalists.append(Entrant(scoring, candidate.calibration, taught, choices))
        finalists.sort(key=lambda entrant: entrant.best.merit, reverse=True)
        others += [choice for entrant in finalists[FINALISTS:] for choice in entrant.choices]
        del finalists[FINALISTS:]
    return finalists, others


def _finals(scorer: Scorer, finalists: Sequence[Entrant], held_out_nhwc: np.ndarray) -> list[Entrant]:
    """The finalists judged again, on more defects, and others: of many that are as good, the one that the first defects favoured
    would win, and by figures that flatter it."""
    judged = judged_images(held_out_nhwc, scorer.config.training.seed + 1, versions=FINAL_DEFECTS_PER_IMAGE)
    groups: dict[str, list[Entrant]] = {}
    for each in finalists:
        groups.setdefault(_early(each.scoring), []).append(each)
    found = []
    for group in groups.values():
        scorer.configure(scorer.config.model_copy(update={"scoring": group[0].scoring}))
        maps = _branch_maps(scorer, [each.calibration.measure for each in group], judged.images)
        for each, parts in zip(group, maps, strict=True):
            scorer.configure(scorer.config.model_copy(update={"scoring": each.scoring}))
            found.append(each._replace(choices=judge(scorer, Candidate(each.calibration, parts), judged)))
    return found


def _merit(choice: Choice) -> float:
    return choice.merit


def _early(scoring: ScoringConfig) -> str:
    """The settings that decide Gaussians and branch maps."""
    return scoring.model_dump_json(exclude=set(LATE))


def _with_thresholds(
    scorer: Scorer, winner: Entrant, held_out_nhwc: np.ndarray, training_nhwc: np.ndarray
) -> Calibrated:
    """Leaves the winner's calibration in the scorer; of its choices the one that is kept is returned.

    Its image score is chosen last: held-out photographs are few to tell which is best, those left out in turn ten times as many.
    """
    rate = scorer.config.scoring.false_alarm_rate
    siblings = [choice for choice in winner.choices if choice.alpha == winner.best.alpha]
    tops = [choice.top_pixels for choice in siblings]
    scorer.calibration = replace(winner.calibration, alpha=winner.best.alpha, top_pixels=winner.best.top_pixels)
    held_out = _extremes([scorer.score(held_out_nhwc)], tops)
    others = _extremes(cross_fitted(scorer, winner.taught, training_nhwc), tops)
    likeliest = tops.index(winner.best.top_pixels)
    asked = others.shape[1] > 0
    by_heart = asked and known_by_heart(held_out[likeliest], others[likeliest])
    *scores, peaks = held_out if by_heart else np.concatenate([held_out, others], axis=1)
    figures = [image_auroc(choice.defect_scores, normal) for choice, normal in zip(siblings, scores, strict=True)]
    best = int(np.argmax(figures))
    choice = replace(siblings[best], image_auroc=figures[best])
    of_images = false_alarm_bound(scores[best], rate)
    scorer.calibration = replace(
        scorer.calibration,
        top_pixels=choice.top_pixels,
        normal_scores=torch.from_numpy(np.sort(scores[best])).float(),
        threshold=of_images.value,
        pixel_threshold=false_alarm_bound(peaks, rate).value,
        false_alarms_low=of_images.low,
        false_alarms_high=of_images.high,
    )
    of_training = np.full(len(training_nhwc), np.nan)
    if asked:
        of_training[scored_places(len(training_nhwc))] = others[best]
    return Calibrated([choice], held_out[best], of_training, by_heart)


def _extremes(parts: Iterable[ScoredImages], tops: Sequence[int]) -> np.ndarray:
    """float64 (len(tops) + 1, n): the images' scores for each count of largest map values, and the largest value itself."""
    found = [top_means(torch.from_numpy(part.maps).float(), [*tops, 1]).numpy() for part in parts]
    return np.concatenate([np.empty((len(tops) + 1, 0)), *found], axis=1)


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

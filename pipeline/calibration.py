"""What normal photographs teach a scorer: Gaussians, statistics, thresholds, and the choices that implanted defects make.

Nothing here looks at a labelled defect. The Gaussians come from the training photographs, everything else from held-out ones:
measured on the images that shaped it, a Gaussian would promise fewer false alarms than it keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from pipeline.config import ScoringConfig
from pipeline.gaussian import Moments, NormalGaussian, general_gaussian, place_gaussians, place_projection
from pipeline.metrics import LocalizationMetrics, auroc, score_counts
from pipeline.scoring import (
    BranchMaps,
    Calibration,
    Evidence,
    Measure,
    Scorer,
    stored_map,
    top_means,
)
from pipeline.textures import DEFECTS, implant

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Weights of the pixel branch that are tried where a model chooses its own; the first of equals wins."""
CONTEXT_WEIGHTS = (0.0, 0.25, 0.5)
"""Weights of the context in the feature branch that are tried where a model chooses its own."""
TOP_PIXELS = (64, 256, 1024, 4096)
"""Counts of largest map values in the image score that are tried where a model chooses its own."""
GENERAL_IMAGES = 32
"""Training photographs that shape the Gaussians for all places."""
DEFECTS_PER_IMAGE = 3
"""Implanted versions of every held-out image that choices are made on."""
SMALLEST_DEVIATION = 1e-6
"""Stands in for no deviation at all."""
LATE = ("alpha", "map_sigma", "normalisation", "top_pixels")
"""Scoring settings that change nothing before the branches are combined."""


@dataclass(frozen=True)
class Choice:
    """One way of scoring, and how well it finds implanted defects among held-out normal images."""

    scoring: ScoringConfig
    covariance: str
    """none, general or place: what measured the features."""
    subtract_prediction: bool
    context_weight: float
    alpha: float
    top_pixels: int
    pixel_auroc: float
    pro: float
    """Up to a false-positive rate of 0.3."""
    image_auroc: float

    @property
    def merit(self) -> float:
        """What decides: the sum of the three."""
        return self.pixel_auroc + self.pro + self.image_auroc


def calibrate(
    scorer: Scorer,
    held_out_nhwc: np.ndarray,
    training_nhwc: np.ndarray,
    variants: Sequence[ScoringConfig] = (),
) -> list[Choice]:
    """Calibrate a scorer on normal photographs, uint8 (n, map_size, map_size, 3), and leave the result in it.

    Of the `variants` of its scoring settings (by default only its own), and of what they leave open (null or "select"), the
    way that finds implanted defects best is kept. n >= 2 photographs are held out. Returns all that was tried, best first.
    """
    images, truth = judged_images(held_out_nhwc, scorer.config.training.seed)
    tried: list[Choice] = []
    best: tuple[Choice, Calibration] | None = None
    ordered = sorted(variants or (scorer.config.scoring,), key=_early)
    for _, group in itertools.groupby(ordered, key=_early):
        # One group at a time: its Gaussians and maps are large.
        candidates: list[Candidate] = []
        for scoring in group:
            scorer.configure(scorer.config.model_copy(update={"scoring": scoring}))
            candidates = candidates or measured(scorer, fit_measures(scorer, training_nhwc), held_out_nhwc, images)
            for candidate in candidates:
                for choice in judge(scorer, candidate, truth):
                    tried.append(choice)
                    if best is None or choice.merit > best[0].merit:
                        best = choice, candidate.calibration
    assert best is not None
    choice, calibration = best
    scorer.configure(scorer.config.model_copy(update={"scoring": choice.scoring}))
    scorer.calibration = replace(calibration, alpha=choice.alpha, top_pixels=choice.top_pixels)
    _set_thresholds(scorer, scorer.calibration, held_out_nhwc)
    return sorted(tried, key=lambda choice: -choice.merit)


def _early(scoring: ScoringConfig) -> str:
    """The settings that decide Gaussians and branch maps."""
    return scoring.model_dump_json(exclude=set(LATE))


def judged_images(held_out_nhwc: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out images with implanted defects, then as they are, uint8 (m, H, W, 3), and the masks, bool (m, H, W)."""
    images, masks = implanted(held_out_nhwc, seed)
    none = np.zeros((len(held_out_nhwc), *masks.shape[1:]), bool)
    return np.concatenate([images, held_out_nhwc]), np.concatenate([masks, none])


def _set_thresholds(scorer: Scorer, calibration: Calibration, held_out_nhwc: np.ndarray) -> None:
    rate = scorer.config.scoring.false_alarm_rate
    normal = scorer.score(held_out_nhwc)
    peaks = normal.maps.reshape(len(held_out_nhwc), -1).max(1).astype(np.float64)
    threshold = prediction_bound(normal.scores, rate)
    low, high = exceedance_interval(normal.scores, threshold)
    scorer.calibration = replace(
        calibration,
        normal_scores=torch.from_numpy(np.sort(normal.scores)).float(),
        threshold=threshold,
        pixel_threshold=prediction_bound(peaks, rate),
        false_alarms_low=low,
        false_alarms_high=high,
    )


class Candidate(NamedTuple):
    """A measure, calibrated but for alpha, image score and thresholds, and what it says of images in the order given."""

    calibration: Calibration
    parts: list[BranchMaps]


def measured(
    scorer: Scorer, measures: Sequence[Measure], held_out_nhwc: np.ndarray, images_nhwc: np.ndarray
) -> list[Candidate]:
    """Every measure with statistics of the held-out images, and the maps of all images under each."""
    return [
        Candidate(_statistics(measure, normal), parts)
        for measure, normal, parts in zip(
            measures,
            _branch_maps(scorer, measures, held_out_nhwc),
            _branch_maps(scorer, measures, images_nhwc),
            strict=True,
        )
    ]


def _branch_maps(scorer: Scorer, measures: Sequence[Measure], images_nhwc: np.ndarray) -> list[list[BranchMaps]]:
    parts: list[list[BranchMaps]] = [[] for _ in measures]
    for evidence in _evidence(scorer, images_nhwc):
        for kept, measure in zip(parts, measures, strict=True):
            kept.append(scorer.branch_maps(evidence, measure))
    return parts


def _statistics(measure: Measure, normal: list[BranchMaps]) -> Calibration:
    pixel, feature = (torch.cat(maps) for maps in zip(*normal, strict=True))
    if not (pixel.isfinite().all() and feature.isfinite().all()):
        raise FloatingPointError("the network's maps of normal images are not finite: lower training.learning_rate")
    return Calibration(
        measure=measure,
        pixel_mean=pixel.mean((0, 2, 3)),
        # Photographs that are all the same leave no deviation.
        pixel_std=pixel.std((0, 2, 3)).clamp(min=SMALLEST_DEVIATION),
        feature_mean=feature.mean((0, 2, 3)),
        feature_std=feature.std((0, 2, 3)).clamp(min=SMALLEST_DEVIATION),
        alpha=0.0,
        top_pixels=1,
        normal_scores=torch.zeros(0),
        threshold=0.0,
        pixel_threshold=0.0,
        false_alarms_low=0.0,
        false_alarms_high=1.0,
    )


def judge(scorer: Scorer, candidate: Candidate, truth: np.ndarray) -> list[Choice]:
    """How well a candidate finds defects with each weight of the pixel branch and each image score that the config allows.

    truth: the masks (n, H, W) of its images.
    """
    scoring, measure = scorer.config.scoring, candidate.calibration.measure
    alphas = ALPHAS if scoring.alpha is None else (scoring.alpha,)
    tops = TOP_PIXELS if scoring.top_pixels is None else (scoring.top_pixels,)
    metrics = {alpha: LocalizationMetrics() for alpha in alphas}
    scores: dict[tuple[float, int], list[np.ndarray]] = {pair: [] for pair in itertools.product(alphas, tops)}
    start = 0
    for part in candidate.parts:
        masks = truth[start : start + len(part.pixel)]
        start += len(part.pixel)
        branches = scorer.maps(part, candidate.calibration)
        for alpha, metric in metrics.items():
            combined = stored_map(alpha * branches.pixel + (1 - alpha) * branches.feature)
            metric.update(combined.cpu().numpy(), masks)
            for top, values in zip(tops, top_means(combined.float(), tops), strict=True):
                scores[alpha, top].append(values.cpu().numpy())
    covariance = "none" if measure.feature is None else "place" if measure.feature.by_place else "general"
    results = {alpha: metric.compute() for alpha, metric in metrics.items()}
    anomalous = np.asarray(truth.any(axis=(1, 2)))
    return [
        Choice(
            scoring=scoring,
            covariance=covariance,
            subtract_prediction=measure.subtract_prediction,
            context_weight=measure.context_weight,
            alpha=alpha,
            top_pixels=top,
            pixel_auroc=results[alpha]["pixel_auroc"],
            pro=results[alpha]["pro_0.30"],
            image_auroc=auroc(*score_counts(np.concatenate(found), anomalous)),
        )
        for (alpha, top), found in scores.items()
    ]


def fit_measures(scorer: Scorer, training_nhwc: np.ndarray) -> list[Measure]:
    """The measures that the config allows, with Gaussians of training photographs, uint8 (n, map_size, map_size, 3)."""
    scoring, seed = scorer.config.scoring, scorer.config.training.seed
    subtract = {"subtract": [True], "ignore": [False], "select": [True, False]}[scoring.prediction]
    general, place = scoring.covariance != "none", scoring.covariance in ("place", "select")
    stages = scorer.config.features.stages, scorer.config.features.context_stages
    groups = [scorer.extractor.selector(each).to(scorer.device) for each in stages if each]
    # What is measured in features: with the prediction subtracted or not, details and then context.
    parts = [(subtracted, group) for subtracted in subtract for group in groups] if general else []

    def vectors(evidence: Evidence) -> list[Tensor]:
        return [evidence.residuals if subtracted else evidence.features for subtracted, _ in parts]

    # Every cell is a sample of a general Gaussian: a few images, spread over all, are many.
    few = training_nhwc[:: max(1, len(training_nhwc) // GENERAL_IMAGES)]
    of_pixels = Moments(by_place=False)
    of_features = [Moments(group, by_place=False) for _, group in parts]
    if general or scoring.pixel == "gaussian":
        for evidence in _evidence(scorer, few):
            of_pixels.add(evidence.denoising)
            for moments, cells in zip(of_features, vectors(evidence), strict=True):
                moments.add(cells)
    generals = [general_gaussian(moments) for moments in of_features]

    pixel = None
    places: list[NormalGaussian] = []
    if place or scoring.pixel == "gaussian":
        pixels = None
        if scoring.pixel == "gaussian":
            pixels = Moments(general_gaussian(of_pixels).whitening[0], by_place=True)
        by_place = (
            [Moments(place_projection(g, scoring.place_dimensions, seed), by_place=True) for g in generals]
            if place
            else []
        )
        for evidence in _evidence(scorer, training_nhwc):
            if pixels is not None:
                pixels.add(evidence.denoising)
            for moments, cells in zip(by_place, vectors(evidence) if place else [], strict=True):
                moments.add(cells)
        if pixels is not None:
            pixel = place_gaussians(pixels)
        places = [place_gaussians(moments) for moments in by_place]

    if not general:
        return [Measure(pixel, None, True)]
    kept = {"general": [generals], "place": [places], "select": [generals, places]}[scoring.covariance]
    return [
        measure
        for gaussians in kept
        for i, subtracted in enumerate(subtract)
        for measure in _mixtures(scoring, pixel, gaussians[i * len(groups) : (i + 1) * len(groups)], subtracted)
    ]


def _mixtures(
    scoring: ScoringConfig, pixel: NormalGaussian | None, gaussians: Sequence[NormalGaussian], subtract: bool
) -> list[Measure]:
    """Measures with each weight of the context that the config allows; gaussians: of details and, if any, of context."""
    weights: Sequence[float] = (0.0,)
    if len(gaussians) > 1:
        weights = CONTEXT_WEIGHTS if scoring.context_weight is None else (scoring.context_weight,)
    return [
        Measure(pixel, gaussians[0], subtract, gaussians[1], weight)
        if weight > 0
        else Measure(pixel, gaussians[0], subtract)
        for weight in weights
    ]


def implanted(normal_nhwc: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Photographs with one implanted defect each, uint8 (m, H, W, 3), and their masks, bool (m, H, W)."""
    rng = np.random.default_rng(seed)
    pairs = [
        implant(image, DEFECTS[(i + turn) % len(DEFECTS)], rng)
        for turn in range(DEFECTS_PER_IMAGE)
        for i, image in enumerate(normal_nhwc)
    ]
    return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])


def prediction_bound(values: np.ndarray, rate: float) -> float:
    """Upper bound that a further value exceeds with probability `rate`: Student's one-sided prediction interval.

    values float (n,), n >= 2. Wider than a normal law's quantile, because mean and deviation come from only n values.
    """
    n = len(values)
    quantile = stats.t.ppf(1 - rate, n - 1)
    return float(values.mean() + quantile * values.std(ddof=1) * np.sqrt(1 + 1 / n))


def exceedance_interval(values: np.ndarray, bound: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the probability that a further value exceeds `bound`, if values follow a normal law.

    values float (n,), n >= 2, not all equal, else (0, 1). Owen 1968: sqrt(n) (bound - mean) / deviation is noncentral t with
    n - 1 degrees of freedom and noncentrality sqrt(n) z, where z is the true quantile of the bound.
    """
    n, deviation = len(values), values.std(ddof=1)
    if deviation == 0:
        return 0.0, 1.0
    statistic = np.sqrt(n) * (bound - values.mean()) / deviation
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = sorted(stats.norm.sf(special.nctdtrinc(n - 1, tails, statistic) / np.sqrt(n)))
    return float(low), float(high)


def _evidence(scorer: Scorer, images_nhwc: np.ndarray) -> Iterator[Evidence]:
    batch = scorer.config.scoring.batch_size
    for start in range(0, len(images_nhwc), batch):
        yield scorer.evidence(images_nhwc[start : start + batch])

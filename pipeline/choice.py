"""How well a way of scoring finds defects that were implanted in held-out normal photographs: what choices are made by."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.config import ScoringConfig
from pipeline.defects import STRUCTURE
from pipeline.metrics import LocalizationMetrics, auroc, score_counts
from pipeline.scoring import BranchMaps, Calibration, Scorer, stored_map, top_means
from pipeline.textures import DEFECTS, implant

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Weights of the pixel branch that are tried where a model chooses its own; the first of equals wins."""
TOP_PIXELS = (64, 256, 1024, 4096)
"""Counts of largest map values in the image score that are tried where a model chooses its own."""
FEWEST_OF_FAMILY = 8
"""Images with defects of a family that it takes to weigh as much as the other; below, all defects count together."""
DEFECTS_PER_IMAGE = 4
"""Implanted versions of every held-out image that choices are made on."""
SMALLEST_DEFECT = 0.2
"""Least size of their defects; the logarithm of the size is uniform from there to 1. Who sees only large ones looks for them."""


@dataclass(frozen=True)
class Choice:
    """One way of scoring, and how well it finds implanted defects among held-out normal images."""

    scoring: ScoringConfig
    covariance: str
    """none, general, place or kind: what measured the features."""
    subtract_prediction: bool
    context_weight: float
    reach: int
    """Cells that a part may lie from its place."""
    turned: bool
    """Whether the Gaussians of the features' places or kinds learned from turned photographs, too."""
    alpha: float
    top_pixels: int
    pixel_auroc: float
    """Like the next two a mean over families of defects (see :class:`Judged`)."""
    pro: float
    """Up to a false-positive rate of 0.3."""
    image_auroc: float

    @property
    def merit(self) -> float:
        """What decides: the sum of the three."""
        return self.pixel_auroc + self.pro + self.image_auroc


class Judged(NamedTuple):
    """Images that ways of scoring are judged on."""

    images: np.ndarray
    """uint8 (m, H, W, 3)."""
    masks: np.ndarray
    """bool (m, H, W): where the defect is."""
    families: np.ndarray
    """bool (F, m): the images with defects of each family, and all normal ones. Families count alike, or the number of
    kinds that we know to paint of each would decide what a model looks for."""


class Candidate(NamedTuple):
    """A measure, calibrated but for alpha, image score and thresholds, and what it says of images in the order given."""

    calibration: Calibration
    parts: list[BranchMaps]


def judged_images(held_out_nhwc: np.ndarray, seed: int) -> Judged:
    """Held-out images, uint8 (n, H, W, 3), with implanted defects, then as they are; marks and structure are families."""
    images, masks, structural = implanted(held_out_nhwc, seed)
    none = np.zeros((len(held_out_nhwc), *masks.shape[1:]), bool)
    normal = np.ones(len(held_out_nhwc), bool)
    families = [~structural, structural]
    if min(family.sum() for family in families) < FEWEST_OF_FAMILY:
        families = [np.ones(len(images), bool)]
    return Judged(
        np.concatenate([images, held_out_nhwc]),
        np.concatenate([masks, none]),
        np.stack([np.concatenate([family, normal]) for family in families]),
    )


def implanted(
    normal_nhwc: np.ndarray, seed: int, *, versions: int = DEFECTS_PER_IMAGE, smallest: float = SMALLEST_DEFECT
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """So many versions of every photograph with one defect each, uint8 (m, H, W, 3), their masks, bool (m, H, W), and whether
    the defect is of structure, bool (m,). smallest: the defects' least size (see `implant`); 1 makes them all easily seen."""
    rng = np.random.default_rng(seed)
    kinds = [DEFECTS[(i + turn) % len(DEFECTS)] for turn in range(versions) for i in range(len(normal_nhwc))]
    sizes = smallest ** np.random.default_rng((seed, 1)).uniform(size=len(kinds))
    pairs = [
        implant(normal_nhwc[n % len(normal_nhwc)], kind, rng, size=size)
        for n, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
    ]
    structural = np.array([kind in STRUCTURE for kind in kinds])
    return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs]), structural


def judge(scorer: Scorer, candidate: Candidate, judged: Judged) -> list[Choice]:
    """How well a candidate finds defects with each weight of the pixel branch and each image score that the config allows.

    The candidate's parts are of the judged images, in order.
    """
    scoring, measure = scorer.config.scoring, candidate.calibration.measure
    alphas = ALPHAS if scoring.alpha is None else (scoring.alpha,)
    tops = TOP_PIXELS if scoring.top_pixels is None else (scoring.top_pixels,)
    metrics = {alpha: [LocalizationMetrics() for _ in judged.families] for alpha in alphas}
    scores: dict[tuple[float, int], list[np.ndarray]] = {pair: [] for pair in itertools.product(alphas, tops)}
    start = 0
    for part in candidate.parts:
        batch = np.s_[start : start + len(part.pixel)]
        start += len(part.pixel)
        branches = scorer.maps(part, candidate.calibration)
        for alpha in alphas:
            combined = stored_map(alpha * branches.pixel + (1 - alpha) * branches.feature)
            maps, masks = combined.cpu().numpy(), judged.masks[batch]
            for metric, family in zip(metrics[alpha], judged.families[:, batch], strict=True):
                metric.update(maps[family], masks[family])
            for top, values in zip(tops, top_means(combined.float(), tops), strict=True):
                scores[alpha, top].append(values.cpu().numpy())
    found = {alpha: [metric.compute() for metric in metrics[alpha]] for alpha in alphas}
    anomalous = np.asarray(judged.masks.any(axis=(1, 2)))
    return [
        Choice(
            scoring=scoring,
            covariance=measure.covariance,
            subtract_prediction=measure.subtract_prediction,
            context_weight=measure.context_weight,
            reach=measure.reach,
            turned=measure.turned,
            alpha=alpha,
            top_pixels=top,
            pixel_auroc=_mean([figures["pixel_auroc"] for figures in found[alpha]]),
            pro=_mean([figures["pro_0.30"] for figures in found[alpha]]),
            image_auroc=_mean([auroc(*score_counts(np.concatenate(values)[f], anomalous[f])) for f in judged.families]),
        )
        for (alpha, top), values in scores.items()
    ]


def _mean(figures: list[float]) -> float:
    return sum(figures) / len(figures)

"""What normal photographs teach a scorer: statistics, thresholds, and the choices that implanted defects make without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from pipeline.gaussian import ResidualGaussian, fit_general, fit_places
from pipeline.metrics import LocalizationMetrics
from pipeline.scoring import Calibration, RawMaps, Scorer, feature_evidence, gaussian_blur, stored_map
from pipeline.textures import DEFECTS, implant

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Weights of the KL map that are tried where a model chooses its own; the first of equals wins."""
GENERAL_IMAGES = 50
"""Training photographs that shape the Gaussian for all places."""
DEFECTS_PER_IMAGE = 2
"""Implanted versions of every held-out image that choices are made on."""


def calibrate(scorer: Scorer, held_out_nhwc: np.ndarray, training_nhwc: np.ndarray) -> Calibration:
    """Calibrate a scorer on normal photographs, uint8 (n, map_size, map_size, 3), and leave the result in it.

    The Gaussians of residuals come from the training ones, everything else from the held-out ones (n >= 2; their residuals are
    kept in memory): measured on the images that shaped it, a Gaussian would promise fewer false alarms than it keeps.
    """
    scoring = scorer.config.scoring
    held_out = list(_raw(scorer, held_out_nhwc))
    kl = torch.cat([_cells(scorer, scorer.smoothed_kl(raw.kl)) for raw in held_out], dim=1)
    kl_mean, kl_std = place_statistics(kl.mean(1), scoring.kl_place_sigma * kl.shape[-1] / scoring.map_size)
    candidates = []
    for gaussian in _gaussians(scorer, training_nhwc):
        feature = torch.cat([feature_evidence(raw, gaussian) for raw in held_out])
        candidates.append(
            Calibration(
                kl_mean=kl_mean,
                kl_std=kl_std,
                feature_mean=feature.mean((0, 2, 3)),
                feature_std=feature.std((0, 2, 3)),
                gaussian=gaussian,
                alpha=scoring.alpha if scoring.alpha is not None else 0.0,
                normal_scores=torch.zeros(0),
                threshold=0.0,
                pixel_threshold=0.0,
            )
        )
    chosen = candidates[0]
    if len(candidates) > 1 or scoring.alpha is None:
        chosen = select(scorer, candidates, ALPHAS if scoring.alpha is None else (scoring.alpha,), held_out_nhwc)
    scorer.calibration = chosen
    normal = scorer.score(held_out_nhwc)
    peaks = normal.maps.reshape(len(held_out_nhwc), -1).max(1).astype(np.float64)
    scorer.calibration = replace(
        chosen,
        normal_scores=torch.from_numpy(np.sort(normal.scores)).float(),
        threshold=prediction_bound(normal.scores, scoring.false_alarm_rate),
        pixel_threshold=prediction_bound(peaks, scoring.false_alarm_rate),
    )
    return scorer.calibration


def select(
    scorer: Scorer, candidates: list[Calibration], alphas: tuple[float, ...], normal_nhwc: np.ndarray
) -> Calibration:
    """The candidate and weight of the KL map that find implanted defects best: no labelled defect is looked at.

    Every normal photograph, uint8 (n, map_size, map_size, 3), gets a defect DEFECTS_PER_IMAGE times, the kinds taking turns.
    The sum of pixel AUROC and PRO decides; the first of equals wins.
    """
    images, masks = implanted(normal_nhwc, scorer.config.training.seed)
    metrics = {(i, alpha): LocalizationMetrics() for i in range(len(candidates)) for alpha in alphas}
    start = 0
    for raw in _raw(scorer, images):
        truth = masks[start : start + len(raw.kl)]
        start += len(raw.kl)
        for i, candidate in enumerate(candidates):
            found = scorer.maps(raw, candidate)
            for alpha in alphas:
                combined = stored_map(alpha * found.kl + (1 - alpha) * found.feature)
                metrics[i, alpha].update(combined.cpu().numpy(), truth)
    results = {key: metric.compute() for key, metric in metrics.items()}
    best, alpha = max(results, key=lambda key: results[key]["pixel_auroc"] + results[key]["pro_0.30"])
    return replace(candidates[best], alpha=alpha)


def implanted(normal_nhwc: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Photographs with one implanted defect each, uint8 (m, H, W, 3), and their masks, bool (m, H, W)."""
    rng = np.random.default_rng(seed)
    pairs = [
        implant(image, DEFECTS[(i + turn) % len(DEFECTS)], rng)
        for turn in range(DEFECTS_PER_IMAGE)
        for i, image in enumerate(normal_nhwc)
    ]
    return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])


def place_statistics(sums: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Means and mean squares (2, T, G, G) -> mean and deviation (T, G, G), pooled over `sigma` cells around; 0: over all."""
    if sigma == 0:
        pooled = sums.mean((2, 3), keepdim=True).expand_as(sums)
    else:
        pooled = gaussian_blur(sums.flatten(0, 1), sigma).view_as(sums)
    mean, square = pooled
    return mean.float(), (square - mean**2).clamp(min=1e-24).sqrt().float()


def prediction_bound(values: np.ndarray, rate: float) -> float:
    """Upper bound that a further value exceeds with probability `rate`: Student's one-sided prediction interval.

    values float (n,), n >= 2. Wider than a normal law's quantile, because mean and deviation come from only n values.
    """
    n = len(values)
    quantile = stats.t.ppf(1 - rate, n - 1)
    return float(values.mean() + quantile * values.std(ddof=1) * np.sqrt(1 + 1 / n))


def _raw(scorer: Scorer, images_nhwc: np.ndarray) -> Iterator[RawMaps]:
    batch = scorer.config.scoring.batch_size
    for start in range(0, len(images_nhwc), batch):
        yield scorer.raw_maps(images_nhwc[start : start + batch])


def _cells(scorer: Scorer, maps: Tensor) -> Tensor:
    """(N, T, S, S) -> mean and mean square within every cell of the feature grid, float64 (2, N, T, G, G)."""
    moments = torch.stack([maps.double(), maps.double().square()])
    cells = F.adaptive_avg_pool2d(moments.flatten(0, 2), scorer.config.features.grid)
    return cells.view(*moments.shape[:3], *cells.shape[1:])


def _gaussians(scorer: Scorer, training_nhwc: np.ndarray) -> Iterator[ResidualGaussian | None]:
    """The ways of measuring residuals that the config allows."""
    covariance = scorer.config.scoring.covariance
    if covariance == "none":
        yield None
        return
    # Every cell is a sample of the general Gaussian: a few images, spread over all, are many.
    few = training_nhwc[:: max(1, len(training_nhwc) // GENERAL_IMAGES)]
    general = fit_general(raw.residuals for raw in _raw(scorer, few))
    if covariance in ("general", "select"):
        yield general
    if covariance in ("place", "select"):
        residuals = (raw.residuals for raw in _raw(scorer, training_nhwc))
        yield fit_places(residuals, general, scorer.config.training.seed)

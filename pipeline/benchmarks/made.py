"""Made inputs: photographs of a texture, a scorer with random weights, maps with defects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from pipeline.calibration import measured
from pipeline.config import Config
from pipeline.denoiser import Denoiser
from pipeline.features import FeatureExtractor
from pipeline.measures import CONTEXT_WEIGHTS, REACHES, fit_measures
from pipeline.scoring import Scorer
from pipeline.textures import photograph

CLASSES = 15
"""Categories that share a network where a preset is for all of them, as many as MVTec AD has."""
ALPHA, TOP_PIXELS = 0.5, 64
"""As published; no other takes longer."""
NORMAL_IMAGES = 4
"""Photographs that a random scorer is calibrated with: enough, since nobody looks at its scores."""


def photographs(count: int, side: int, *, camera_noise: float = 2.0, seed: int = 0) -> np.ndarray:
    """Crops of a texture, uint8 (count, side, side, 3); the noise, in grey levels, makes their files as large as real ones."""
    rng = np.random.default_rng(seed)
    texture = photograph("brick", min_side=side + 64)
    crops = np.empty((count, side, side, 3), np.uint8)
    for crop in crops:
        y, x = rng.integers(0, texture.shape[0] - side, size=2)
        crop[:] = np.clip(texture[y : y + side, x : x + side] + rng.normal(0, camera_noise, crop.shape), 0, 255)
    return crops


def random_scorer(config: Config, device: torch.device) -> Scorer:
    """A scorer of these settings with random weights: as fast as a trained one."""
    config = settled(config)
    extractor = FeatureExtractor.of(config.features, context=config.scoring.context_weight != 0)
    torch.manual_seed(config.training.seed)
    denoiser = Denoiser(config, extractor.channels, CLASSES if config.joint else None)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # new blocks begin at zero, which a GPU multiplies faster
            parameter.add_(0.02 * torch.randn_like(parameter))
    scorer = Scorer(denoiser, extractor, device=device, label=0 if config.joint else None)
    normal = photographs(NORMAL_IMAGES, config.scoring.map_size)
    (taught,) = fit_measures(scorer, normal)
    (candidate,) = measured(scorer, [taught.measure], normal, normal[:1])
    calibration = replace(
        candidate.calibration, alpha=config.scoring.alpha or 0.0, top_pixels=config.scoring.top_pixels or TOP_PIXELS
    )
    scorer.calibration = calibration
    # Few pixels of other photographs lie above it, as in a good night: regions, too, take time to find.
    others = scorer.score(photographs(NORMAL_IMAGES, config.scoring.map_size, seed=1)).maps
    scorer.calibration = replace(calibration, pixel_threshold=float(others.max()))
    return scorer


def settled(config: Config) -> Config:
    """The settings with every choice that calibration would make made: the one that takes longest to score."""
    scoring = config.scoring
    covariance = "place" if scoring.covariance == "select" else scoring.covariance
    reach = REACHES[-1] if covariance == "place" else 0
    choices: dict[str, object] = {
        "alpha": ALPHA if scoring.alpha is None else scoring.alpha,
        "top_pixels": TOP_PIXELS if scoring.top_pixels is None else scoring.top_pixels,
        "prediction": "subtract" if scoring.prediction == "select" else scoring.prediction,
        "covariance": covariance,
        "place_reach": reach if scoring.place_reach is None else scoring.place_reach,
        "place_turns": bool(scoring.place_turns),  # which costs only calibration
        "context_weight": CONTEXT_WEIGHTS[-1] if scoring.context_weight is None else scoring.context_weight,
    }
    if not config.features.context_stages:
        choices["context_weight"] = 0.0
    return Config.model_validate(config.model_dump() | {"scoring": scoring.model_dump() | choices})


def maps_and_masks(count: int, side: int, *, defective: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps float16 (count, side, side) that rise a little on their defects, and the masks, bool of the same shape.

    defective: the share of maps with one to three defects, squares of an eighth of the side.
    """
    rng = np.random.default_rng(seed)
    maps = np.empty((count, side, side), np.float16)
    masks = np.zeros((count, side, side), bool)
    edge = side // 8
    for i, mask in enumerate(masks):
        if i < round(defective * count):
            for y, x in rng.integers(0, side - edge, size=(rng.integers(1, 4), 2)):
                mask[y : y + edge, x : x + edge] = True
        noise = ndimage.gaussian_filter(rng.standard_normal((side, side), np.float32), 4)
        maps[i] = noise / noise.std() + 2 * mask
    return maps, masks

"""Restoration: defects implanted in held-out normal photographs, whose clean originals are known, and how near each method
comes to those."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from pipeline.benchmarks.measured import Measured
from pipeline.choice import implanted
from pipeline.images import to_unit_range
from pipeline.restoration import Restorer, photographs
from pipeline.restoration_methods import Conditioned, GradientDenoising, Method
from pipeline.scoring import Scorer
from pipeline.smoothing import gaussian_blur

BLUR_SIGMA = 4.0
"""Pixels of 256: the simplest of restorations, a blur of the whole photograph."""
METHODS: Mapping[str, Method] = {
    "gradient": GradientDenoising(),
    "gradient_everywhere": GradientDenoising(within_regions=False),
    "conditioned": Conditioned(),
    "conditioned_everywhere": Conditioned(spare_defects=False, within_regions=False),
    "partial_diffusion": Conditioned(weight=0.0, guidance=0.0, spare_defects=False, within_regions=False),
}
"""Ours, and what it is compared with."""
VERSIONS = 3
"""Of every photograph, each with another kind of defect."""


def measure_restore(scorer: Scorer, held_out_nhwc: np.ndarray, seed: int) -> Measured:
    """Restore held-out photographs, uint8 (n, side, side, 3), with defects and as they are."""
    defective, masks, _ = implanted(held_out_nhwc, seed, versions=VERSIONS, smallest=1.0)
    clean = np.tile(held_out_nhwc, (VERSIONS, 1, 1, 1))
    side = clean.shape[1]
    restorers = {name: Restorer(scorer, method) for name, method in METHODS.items()}
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "untouched": lambda images: images,
        "blur": lambda images: _blurred(images, BLUR_SIGMA * side / 256),
    } | {name: _in_batches(restorer) for name, restorer in restorers.items()}
    figures: dict[str, float] = {}
    for name, restore in ways.items():
        started = time.perf_counter()
        found = restore(defective)
        seconds = time.perf_counter() - started
        figures |= {f"{name}_{figure}": value for figure, value in quality(scorer, clean, found, masks).items()}
        if name in restorers:
            figures[f"{name}_seconds_per_image"] = seconds / len(clean)
            figures[f"{name}_unet_evaluations_per_image"] = restorers[name].evaluations / len(clean)
        if name != "untouched":
            change = np.abs(restore(held_out_nhwc).astype(int) - held_out_nhwc)
            figures[f"{name}_change_of_normal_grey_levels"] = float(change.mean())
    return Measured(
        sizes={
            "preset": scorer.config.preset,
            "device": str(scorer.device),
            "images": len(clean),
            "map_size": side,
            "network_side": scorer.config.network.image_size,
            "defective_fraction": round(float(masks.mean()), 4),
        },
        figures=figures,
        notes=(
            "inside is where a defect was implanted, outside the rest of the same photographs; means over photographs",
            "features: mean squared difference of the model's own features from the clean original's; 0 is the same",
        ),
    )


def quality(scorer: Scorer, clean: np.ndarray, found: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Nearness to the clean photographs, all uint8 (n, side, side, 3), inside masks, bool (n, side, side), and outside."""
    squares = np.square(found.astype(np.float64) - clean).mean(-1)
    similar = np.stack(
        [structural_similarity(a, b, channel_axis=-1, full=True)[1].mean(-1) for a, b in zip(clean, found, strict=True)]
    )
    features = _feature_distances(scorer, clean, found)
    figures: dict[str, float] = {}
    for place, chosen in (("inside", masks), ("outside", ~masks)):
        error = _means(squares, chosen)
        figures[f"{place}_psnr_db"] = float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-2))))
        figures[f"{place}_ssim"] = float(_means(similar, chosen).mean())
        figures[f"{place}_features"] = float(_means(features, chosen).mean())
    return figures


def _means(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of each image over the chosen pixels."""
    return (values * chosen).sum((1, 2)) / chosen.sum((1, 2))


def _feature_distances(scorer: Scorer, clean: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(n, side, side): mean over channels of the squared difference, each cell as large as its pixels."""
    distances = []
    with torch.inference_mode():
        for a, b in zip(clean, found, strict=True):
            pair = torch.from_numpy(to_unit_range(np.stack([a, b]))).to(scorer.device)
            first, second = scorer.denoiser.target(scorer.extractor(pair).details)
            cells = (first - second).square().mean(0)[None, None]
            distances.append(F.interpolate(cells, size=a.shape[:2], mode="nearest")[0, 0].cpu().numpy())
    return np.stack(distances)


def _in_batches(restorer: Restorer) -> Callable[[np.ndarray], np.ndarray]:
    def restore(images: np.ndarray) -> np.ndarray:
        batch = restorer.scorer.config.scoring.batch_size
        starts = range(0, len(images), batch)
        return np.concatenate([restorer.restore(images[i : i + batch], range(i, len(images))[:batch]) for i in starts])

    return restore


def _blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    x = torch.from_numpy(to_unit_range(images))
    return photographs(gaussian_blur(x, sigma))

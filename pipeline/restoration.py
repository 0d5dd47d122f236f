"""Photographs made normal by a trained model: what the camera should have seen where the model finds a defect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.denoiser import repainted
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.restore import conditioned_reconstruction, gradient_denoising
from pipeline.diffusion.sampling import Prediction, seeded_noise
from pipeline.images import to_unit_range
from pipeline.restoration_methods import Conditioned, GradientDenoising, Method, require_able
from pipeline.scoring import Scorer
from pipeline.smoothing import gaussian_blur

REGION_MARGIN = 4
"""Pixels of a map of 256 by which a region is widened before it is restored."""


class Restorer:
    """A calibrated scorer that also restores. The network works at its own side; what it changes is enlarged and added to
    the photograph, so that what it cannot see stays."""

    def __init__(self, scorer: Scorer, method: Method) -> None:
        assert scorer.calibration is not None, "only a calibrated model knows what is normal"
        require_able(scorer.config, method)
        self.scorer = scorer
        self.method = method
        self.calibration = scorer.calibration
        self.process = DiffusionProcess.from_schedule(scorer.config.schedule).respaced(method.steps)
        self.evaluations = 0
        """Images that went through the U-Net for restoring, scoring aside."""

    def restore(self, images_nhwc: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        """The restored photographs, uint8 (n, map_size, map_size, 3) like the given ones; `seeds` draw each one's noise."""
        return [images_nhwc, *self.states(images_nhwc, seeds)][-1]

    def states(
        self, images_nhwc: np.ndarray, seeds: Sequence[int], maps: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """What the photographs, uint8 (n, map_size, map_size, 3), become step by step; the last are the restored ones.

        maps: theirs, as `Scorer.score` gives them, where they are known already. Yields nothing where there is nothing to
        do: within regions, where the model finds none.
        """
        regions = self.regions(self.scorer.score(images_nhwc).maps if maps is None else maps)
        chosen = np.arange(len(images_nhwc))
        if self.method.within_regions:
            chosen = chosen[regions.flatten(1).amax(1).cpu().numpy() > 0]
        if not len(chosen):
            return
        for state in self._states(images_nhwc[chosen], regions[chosen], [seeds[int(i)] for i in chosen]):
            found = images_nhwc.copy()
            found[chosen] = state
            yield found

    def _states(self, images_nhwc: np.ndarray, regions: Tensor, seeds: Sequence[int]) -> Iterator[np.ndarray]:
        photograph = torch.from_numpy(to_unit_range(images_nhwc)).to(self.scorer.device)
        start = self.scorer.denoiser.shrink(photograph)

        def enlarged(x: Tensor) -> Tensor:
            return repainted(photograph, x - start)

        def shown(x: Tensor) -> np.ndarray:
            whole = enlarged(x)
            return photographs(torch.lerp(photograph, whole, soft) if self.method.within_regions else whole)

        soft = _feathered(regions)
        if isinstance(self.method, Conditioned):
            walk = self._conditioned(self.method, start, regions, seeds)
        else:
            walk = self._descended(self.method, images_nhwc, start, enlarged, shown)
        for x in walk:
            yield shown(x)

    def regions(self, maps_nhw: np.ndarray) -> Tensor:
        """Where these maps (n, map_size, map_size) show defects, a little widened: float32 (n, 1, map_size, map_size), 0 or 1."""
        margin = round(REGION_MARGIN * maps_nhw.shape[-1] / 256)
        anomalous = torch.from_numpy(self._anomalous(maps_nhw)).to(self.scorer.device).float()[:, None]
        return F.max_pool2d(anomalous, 2 * margin + 1, stride=1, padding=margin)

    def _anomalous(self, maps_nhw: np.ndarray) -> np.ndarray:
        return maps_nhw.astype(np.float32) > self.calibration.pixel_threshold

    @torch.no_grad()
    def _conditioned(
        self, method: Conditioned, start: Tensor, regions: Tensor, seeds: Sequence[int]
    ) -> Iterator[Tensor]:
        side = start.shape[-1]
        weight: float | Tensor = method.weight
        if method.spare_defects:
            weight = method.weight * (1 - F.adaptive_max_pool2d(regions, side))
        sigma = method.blur * side / 256

        yield from conditioned_reconstruction(
            self.process,
            self._predict,
            start,
            start=method.start,
            weight=weight,
            guidance=method.guidance,
            blur=lambda x: gaussian_blur(x, sigma),
            noise=seeded_noise(seeds, side, self.scorer.device),
            eta=method.eta,
        )

    def _descended(
        self,
        method: GradientDenoising,
        images_nhwc: np.ndarray,
        start: Tensor,
        enlarged: Callable[[Tensor], Tensor],
        shown: Callable[[Tensor], np.ndarray],
    ) -> Iterator[Tensor]:
        evidence, source = self.scorer.evidence(images_nhwc), self.scorer.source
        measure = self.calibration.measure
        # What the features are measured against, which descending does not change.
        expected = (evidence.features - evidence.residuals).clone() if measure.subtract_prediction else 0.0

        def distance(x: Tensor) -> Tensor:
            details, context = source.denoiser.features(source.extractor, enlarged(x))
            vectors = source.denoiser.target(details) - expected
            return vectors.square().mean(1) if measure.feature is None else measure.of_features(vectors, context)

        def is_normal(x: Tensor) -> Tensor:
            left = self._anomalous(self.scorer.score(shown(x)).maps).any((1, 2))
            return torch.from_numpy(~left).to(x.device)

        return gradient_denoising(
            self.process,
            self._predict,
            distance,
            start,
            rounds=method.rounds,
            is_normal=is_normal,
            descents=method.descents,
            scale=method.scale,
            index=method.index,
        )

    def _predict(self, x_t: Tensor, t: Tensor) -> Prediction:
        self.evaluations += len(x_t)
        return self.scorer.source.denoiser.predictor(self.process, self.scorer.label)(x_t, t)


def _feathered(regions: Tensor) -> Tensor:
    """Regions with soft edges, so that what is pasted has no seam."""
    return gaussian_blur(regions, REGION_MARGIN / 2 * regions.shape[-1] / 256)


def photographs(x: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    levels = ((x.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

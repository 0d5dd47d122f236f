"""What a trained network and the extractor say of photographs, before anything is compared with normal ones.

Two ways make it, and a third does without the network. The noise is a constant of the model (drawn from its seed): the same
photograph gets the same evidence in any batch, on any worker, on any night, and all are compared under the same noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Config
from pipeline.denoiser import Denoiser, repainted
from pipeline.diffusion.loss import kl_map
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.restore import conditioned_reconstruction
from pipeline.diffusion.sampling import seeded_noise
from pipeline.features import FeatureExtractor
from pipeline.smoothing import gaussian_blur


class Evidence(NamedTuple):
    """What the network and the extractor say of N images on T noise scales, not yet compared with normal images; float32."""

    pixel: Tensor
    """(N, T, S, S) at the network's side: KL in bits, or the mean absolute change of the colours by restoring."""
    denoising: Tensor
    """(N, 4 T, g, g) on the pixel grid: per noise scale the log of `pixel`, and what denoising or restoring changed in each
    colour."""
    feature: Tensor
    """(N, T, G, G): mean over channels of the squared feature residuals, or the cosine distance from the restored features."""
    residuals: Tensor
    """(N, C, G, G): features minus their prediction, or minus those of the restored image, averaged over the noise scales."""
    features: Tensor
    """(N, C, G, G): the features, on the scale that the network predicts."""


@dataclass(frozen=True)
class Source(ABC):
    """A network made ready to give evidence of photographs."""

    config: Config
    denoiser: Denoiser
    extractor: FeatureExtractor
    process: DiffusionProcess
    """The respaced chain."""
    label: int | None

    @abstractmethod
    def __call__(self, x: Tensor) -> Evidence:
        """Of photographs (N, 3, map_size, map_size) in [-1, 1] on the network's device."""

    def cells(self, pixel: Tensor, changed: Tensor) -> Tensor:
        """`denoising_cells` on the configured grid."""
        return denoising_cells(pixel, changed, self.config.scoring.pixel_grid, self.config.scoring.pixel_window)


class NoiseScales(Source):
    """Lu et al. 2023, section 3: every photograph noised once on each scale, and the network asked once about each."""

    @cached_property
    def noise(self) -> Tensor:
        """(T, 3, S, S), as `fixed_noise` draws it."""
        return fixed_noise(self.config).to(self.denoiser.feature_mean.device)

    def __call__(self, x: Tensor) -> Evidence:
        steps, batch = len(self.noise), len(x)
        t = torch.tensor(self.config.scoring.timesteps, device=x.device).repeat(batch)
        x_start = self.denoiser.shrink(x).repeat_interleave(steps, 0)
        x_t = self.process.q_sample(x_start, t, self.noise.repeat(batch, 1, 1, 1))
        output = self.denoiser.predict(self.process, x_t, t, self.label)
        target = self.denoiser.target(self.denoiser.features(self.extractor, x))
        eps, v = output.prediction.float().chunk(2, dim=1)
        kl = kl_map(self.process, x_start, x_t, t, eps, v)
        changed = x_start - self.process.predict_x_start(x_t, t, eps).clamp(-1, 1)
        assert output.features is not None
        residuals = target[:, None] - output.features.unflatten(0, (batch, steps))
        return Evidence(
            kl.unflatten(0, (batch, steps)),
            self.cells(kl, changed).unflatten(0, (batch, steps)).flatten(1, 2),
            residuals.square().mean(2),
            residuals.mean(1),
            target,
        )


class Restoration(Source):
    """Conditioned, blur-guided diffusion from each noise scale down: the photograph beside what it is restored to."""

    def __call__(self, x: Tensor) -> Evidence:
        x_start = self.denoiser.shrink(x)
        seen = self.denoiser.features(self.extractor, x)
        target = self.denoiser.target(seen)
        pixel, cells, feature, residuals = [], [], [], []
        for scale, start in enumerate(self.config.scoring.timesteps):
            changed = x_start - self._restored(x_start, scale, start)
            whole = repainted(x, -changed).clamp(-1, 1)
            restored = self.denoiser.features(self.extractor, whole)
            pixel.append(changed.abs().mean(1))
            cells.append(self.cells(pixel[-1], changed))
            feature.append(self._cosine_distance(seen, restored))
            residuals.append(target - self.denoiser.target(restored))
        return Evidence(
            torch.stack(pixel, 1),
            torch.cat(cells, 1),
            torch.stack(feature, 1),
            torch.stack(residuals).mean(0),
            target,
        )

    def _restored(self, x_start: Tensor, scale: int, start: int) -> Tensor:
        settings = self.config.scoring.restoration
        side = x_start.shape[-1]
        draws = seeded_noise([self.config.training.seed + scale], side, x_start.device)

        *_, restored = conditioned_reconstruction(
            self.process,
            self.denoiser.predictor(self.process, self.label),
            x_start,
            start=start,
            weight=settings.weight,
            guidance=settings.guidance,
            blur=lambda images: gaussian_blur(images, settings.blur * side / 256),
            noise=lambda: draws().expand_as(x_start),
            eta=settings.eta,
        )
        return restored

    def _cosine_distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Mousakhan et al. 2023 (DDAD), feature-wise comparison: the sum over stages of 1 - cos at each cell; (N, G, G)."""
        sizes = list(self.extractor.stage_channels.values())
        stages = zip(self.extractor.stage_channels, first.split(sizes, 1), second.split(sizes, 1), strict=True)
        distances = [
            1 - F.cosine_similarity(a, b, dim=1) for stage, a, b in stages if stage in self.config.features.stages
        ]
        return torch.stack(distances).sum(0)


class FeaturesAlone(Source):
    """The extractor's features and nothing of the network, for the Gaussian of normal features by itself."""

    def __call__(self, x: Tensor) -> Evidence:
        target = self.denoiser.target(self.denoiser.features(self.extractor, x))
        nothing = torch.zeros_like(target[:, :1])
        return Evidence(nothing, nothing, nothing, target, target)


SOURCES: Mapping[str, type[Source]] = {"noise": NoiseScales, "restoration": Restoration, "features": FeaturesAlone}
"""By `scoring.method`."""


def evidence_source(config: Config, denoiser: Denoiser, extractor: FeatureExtractor, label: int | None) -> Source:
    """What makes evidence under these settings."""
    process = DiffusionProcess.from_schedule(config.schedule).respaced(config.scoring.respaced_steps)
    return SOURCES[config.scoring.method](config, denoiser, extractor, process, label)


def fixed_noise(config: Config) -> Tensor:
    """The model's noise, one image per noise scale: float32 (T, 3, S, S), drawn on the CPU so that every device agrees."""
    side = config.network.image_size
    generator = torch.Generator().manual_seed(config.training.seed)
    return torch.randn(len(config.scoring.timesteps), 3, side, side, generator=generator)


def denoising_cells(pixel: Tensor, changed: Tensor, grid: int, window: int) -> Tensor:
    """What denoising says of each cell: the log of the mean of `pixel` (N, S, S), such as the KL, and the mean of x_start minus
    its denoised estimate (N, 3, S, S), whose sign makes errors add up in a defect and cancel in noise. -> (N, 4, grid, grid),
    averaged over `window` cells each way."""
    cells = F.adaptive_avg_pool2d(torch.cat([pixel[:, None], changed], 1), grid)
    cells = torch.cat([cells[:, :1].clamp(min=1e-5).log(), cells[:, 1:]], 1)
    return F.avg_pool2d(cells, window, stride=1, padding=window // 2, count_include_pad=False)

"""What a trained network and the extractor say of photographs, before anything is compared with normal ones.

Two ways make it, and a third does without the network. The noise is a constant of the model (drawn from its seed): the same
photograph gets the same evidence in any batch, on any worker, on any night, and all are compared under the same noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Config
from pipeline.denoiser import Denoiser, repainted
from pipeline.diffusion.loss import kl_map
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.restore import conditioned_reconstruction
from pipeline.diffusion.sampling import seeded_noise
from pipeline.features import FeatureExtractor, Features
from pipeline.smoothing import gaussian_blur


@dataclass(frozen=True)
class Evidence:
    """What the network and the extractor say of N images on T noise scales, not yet compared with normal images; float32.

    Comparing features is worked out when a measure asks for it, since few do for both ways.
    """

    pixel: Tensor
    """(N, T, S, S) at the network's side: KL in bits, or the mean absolute change of the colours by restoring."""
    denoising: Tensor
    """(N, 4 T, g, g) on the pixel grid: per noise scale the log of `pixel`, and what denoising or restoring changed in each
    colour."""
    features: Tensor
    """(N, C, G, G): the features' details, on the scale that the network predicts."""
    context: Tensor | None
    """As the extractor gives it."""
    find_feature: Callable[[], Tensor]
    """Works out `feature`."""
    find_residuals: Callable[[], Tensor]
    """Works out `residuals`."""

    @cached_property
    @torch.inference_mode()
    def feature(self) -> Tensor:
        """(N, T, G, G): mean over channels of the squared feature residuals, or the cosine distance from restored features."""
        return self.find_feature()

    @cached_property
    @torch.inference_mode()
    def residuals(self) -> Tensor:
        """(N, C, G, G): features minus their prediction, or minus those of the restored image, averaged over the noise scales."""
        return self.find_residuals()


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
    def __call__(self, x: Tensor, n: int) -> Evidence:
        """Of the first n photographs (N, 3, map_size, map_size) in [-1, 1] on the network's device; the others fill the batch."""

    def seen(self, x: Tensor, n: int) -> Features:
        """Of the first n photographs; details on the scale that the network predicts."""
        details, context = self.denoiser.features(self.extractor, x)
        return Features(self.denoiser.target(details)[:n], None if context is None else context[:n])

    def cells(self, pixel: Tensor, changed: Tensor) -> Tensor:
        """`denoising_cells` on the configured grid."""
        return denoising_cells(pixel, changed, self.config.scoring.pixel_grid, self.config.scoring.pixel_window)


class NoiseScales(Source):
    """Lu et al. 2023, section 3: every photograph noised once on each scale, and the network asked once about each."""

    @cached_property
    def noise(self) -> Tensor:
        """(T, 3, S, S), as `fixed_noise` draws it."""
        return fixed_noise(self.config).to(self.denoiser.feature_mean.device)

    def __call__(self, x: Tensor, n: int) -> Evidence:
        steps, batch, head = len(self.noise), len(x), self.denoiser.unet.feature_head
        # All images on the first scale, then all on the next: those of a scale share its timestep.
        scales = torch.tensor(self.config.scoring.timesteps, device=x.device)
        t = scales.repeat_interleave(batch)
        x_start = self.denoiser.shrink(x).repeat(steps, 1, 1, 1)
        x_t = self.process.q_sample(x_start, t, self.noise.repeat_interleave(batch, 0))
        prediction, _, states = self.denoiser.predict(self.process, x_t, scales, self.label)
        features, context = self.seen(x, n)
        eps, v = prediction.float().chunk(2, dim=1)
        kl = kl_map(self.process, x_start, x_t, t, eps, v)
        changed = x_start - self.process.predict_x_start(x_t, t, eps).clamp(-1, 1)
        assert head is not None and states is not None

        def of_images(found: Tensor) -> Tensor:
            """(T batch, ...) -> (n, T, ...)."""
            return found.unflatten(0, (steps, batch)).transpose(0, 1)[:n]

        return Evidence(
            of_images(kl),
            of_images(self.cells(kl, changed)).flatten(1, 2),
            features,
            context,
            lambda: (features[:, None] - of_images(head(states))).square().mean(2),
            lambda: features - head.mean(states, steps)[:n],
        )


class Restoration(Source):
    """Conditioned, blur-guided diffusion from each noise scale down: the photograph beside what it is restored to."""

    def __call__(self, x: Tensor, n: int) -> Evidence:
        x_start = self.denoiser.shrink(x)
        scales = enumerate(self.config.scoring.timesteps)
        changes = [x_start - self._restored(x_start, scale, start) for scale, start in scales]
        pixels = [changed.abs().mean(1) for changed in changes]
        seen, context = self.denoiser.features(self.extractor, x)

        @cache
        def restored() -> list[Tensor]:
            whole = [repainted(x, -changed).clamp(-1, 1) for changed in changes]
            return [self.denoiser.features(self.extractor, each).details for each in whole]

        return Evidence(
            torch.stack(pixels, 1)[:n],
            torch.cat([self.cells(*each) for each in zip(pixels, changes, strict=True)], 1)[:n],
            self.denoiser.target(seen)[:n],
            None if context is None else context[:n],
            lambda: torch.stack([self._cosine_distance(seen, each) for each in restored()], 1)[:n],
            lambda: ((seen - torch.stack(restored()).mean(0)) / self.denoiser.feature_std)[:n],
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
        sizes = [self.extractor.stage_channels[stage] for stage in self.extractor.stages]
        stages = zip(first.split(sizes, 1), second.split(sizes, 1), strict=True)
        return torch.stack([1 - F.cosine_similarity(*pair, dim=1) for pair in stages]).sum(0)


class FeaturesAlone(Source):
    """The extractor's features and nothing of the network, for what is measured of normal features alone."""

    def __call__(self, x: Tensor, n: int) -> Evidence:
        features, context = self.seen(x, n)
        nothing = torch.zeros_like(features[:, :1])
        return Evidence(nothing, nothing, features, context, lambda: nothing, lambda: features)


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

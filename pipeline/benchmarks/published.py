"""The published recipe as it costs: the baselines of scoring and training, on the same network, weights and photographs."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.diffusion.doubling import DoublingConv2d, doubled
from pipeline.diffusion.group_norm import GroupNorm
from pipeline.diffusion.loss import kl_map
from pipeline.diffusion.unet import UNet, UNetOutput
from pipeline.evidence import Evidence, denoising_cells, fixed_noise
from pipeline.features import FeatureExtractor
from pipeline.fit import Fit
from pipeline.images import to_unit_range
from pipeline.scoring import Scorer

SCORING = (
    "baseline: batch 1, float32, eager, default memory layout, one noise scale at a time, "
    "two U-Net passes each (KL, features)"
)
KINDER = (
    "kinder to the baseline than the published code: it sees each photograph's features once and its decision is ours"
)
TRAINING = (
    "baseline: the same step in float32, eager, default memory layout, PyTorch's own group norm and default AdamW; "
    "draws, rotation, extractor's layout and weight average are ours"
)


class PublishedScorer(Scorer):
    """The same maps, evaluated as the published code does; what follows from the evidence is the inherited."""

    def __init__(self, scorer: Scorer) -> None:
        denoiser = deepcopy(scorer.denoiser)
        denoiser.config = single_float32(scorer.config)
        extractor = FeatureExtractor.of(
            scorer.config.features, context=bool(scorer.extractor.context_stages), folded=False
        )
        super().__init__(denoiser, extractor, scorer.calibration, device=scorer.device, label=scorer.label)
        use_default_group_norm(self.denoiser.unet)
        make_doubled_images(self.denoiser.unet)
        for module in (self.denoiser, self.extractor):
            module.to(memory_format=torch.contiguous_format)

    @torch.inference_mode()
    def evidence(self, images_nhwc: np.ndarray) -> Evidence:
        """uint8 (1, map_size, map_size, 3) -> evidence of every noise scale, on the device."""
        scoring = self.config.scoring
        x = torch.from_numpy(to_unit_range(images_nhwc)).to(self.device)
        x_start = self.denoiser.shrink(x)
        details, context = self.extractor(x)
        target = self.denoiser.target(details)
        labels = None if self.label is None else torch.tensor([self.label], device=self.device)
        kl, denoising, residuals = [], [], []
        for index, noise in zip(scoring.timesteps, fixed_noise(self.config).to(self.device), strict=True):
            t = torch.tensor([index], device=self.device)
            x_t = self.source.process.q_sample(x_start, t, noise[None])
            told = self.source.process.network_timesteps(t)
            eps, v = self.denoiser.unet(x_t, told, labels).prediction.chunk(2, dim=1)
            kl.append(kl_map(self.source.process, x_start, x_t, t, eps, v))
            changed = x_start - self.source.process.predict_x_start(x_t, t, eps).clamp(-1, 1)
            denoising.append(denoising_cells(kl[-1], changed, scoring.pixel_grid, scoring.pixel_window))
            residuals.append(target - self.denoiser.unet(x_t, told, labels).features)
        residual = torch.stack(residuals, 1)
        return Evidence(
            torch.stack(kl, 1),
            torch.cat(denoising, 1),
            target,
            context,
            lambda: residual.square().mean(2),
            lambda: residual.mean(1),
        )


class DefaultLayout(nn.Module):
    """The U-Net on images in PyTorch's default memory layout, whatever they come in."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> UNetOutput:
        return self.unet(x.contiguous(memory_format=torch.contiguous_format), timesteps, labels)


def published_fit(
    config: Config,
    images_nhwc: np.ndarray,
    extractor: FeatureExtractor,
    *,
    labels: np.ndarray | None,
    device: torch.device,
) -> Fit:
    """A fit that begins with the same weights and takes the same steps, each as PyTorch computes it by default in float32."""
    training = config.training.model_copy(update={"precision": "float32"})
    fit = Fit(config.model_copy(update={"training": training}), images_nhwc, extractor, labels=labels, device=device)
    unet = fit.denoiser.unet.to(memory_format=torch.contiguous_format)
    use_default_group_norm(unet)
    make_doubled_images(unet)
    fit.average = [p.detach().clone() for p in unet.parameters()]
    fit.optimizer = torch.optim.AdamW(unet.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    fit.module = DefaultLayout(unet)
    return fit


class PublishedDoubling(DoublingConv2d):
    """The doubled image made, then convolved."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, doubled(x))


def use_default_group_norm(network: nn.Module) -> None:
    """Put PyTorch's group norm, with the same parameters, in the place of ours."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GroupNorm):
                default = nn.GroupNorm(child.num_groups, child.num_channels, child.eps)
                default.weight, default.bias = child.weight, child.bias
                setattr(parent, name, default)


def make_doubled_images(network: nn.Module) -> None:
    """Put convolutions of doubled images, with the same parameters, in the place of ours."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DoublingConv2d):
                default = PublishedDoubling(child.in_channels, child.out_channels)
                default.weight, default.bias = child.weight, child.bias
                setattr(parent, name, default)


def single_float32(config: Config) -> Config:
    """The settings with one photograph at a time and float32 arithmetic."""
    return config.model_copy(
        update={
            "scoring": config.scoring.model_copy(update={"batch_size": 1}),
            "training": config.training.model_copy(update={"precision": "float32"}),
        }
    )

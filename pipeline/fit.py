"""Fitting one category on one process or on one rank of several: plain torch, no Ray.

Every random choice of step k (which images, angles, timesteps, noise) derives from (seed, k) alone. A resumed run
therefore needs no generator state, and several ranks share one global batch that each of them slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Config
from pipeline.denoiser import Denoiser
from pipeline.diffusion.loss import Losses, training_loss
from pipeline.diffusion.process import DiffusionProcess
from pipeline.errors import UserError
from pipeline.features import FeatureExtractor
from pipeline.images import to_unit_range
from pipeline.scoring import Scorer


def batch_indices(count: int, step: int, batch_size: int, seed: int) -> np.ndarray:
    """The images of one step: consecutive places in an endless sequence of shuffled epochs. int64 (batch_size,)."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng((seed, int(epoch))).permutation(count) for epoch in set(places // count)}
    return np.array([orders[place // count][place % count] for place in places])


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Images (N, C, H, H) turned about their centre by degrees (N,), bilinear, edges reflected."""
    radians = torch.deg2rad(degrees)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    affine = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


@dataclass(frozen=True)
class Rank:
    """Which slice of each global batch this process computes."""

    index: int = 0
    count: int = 1


class Fit:
    """A category's training in progress: network, averaged weights, optimiser and the number of finished steps."""

    def __init__(
        self,
        config: Config,
        images_nhwc: np.ndarray,
        extractor: FeatureExtractor,
        *,
        labels: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        rank: Rank | None = None,
        initial_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """images_nhwc: the training photographs, uint8 (N, map_size, map_size, 3); labels: their classes (N,), when joint.

        initial_weights: a published checkpoint to start the U-Net from; its label embedding is dropped. Raises UserError
        when it belongs to another network.
        """
        training = config.training
        self.config = config
        self.device = torch.device(device)
        self.rank = rank or Rank()
        self.share = training.share(self.rank.count)
        self.images = images_nhwc
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.extractor = extractor.to(self.device).to(memory_format=torch.channels_last)
        self.process = DiffusionProcess.from_schedule(config.schedule)
        torch.manual_seed(training.seed)
        self.denoiser = (
            Denoiser(config, extractor.channels, self.num_classes).to(self.device).to(memory_format=torch.channels_last)
        )
        if initial_weights is not None:
            try:
                self.denoiser.unet.load_guided_diffusion(initial_weights, labels=False)
            except ValueError as error:
                raise UserError(f"initial weights do not fit the network of the preset: {error}") from error
        if config.features.standardise:
            self._measure_features()
        self.average = [p.detach().clone() for p in self.denoiser.unet.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.denoiser.unet.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.step = 0
        self.module: torch.nn.Module = self.denoiser.unet
        """What the forward pass goes through; a data-parallel wrapper may take its place."""

    @property
    def finished(self) -> bool:
        """Whether all iterations are done."""
        return self.step >= self.config.training.iterations

    @torch.no_grad()
    def _measure_features(self) -> None:
        """Mean and deviation of every feature channel over the training photographs."""
        sums = torch.zeros(2, self.extractor.channels, dtype=torch.float64, device=self.device)
        for start in range(0, len(self.images), 8):
            x = self._photographs(slice(start, start + 8))
            features = self.denoiser.features(self.extractor, x).details.double()
            sums += torch.stack([features.sum((0, 2, 3)), features.square().sum((0, 2, 3))])
        cells = len(self.images) * self.extractor.grid**2
        mean = sums[0] / cells
        std = (sums[1] / cells - mean**2).clamp(min=1e-12).sqrt()
        self.denoiser.feature_mean.copy_(mean[:, None, None])
        self.denoiser.feature_std.copy_(std[:, None, None])

    def _photographs(self, which: slice | np.ndarray) -> Tensor:
        x = torch.from_numpy(to_unit_range(self.images[which]))
        return x.to(self.device, memory_format=torch.channels_last)

    def advance(self) -> Losses:
        """One optimiser step; afterwards `step` is one higher. Does not wait for the device to check the losses."""
        training = self.config.training
        self._anneal()
        # The draws of the whole batch, of which this rank takes its slice.
        generator = torch.Generator().manual_seed(hash_seed(training.seed, self.step))
        size, side = training.batch_size, self.config.network.image_size
        angles = (torch.rand(size, generator=generator) * 2 - 1) * training.rotation_degrees
        t = torch.randint(training.max_timestep, (size,), generator=generator)
        noise = torch.randn(size, 3, side, side, generator=generator)
        mine = slice(self.rank.index * self.share, (self.rank.index + 1) * self.share)
        indices = batch_indices(len(self.images), self.step, size, training.seed)[mine]
        angles, t, noise = (draw[mine].to(self.device) for draw in (angles, t, noise))

        x = self._photographs(indices)
        if training.rotation_degrees > 0:
            x = rotate(x, angles).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            target = self.denoiser.target(self.denoiser.features(self.extractor, x).details)
        x_start = self.denoiser.shrink(x)
        x_t = self.process.q_sample(x_start, t, noise).contiguous(memory_format=torch.channels_last)
        with self.denoiser.autocast(self.device):
            labels = None if self.labels is None else self.labels[indices].to(self.device)
            output = self.module(x_t, self.process.network_timesteps(t), labels)
        losses = training_loss(
            self.process,
            x_start=x_start,
            x_t=x_t,
            t=t,
            noise=noise,
            prediction=output.prediction,
            features=output.features,
            target_features=target,
            feature_weight=training.feature_weight,
        )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.optimizer.step()
        torch._foreach_lerp_(
            self.average, [p.detach() for p in self.denoiser.unet.parameters()], 1 - training.ema_decay
        )
        self.step += 1
        return losses

    def _anneal(self) -> None:
        """Lu et al. 2023, section 4: the rate falls linearly to 0."""
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - self.step / training.iterations)

    def result(self) -> Denoiser:
        """A copy of the network with the averaged weights, ready to score."""
        denoiser = Denoiser(self.config, self.extractor.channels, self.num_classes)
        denoiser.load_state_dict(self.denoiser.state_dict())
        for parameter, average in zip(denoiser.unet.parameters(), self.average, strict=True):
            parameter.data.copy_(average)
        return denoiser

    def scorer(self, extractor: FeatureExtractor | None = None, label: int | None = None) -> Scorer:
        """A scorer with the averaged weights, not yet calibrated. extractor: with context, where scoring may look at it, instead
        of the one that it was trained with; label: its class when joint."""
        return Scorer(self.result(), extractor or self.extractor, device=self.device, label=label)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; loads with torch.load(weights_only=True)."""
        return {
            "step": self.step,
            "denoiser": self.denoiser.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same config."""
        self.step = state["step"]
        self.denoiser.load_state_dict(state["denoiser"])
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def hash_seed(seed: int, step: int) -> int:
    """A generator seed for one step, unrelated to those of the neighbouring steps and seeds."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)

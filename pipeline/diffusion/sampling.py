"""Walking a chain backwards: one step of ancestral sampling or of DDIM, and the whole walk from any timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.process import DiffusionProcess, at


class Prediction(NamedTuple):
    """What the network says of x_t, each (N, 3, H, W) float32."""

    eps: Tensor
    """The noise."""
    variance_fraction: Tensor
    """Its raw v, nominally in [-1, 1]."""


Predict = Callable[[Tensor, Tensor], Prediction]
"""The network: x_t (N, 3, H, W) and t, an index of the chain at hand, (1,) for all images or (N,)."""
Noise = Callable[[], Tensor]
"""The next draw of standard normal noise for all images, (N, 3, H, W)."""
Step = Callable[[Tensor, Tensor], Tensor]
"""x_t and t (1,) -> x_{t-1}."""


def seeded_noise(seeds: Sequence[int], side: int, device: torch.device | str = "cpu") -> Noise:
    """Draws (N, 3, side, side) in which every image has its own stream: the same whatever its company. Drawn on the CPU,
    so that every device agrees."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(3, side, side, generator=each) for each in generators]).to(device)


def ancestral_step(process: DiffusionProcess, x_t: Tensor, t: Tensor, prediction: Prediction, noise: Tensor) -> Tensor:
    """Ho et al. 2020, algorithm 2, with the learned variance of Nichol & Dhariwal 2021, eq. 15: x_{t-1}; the mean at t = 0."""
    mean, log_variance = process.p_reverse(prediction.eps, prediction.variance_fraction, x_t, t, clamp=True)
    later = (t > 0).to(x_t.dtype).view(-1, 1, 1, 1)
    return mean + later * torch.exp(0.5 * log_variance) * noise


def ddim_step(
    process: DiffusionProcess, x_t: Tensor, t: Tensor, eps: Tensor, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Song et al. 2021, eq. 12 and 16: x_{t-1} = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma noise; x_0 at t = 0.

    eta: 0 is deterministic, 1 has the variance of ancestral sampling; noise (N, 3, H, W) is needed unless it is 0. x_0 is
    clamped to [-1, 1], and eps is what follows from it.
    """
    x_start = process.predict_x_start(x_t, t, eps).clamp(-1, 1)
    abar, abar_prev = process.alphas_cumprod, process.alphas_cumprod_prev
    eps = (x_t - at(np.sqrt(abar), t, x_t) * x_start) / at(np.sqrt(1 - abar), t, x_t)
    variance = eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    mean = at(np.sqrt(abar_prev), t, x_t) * x_start + at(np.sqrt(1 - abar_prev - variance), t, x_t) * eps
    if eta == 0:
        return mean
    assert noise is not None, "eta > 0 draws noise"
    return mean + at(np.sqrt(variance), t, x_t) * noise


def walk(x_t: Tensor, start: int, step: Step) -> Iterator[Tensor]:
    """The states x_{start-1}, ..., x_0 and at last the image itself, from x_t at index `start` of the chain."""
    for index in range(start, -1, -1):
        x_t = step(x_t, torch.tensor([index], device=x_t.device))
        yield x_t


def ancestral_sample(process: DiffusionProcess, predict: Predict, x_t: Tensor, start: int, noise: Noise) -> Tensor:
    """Ho et al. 2020, algorithm 2: images (N, 3, H, W) in [-1, 1] from x_t at index `start`; start + 1 evaluations."""

    def step(x: Tensor, t: Tensor) -> Tensor:
        return ancestral_step(process, x, t, predict(x, t), noise())

    *_, x = walk(x_t, start, step)
    return x


def ddim_sample(
    process: DiffusionProcess,
    predict: Predict,
    x_t: Tensor,
    start: int,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """Song et al. 2021: images (N, 3, H, W) in [-1, 1] from x_t at index `start`; start + 1 evaluations."""

    def step(x: Tensor, t: Tensor) -> Tensor:
        return ddim_step(process, x, t, predict(x, t).eps, eta=eta, noise=noise() if noise else None)

    *_, x = walk(x_t, start, step)
    return x

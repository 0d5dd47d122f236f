"""A defective image made normal: gradient denoising (Lu et al. 2023) and conditioned, blur-guided reconstruction.

The first descends on how far features lie from normal ones and lets the network clean up after every few steps. The second
noises the image partly and samples back, pulled towards the image and away from what its blurred self would say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.process import DiffusionProcess, at
from pipeline.diffusion.sampling import Noise, Predict, ancestral_step, ddim_step, walk

Distance = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [-1, 1] -> how far each cell lies from normal, (N, G, G), differentiable."""
IsNormal = Callable[[Tensor], Tensor]
"""Images -> whether nothing is left to restore, bool (N,)."""
Blur = Callable[[Tensor], Tensor]
"""Images -> smoothed images, (N, 3, H, W)."""
Weight = float | Tensor
"""The same everywhere, or for every pixel, (N, 1, H, W)."""


def descend(x: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """Lu et al. 2023, algorithm 1: x <- sqrt(1 - s^2) x - s g, with each image's gradient scaled to unit deviation.

    Printed with "+" there; it descends. An image without gradient only shrinks.
    """
    deviation = gradient.flatten(1).std(1).clamp(min=1e-20).view(-1, 1, 1, 1)
    return (1 - scale**2) ** 0.5 * x - scale * gradient / deviation


def gradient_denoising(
    process: DiffusionProcess,
    predict: Predict,
    distance: Distance,
    image: Tensor,
    *,
    rounds: int,
    is_normal: IsNormal,
    descents: int = 5,
    scale: float = 0.02,
    index: int = 8,
    noise: Noise | None = None,
) -> Iterator[Tensor]:
    """Lu et al. 2023, algorithm 1: the images (N, 3, H, W) in [-1, 1] after each round, at most `rounds` of them.

    A round is `descents` (N_d) steps of `descend` with `scale` (s) on the sum of the distances, then one reverse step at
    `index` of the chain: its mean, as in the released code, or with `noise` a sample, as in the paper. An image that is
    normal is left alone from then on; nothing more is yielded where all are.
    """
    x = image
    t = torch.tensor([index], device=x.device)
    for _ in range(rounds):
        with torch.no_grad():
            away = ~is_normal(x)
        if not away.any():
            return
        moved = x
        for _ in range(descents):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(distance(moved).sum(), moved)
            moved = descend(moved.detach(), gradient, scale)
        with torch.no_grad():
            prediction = predict(moved, t)
            if noise is None:
                moved = process.p_reverse(prediction.eps, prediction.variance_fraction, moved, t, clamp=True).mean
            else:
                moved = ancestral_step(process, moved, t, prediction, noise())
            x = torch.where(away.view(-1, 1, 1, 1), moved.clamp(-1, 1), x)
        yield x


def condition(process: DiffusionProcess, x_t: Tensor, t: Tensor, eps: Tensor, image: Tensor, weight: Weight) -> Tensor:
    """Mousakhan et al. 2023 (DDAD), conditioning: eps - w sqrt(1 - abar) (y_t - x_t), y_t the image under the same noise.

    The same as x_0 + w (1 - abar) (y - x_0) for the image x_0 that eps implies.
    """
    abar = process.alphas_cumprod
    image_t = process.q_sample(image, t, eps)
    return eps - weight * at(np.sqrt(1 - abar), t, x_t) * (image_t - x_t)


def blurred(process: DiffusionProcess, x_t: Tensor, t: Tensor, eps: Tensor, blur: Blur) -> Tensor:
    """Hong et al. 2023 (SAG), blur guidance without a mask: x_t of which the implied image is blurred, under the same noise."""
    return process.q_sample(blur(process.predict_x_start(x_t, t, eps)), t, eps)


def conditioned_reconstruction(
    process: DiffusionProcess,
    predict: Predict,
    image: Tensor,
    *,
    start: int,
    weight: Weight,
    guidance: float,
    blur: Blur,
    noise: Noise,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """Conditioned, blur-guided diffusion: states (N, 3, H, W) from x_start, at the chain's index `start`, to the image.

    Each step takes DDIM's (`eta`) with the error of `condition` (`weight`, w) to which the difference between the network's
    answers to x_t and to its `blurred` self is added (`guidance`, s). Where guidance or weight is 0 the other remains, and
    plain DDIM where both are. start + 1 steps of two evaluations each, of one where guidance is 0. For `torch.no_grad`.
    """

    def step(x_t: Tensor, t: Tensor) -> Tensor:
        answer = predict(x_t, t).eps
        eps = condition(process, x_t, t, answer, image, weight)
        if guidance:
            smoothed = blurred(process, x_t, t, eps, blur)
            eps = eps + guidance * (answer - predict(smoothed, t).eps)
        return ddim_step(process, x_t, t, eps, eta=eta, noise=noise() if eta else None)

    t = torch.tensor([start], device=image.device)
    return walk(process.q_sample(image, t, noise()), start, step)

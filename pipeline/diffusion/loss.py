"""What training minimises and what scoring measures: Gaussian KL, the variational bound, the hybrid and feature losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.diffusion.process import DiffusionProcess, Gaussian


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of diagonal Gaussians, elementwise, in nats: 0.5 (-1 + lv_q - lv_p + exp(lv_p - lv_q) + (m_p - m_q)^2 / v_q)."""
    log_ratio = p.log_variance - q.log_variance
    squared = (p.mean - q.mean) ** 2 * torch.exp(-q.log_variance)
    return 0.5 * (-1 - log_ratio + torch.exp(log_ratio) + squared)


def discretised_gaussian_log_likelihood(x: Tensor, q: Gaussian) -> Tensor:
    """Ho et al. 2020, eq. 13: log probability, in nats, of 8-bit pixels x in [-1, 1] under a Gaussian binned 2/255 wide.

    The outermost bins are open-ended (|x| > 0.999). Elementwise; at least log(1e-12).
    """
    inverse_std = torch.exp(-0.5 * q.log_variance)
    centred = x - q.mean
    upper = torch.special.ndtr((centred + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((centred - 1 / 255) * inverse_std)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(probability.clamp(min=1e-12))


def kl_map(process: DiffusionProcess, x_start: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
    """Lu et al. 2023, pixel score: KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)) in bits, averaged over colours -> (N, H, W)."""
    reverse = process.p_reverse(eps, v, x_t, t, clamp=True)
    return gaussian_kl(process.q_posterior(x_start, x_t, t), reverse).mean(1) / math.log(2)


def variational_bound(
    process: DiffusionProcess, x_start: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor
) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 4-7: one term of the bound per image, (N,), in bits per dimension.

    At t = 0 the term is the likelihood of the pixels themselves.
    """
    reverse = process.p_reverse(eps, v, x_t, t, clamp=False)
    kl = gaussian_kl(process.q_posterior(x_start, x_t, t), reverse).flatten(1).mean(1)
    likelihood = discretised_gaussian_log_likelihood(x_start, reverse).flatten(1).mean(1)
    return torch.where(t == 0, -likelihood, kl) / math.log(2)


class Losses(NamedTuple):
    """Scalar tensors; `total` is what is minimised."""

    total: Tensor
    noise: Tensor
    bound: Tensor
    feature: Tensor


def training_loss(
    process: DiffusionProcess,
    *,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction: Tensor,
    features: Tensor,
    target_features: Tensor,
    feature_weight: float,
) -> Losses:
    """Lu et al. 2023, section 3.2: noise MSE + variational bound + feature_weight x feature MSE, averaged over the batch.

    prediction (N, 6, H, W) holds the predicted noise and the raw variance fraction; features and target_features are
    (N, C, G, G). The bound sees the predicted noise detached: it trains the variance only. Computed in float32.
    """
    eps, v = prediction.float().chunk(2, dim=1)
    noise_loss = F.mse_loss(eps, noise)
    bound = variational_bound(process, x_start, x_t, t, eps.detach(), v).mean()
    # Seen with channels last, as both lie in memory: the gradient of anything else is made in the default layout, then copied.
    feature_loss = F.mse_loss(features.float().permute(0, 2, 3, 1), target_features.permute(0, 2, 3, 1))
    total = noise_loss + bound + feature_weight * feature_loss
    return Losses(total, noise_loss.detach(), bound.detach(), feature_loss.detach())

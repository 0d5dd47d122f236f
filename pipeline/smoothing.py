"""Gaussian smoothing of maps and images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """(..., H, W) smoothed by a Gaussian of `sigma` pixels, cut at 4 sigma, edges reflected; sigma 0 changes nothing."""
    if sigma == 0:
        return maps
    radius = min(int(4 * sigma + 0.5), maps.shape[-1] - 1, maps.shape[-2] - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    weights = (kernel / kernel.sum()).tolist()
    x = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (radius,) * 4, mode="reflect")
    return correlated(correlated(x, weights, -1), weights, -2).view_as(maps)


def correlated(x: Tensor, weights: Sequence[float], dim: int) -> Tensor:
    """The sum of x shifted along a dimension, weighted, where all shifts reach: on a CPU many times as fast as a convolution of a
    single channel."""
    length = x.shape[dim] - len(weights) + 1
    total = x.narrow(dim, 0, length) * weights[0]
    for shift, weight in enumerate(weights[1:], 1):
        total.add_(x.narrow(dim, shift, length), alpha=weight)
    return total

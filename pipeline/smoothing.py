"""Gaussian smoothing of maps and images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """(..., H, W) smoothed by a Gaussian of `sigma` pixels, cut at 4 sigma, edges reflected; sigma 0 changes nothing."""
    if sigma == 0:
        return maps
    radius = min(int(4 * sigma + 0.5), maps.shape[-1] - 1, maps.shape[-2] - 1)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(maps)

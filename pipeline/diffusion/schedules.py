"""Noise schedules: how much noise each step of a diffusion process adds."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Schedule = Literal["linear", "cosine"]


def kept_timesteps(length: int, steps: int) -> list[int]:
    """Nichol & Dhariwal 2021, section 4: the `steps` evenly spaced timesteps of `length`, the first and last among them."""
    stride = (length - 1) / (steps - 1)
    return [round(stride * i) for i in range(steps)]


def linear_betas(steps: int) -> np.ndarray:
    """Ho et al. 2020, section 4: betas from 1e-4 to 0.02 over 1000 steps, scaled so that other lengths end as noisy.

    Returns float64 (steps,).
    """
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def cosine_betas(steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17: abar_t = cos^2((t/T + 0.008)/1.008 * pi/2), betas clipped at 0.999.

    Returns float64 (steps,).
    """
    t = np.arange(steps + 1, dtype=np.float64) / steps
    alphas_cumprod = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)

"""The Gaussian diffusion process: forward and reverse distributions, respacing.

Tables are float64 numpy arrays; they become float32 tensors only when they meet an image. Timesteps are always
*indices of the process at hand*; `original_timesteps` says what the network must be told for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule, cosine_betas, kept_timesteps, linear_betas


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images: mean and natural log variance, each (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True, eq=False)
class DiffusionProcess:
    """The chain q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) and everything that follows from its betas."""

    betas: np.ndarray
    """float64 (T,), in (0, 1)."""
    original_timesteps: np.ndarray
    """int64 (T,): what the network is told for each index; 0..T-1 unless respaced."""

    alphas_cumprod: np.ndarray = field(init=False, repr=False)
    alphas_cumprod_prev: np.ndarray = field(init=False, repr=False)
    posterior_variance: np.ndarray = field(init=False, repr=False)
    posterior_log_variance_clipped: np.ndarray = field(init=False, repr=False)
    posterior_mean_coef1: np.ndarray = field(init=False, repr=False)
    posterior_mean_coef2: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        betas = self.betas
        assert betas.ndim == 1 and (betas > 0).all() and (betas <= 1).all(), "betas must lie in (0, 1]"
        abar = np.cumprod(1 - betas)
        abar_prev = np.concatenate([[1.0], abar[:-1]])
        variance = betas * (1 - abar_prev) / (1 - abar)
        # The variance of x_0 given x_1 and x_0 is 0: its log takes the next entry's value, as published.
        clipped = np.concatenate([variance[1:2], variance[1:]]) if len(betas) > 1 else betas
        tables = {
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(clipped),
            "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1 - abar),
            "posterior_mean_coef2": (1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar),
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    def __len__(self) -> int:
        return len(self.betas)

    @classmethod
    def from_schedule(cls, schedule: Schedule = "linear", steps: int = 1000) -> DiffusionProcess:
        """The full chain of a named schedule."""
        betas = linear_betas(steps) if schedule == "linear" else cosine_betas(steps)
        return cls(betas=betas, original_timesteps=np.arange(steps))

    def respaced(self, steps: int) -> DiffusionProcess:
        """Nichol & Dhariwal 2021, section 4: keep `steps` evenly spaced timesteps, beta'_i = 1 - abar_{s_i}/abar_{s_{i-1}}.

        1000 -> 250 keeps 20, 201 and 401 at indices 5, 50 and 100. Raises ValueError unless 2 <= steps <= len(self).
        """
        if not 2 <= steps <= len(self):
            raise ValueError(f"respacing keeps 2 to {len(self)} steps, not {steps}")
        kept = np.array(kept_timesteps(len(self), steps))
        abar = self.alphas_cumprod[kept]
        betas = 1 - abar / np.concatenate([[1.0], abar[:-1]])
        return DiffusionProcess(betas=betas, original_timesteps=self.original_timesteps[kept])

    def network_timesteps(self, t: Tensor) -> Tensor:
        """Indices of this process (T,) int64 -> the original timesteps that the network was trained on."""
        return torch.from_numpy(self.original_timesteps).to(t.device)[t]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Ho et al. 2020, eq. 4: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise. Shapes (N, C, H, W); t (N,) int64, or (1,) for
        all images."""
        signal = at(np.sqrt(self.alphas_cumprod), t, x_start)
        return signal * x_start + at(np.sqrt(1 - self.alphas_cumprod), t, x_start) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Ho et al. 2020, eq. 6-7: q(x_{t-1} | x_t, x_0), with the clipped log variance."""
        mean = at(self.posterior_mean_coef1, t, x_t) * x_start + at(self.posterior_mean_coef2, t, x_t) * x_t
        return Gaussian(mean, at(self.posterior_log_variance_clipped, t, x_t).expand_as(x_t))

    def predict_x_start(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Ho et al. 2020, eq. 15: x_0 = sqrt(1/abar_t) x_t - sqrt(1/abar_t - 1) eps; not clamped."""
        signal = at(np.sqrt(1 / self.alphas_cumprod), t, x_t)
        return signal * x_t - at(np.sqrt(1 / self.alphas_cumprod - 1), t, x_t) * eps

    def p_reverse(self, eps: Tensor, variance_fraction: Tensor, x_t: Tensor, t: Tensor, *, clamp: bool) -> Gaussian:
        """Nichol & Dhariwal 2021, eq. 15: p(x_{t-1} | x_t) from predicted noise and the learned variance range.

        `variance_fraction` is the network's raw v, nominally in [-1, 1]: log variance = frac log beta_t +
        (1 - frac) log btilde_t with frac = (v + 1)/2. `clamp` limits the implied x_0 to [-1, 1]: on for scoring and
        sampling, off inside the training bound.
        """
        x_start = self.predict_x_start(x_t, t, eps)
        if clamp:
            x_start = x_start.clamp(-1, 1)
        fraction = (variance_fraction + 1) / 2
        log_beta, log_btilde = at(np.log(self.betas), t, x_t), at(self.posterior_log_variance_clipped, t, x_t)
        mean = self.q_posterior(x_start, x_t, t).mean
        return Gaussian(mean, fraction * log_beta + (1 - fraction) * log_btilde)


def at(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """Entries t (T,) of a float64 table as a tensor (T, 1, ..., 1) of the dtype and device of `like`."""
    values = torch.from_numpy(table).to(like.device)[t].to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))

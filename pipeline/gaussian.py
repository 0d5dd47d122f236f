"""Gaussians of normal feature residuals: how far a residual lies from what normal photographs show, in general or at its place.

The general one is shared by all places, which suits textures. The one of each place is PaDiM's (Defard et al. 2021) applied to
residuals, which suits products that always lie alike; its covariance is shrunk towards the general one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PLACE_DIMENSIONS = 100
"""Directions kept for the Gaussians of places, as PaDiM keeps 100 random features: memory grows with the square."""


@dataclass(frozen=True)
class ResidualGaussian:
    """A Gaussian per place, or one for all (P = 1); float32 on one device, at most G * G * d * d numbers."""

    projection: Tensor
    """(d, C): applied to residuals first."""
    mean: Tensor
    """(P, d) of projected residuals; P is 1 or G * G, places row by row."""
    whitening: Tensor
    """(P, d, d): inverse Cholesky factors of the covariances of projected residuals."""

    def distance(self, residuals: Tensor) -> Tensor:
        """Squared Mahalanobis distance over d, (N, C, G, G) -> (N, G, G): about 1 for normal residuals."""
        n, _, grid, _ = residuals.shape
        projected = torch.einsum("dc,ncxy->xydn", self.projection, residuals).reshape(grid * grid, -1, n)
        # One batch of products over places; a single Gaussian takes all places as its columns.
        centred = projected - self.mean[..., None]
        if len(self.whitening) == 1:
            centred = centred.permute(1, 0, 2).reshape(1, -1, grid * grid * n)
        white = torch.bmm(self.whitening, centred)
        return white.square().mean(-2).reshape(grid, grid, n).permute(2, 0, 1).contiguous()


def fit_general(batches: Iterable[Tensor]) -> ResidualGaussian:
    """One Gaussian of the residuals of all places, from batches (N, C, G, G); two sums are kept, not the residuals.

    A hundredth of the mean variance is added to the diagonal, so that nearly constant channels do not dominate.
    """
    count = 0
    total: Tensor | float = 0.0
    outer: Tensor | float = 0.0
    for residuals in batches:
        cells = residuals.transpose(0, 1).flatten(1).double()
        count += cells.shape[1]
        total = total + cells.sum(1)
        outer = outer + cells @ cells.T
    assert isinstance(total, Tensor) and isinstance(outer, Tensor), "at least one batch"
    mean = total / count
    covariance = outer / count - mean[:, None] * mean
    eye = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    whitening = _inverse_factor(covariance + 0.01 * covariance.diagonal().mean() * eye)
    return ResidualGaussian(eye.float(), mean.float()[None], whitening.float()[None])


def fit_places(batches: Iterable[Tensor], general: ResidualGaussian, seed: int) -> ResidualGaussian:
    """A Gaussian for every place from batches (N, C, G, G) of n images in all, in random directions whitened by `general`.

    The covariance is shrunk towards the general one by d / (d + n): the fewer the images, the more.
    """
    channels = general.projection.shape[1]
    dimensions = min(PLACE_DIMENSIONS, channels)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0][:dimensions]
    projection = directions.to(general.whitening.device) @ general.whitening[0]
    count = 0
    total: Tensor | float = 0.0
    outer: Tensor | float = 0.0
    for residuals in batches:
        cells = torch.einsum("dc,ncxy->xynd", projection, residuals).flatten(0, 1)
        count += cells.shape[1]
        total = total + cells.sum(1)
        outer = outer + torch.bmm(cells.transpose(1, 2), cells)
    assert isinstance(total, Tensor) and isinstance(outer, Tensor), "at least one batch"
    mean = total / count
    covariance = (outer - count * mean[:, :, None] * mean[:, None, :]) / max(1, count - 1)
    shrinkage = dimensions / (dimensions + count)
    eye = torch.eye(dimensions, device=mean.device)
    whitening = _inverse_factor((1 - shrinkage) * covariance + shrinkage * eye)
    return ResidualGaussian(projection, mean, whitening)


def _inverse_factor(covariance: Tensor) -> Tensor:
    """L^-1 with covariance = L L^T; positive definite (..., d, d)."""
    factor = torch.linalg.cholesky(covariance)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)

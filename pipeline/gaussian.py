"""Gaussians of what normal photographs show: how far a vector at a cell lies from it, in general or at its place.

The general one is shared by all places, which suits textures. The one of each place is PaDiM's (Defard et al. 2021), which
suits products that always lie alike; its covariance is shrunk towards the general one. Between the two: kinds.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NormalGaussian:
    """A Gaussian per place, or one for all (P = 1); float32 on one device, at most G * G * d * d numbers."""

    projection: Tensor
    """(d, C): applied to vectors first."""
    mean: Tensor
    """(P, d) of projected vectors; P is 1 or G * G, places row by row."""
    whitening: Tensor
    """(P, d, d): inverse Cholesky factors of the covariances of projected vectors."""

    def __post_init__(self) -> None:
        # However it comes, in the layout that products take it soonest in: they round by it, too.
        object.__setattr__(self, "whitening", self.whitening.mT.contiguous().mT)

    @property
    def by_place(self) -> bool:
        """Whether every place has its own."""
        return len(self.whitening) > 1

    @property
    def covariance(self) -> str:
        """Its name among settings."""
        return "place" if self.by_place else "general"

    def distance(self, cells: Tensor, reach: int = 0) -> Tensor:
        """Squared Mahalanobis distance over d, (N, C, G, G) -> (N, G, G): about 1 for normal cells.

        With Gaussians by place the smallest under those of the places up to `reach` cells away, counted along rows and columns:
        no two products lie quite alike.
        """
        n, _, grid, _ = cells.shape
        # One row of channels for each cell: nothing moves where tensors are channels-last.
        rows = cells.permute(0, 2, 3, 1).reshape(n, grid * grid, -1)
        if not self.by_place:
            white = F.linear(rows, self.whitening[0] @ self.projection, -(self.whitening[0] @ self.mean[0]))
            return white.square().mean(-1).reshape(n, grid, grid)
        projected = F.linear(rows, self.projection)
        if reach == 0:
            return self._at_their_places(projected).reshape(n, grid, grid)
        # Every Gaussian is asked about the cells around its place at once, its factor read once; answers go back to their cells.
        side = range(2 * reach + 1)
        window = [(y, x) for y in side for x in side if abs(y - reach) + abs(x - reach) <= reach]
        padded = F.pad(projected.unflatten(1, (grid, grid)), (0, 0, reach, reach, reach, reach))
        around = torch.cat([padded[:, y : y + grid, x : x + grid] for y, x in window])
        asked = self._at_their_places(around.flatten(1, 2)).unflatten(1, (grid, grid)).unflatten(0, (len(window), n))
        answers = [
            F.pad(each, (x, 2 * reach - x, y, 2 * reach - y), value=torch.inf)
            for each, (y, x) in zip(asked, window, strict=True)
        ]
        return torch.stack(answers).amin(0)[:, reach:-reach, reach:-reach]

    def _at_their_places(self, projected: Tensor) -> Tensor:
        """(N, P, d) -> (N, P), each under the Gaussian of its place."""
        centred = (projected - self.mean).transpose(0, 1)
        white = torch.bmm(centred, self.whitening.mT)
        return torch.linalg.vector_norm(white, dim=-1).square().T / white.shape[-1]  # leaves no squares in memory


class Moments:
    """Running sums of projected vectors, of all places together or of each: constant memory however many images."""

    def __init__(self, projection: Tensor | None = None, *, by_place: bool) -> None:
        self.projection = projection
        self.by_place = by_place
        self.count = 0
        self.total: Tensor | float = 0.0
        self.outer: Tensor | float = 0.0

    def add(self, cells: Tensor) -> None:
        """Take (N, C, G, G) into account."""
        if self.projection is not None:
            cells = torch.einsum("dc,ncxy->ndxy", self.projection, cells)
        samples = cells.permute(2, 3, 0, 1).flatten(0, 1)  # (places, N, d)
        if not self.by_place:
            samples = samples.flatten(0, 1)[None].double()
        self.count += samples.shape[1]
        self.total = self.total + samples.sum(1)
        self.outer = self.outer + torch.bmm(samples.transpose(1, 2), samples)

    def without(self, batches: Iterable[Tensor]) -> Moments:
        """As if batches (N, C, G, G) had never been taken into account, and not the last."""
        part, rest = (Moments(self.projection, by_place=self.by_place) for _ in range(2))
        for cells in batches:
            part.add(cells)
        rest.count, rest.total, rest.outer = self.count - part.count, self.total - part.total, self.outer - part.outer
        return rest

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(P, d) and (P, d, d)."""
        assert isinstance(self.total, Tensor) and isinstance(self.outer, Tensor), "at least one batch"
        mean = self.total / self.count
        scatter = self.outer - self.count * mean[:, :, None] * mean[:, None, :]
        return mean, scatter / max(1, self.count - self.by_place)


def explained_by_place(moments: Moments) -> float:
    """Share of the vectors' variance that lies between places rather than between photographs, 0..1, from moments by place.

    Near 0 for textures and products in any direction, of which nothing shows twice at the same place.
    """
    mean, covariance = moments.mean_and_covariance()
    within = covariance.diagonal(dim1=1, dim2=2).mean(0).sum()
    between = (mean.var(0).sum() - within / moments.count).clamp(min=0)  # means of few photographs vary by themselves
    return float(between / (between + within).clamp(min=1e-12))


def general_gaussian(moments: Moments) -> NormalGaussian:
    """One Gaussian of the vectors of all places, projected where the moments are.

    A hundredth of each channel's own variance is added to it (channels may differ in scale by orders of magnitude), so that
    directions in which channels nearly repeat each other do not dominate; constant channels get a millionth of the mean.
    """
    mean, covariance = moments.mean_and_covariance()
    eye = torch.eye(mean.shape[1], dtype=torch.float64, device=mean.device)
    variances = covariance[0].diagonal()
    ridge = (0.01 * variances).clamp(min=max(1e-6 * float(variances.mean()), 1e-12))
    whitening = inverse_factor(covariance + ridge * eye)
    projection = eye.float() if moments.projection is None else moments.projection
    return NormalGaussian(projection, mean.float(), whitening.float())


def place_projection(general: NormalGaussian, dimensions: int, seed: int) -> Tensor:
    """Defard et al. 2021, section IV-B: random directions, here of space whitened by `general`. (min(dimensions, C), C)."""
    channels = general.projection.shape[0]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0][:dimensions]
    return directions.to(general.whitening.device) @ general.whitening[0] @ general.projection


def place_gaussians(moments: Moments) -> NormalGaussian:
    """A Gaussian for every place from moments by place of whitened vectors (`place_projection`).

    The covariance of d dimensions from n images is shrunk towards the general one by d / (d + n): the fewer, the more.
    Rounded to float16, the precision that models keep of these many numbers.
    """
    assert moments.projection is not None and moments.by_place
    mean, covariance = moments.mean_and_covariance()
    dimensions = mean.shape[1]
    shrinkage = dimensions / (dimensions + moments.count)
    eye = torch.eye(dimensions, device=mean.device)
    whitening = inverse_factor((1 - shrinkage) * covariance + shrinkage * eye)
    return NormalGaussian(moments.projection, mean, whitening.half().float())


def fit_general(batches: Iterable[Tensor]) -> NormalGaussian:
    """general_gaussian of batches (N, C, G, G)."""
    moments = Moments(by_place=False)
    for cells in batches:
        moments.add(cells)
    return general_gaussian(moments)


def fit_places(batches: Iterable[Tensor], general: NormalGaussian, dimensions: int, seed: int) -> NormalGaussian:
    """place_gaussians of batches (N, C, G, G)."""
    moments = Moments(place_projection(general, dimensions, seed), by_place=True)
    for cells in batches:
        moments.add(cells)
    return place_gaussians(moments)


def inverse_factor(covariance: Tensor) -> Tensor:
    """L^-1 with covariance = L L^T; positive definite (..., d, d)."""
    factor = torch.linalg.cholesky(covariance)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)

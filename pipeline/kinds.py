"""Gaussians of kinds of cells: what normal photographs show falls into some hundred kinds, wherever it lies.

Between the Gaussian of all cells and that of each place (gaussian.py): for textures, and for products that lie in any
direction, which show little twice at the same place but the same things all over. Still not all places are equal: extractors
see odd things along a photograph's edges, products lie in the middle. So distances count by what is usual at their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.gaussian import inverse_factor
from pipeline.smoothing import gaussian_blur

ASKED = 2
"""Kinds that answer for a cell, those with the nearest centres: which it is of is not always plain."""
FINDING = 64
"""Directions in which kinds are told apart, at most."""
CANDIDATES = 100_000
"""Cells of normal photographs that kinds are told from."""
LEAST_VARIANCE = 1e-3
"""Of white space, added to every kind in all directions: what hardly varies in the photographs at hand may elsewhere."""
USUAL_SIGMA = 1.5
"""Cells: what is usual at a place is averaged with its neighbours', by a Gaussian of this deviation."""
LEAST_USUAL = 0.5
"""Of the mean over all places: where nearly nothing is seen, next to nothing would count as much."""
ROUNDS = 25
"""Of Lloyd's algorithm."""
GROUP = 32
"""Cells of one product. Fixed, so that what a cell is told does not depend on how many others are of its kind."""


@dataclass(frozen=True, eq=False)
class KindGaussians:
    """A Gaussian for each of K kinds of cells; float32 on one device, about K d d numbers."""

    finding: Tensor
    """(c, C): applied to vectors before they are compared with centres."""
    centres: Tensor
    """(K, c): a vector is of the kind whose centre is nearest."""
    projection: Tensor
    """(d, C): applied to vectors before Gaussians measure them."""
    mean: Tensor
    """(K, d) of projected vectors."""
    whitening: Tensor
    """(K, d, d): inverse Cholesky factors of the covariances of projected vectors."""
    usual: Tensor | None = None
    """(G, G): the distance over d that is usual at each place. None, and taken for 1, in models of early releases."""

    covariance = "kind"

    def __post_init__(self) -> None:
        # However it comes, in the layout in which products round alike however many there are at once, on every CPU seen.
        object.__setattr__(self, "whitening", self.whitening.mT.contiguous().mT)

    def distance(self, cells: Tensor) -> Tensor:
        """Least squared Mahalanobis distance from `ASKED` kinds over d and what is usual at the place, (N, C, G, G) -> (N, G, G);
        about 1 for normal cells."""
        rows = cells.permute(0, 2, 3, 1).flatten(1, 2)
        # Image by image, so that none's rounding depends on how many there are.
        asked = torch.stack([nearest_kinds(image @ self.finding.T, self.centres, ASKED) for image in rows])
        groups = Grouped.by(asked.flatten(), len(self.centres))
        projected = F.linear(rows.flatten(0, 1), self.projection).repeat_interleave(asked.shape[-1], 0)
        centred = groups.side_by_side(projected) - self.mean[groups.kinds, None]
        white = torch.bmm(centred, self.whitening[groups.kinds].mT)
        found = torch.linalg.vector_norm(white, dim=-1).square() / white.shape[-1]
        least = found.flatten()[groups.slots].view(asked.shape).amin(-1).unflatten(1, cells.shape[2:])
        return least if self.usual is None else least / self.usual

    def counting_by_place(self, mean: Tensor) -> KindGaussians:
        """These, where distances (G, G) are the mean of normal photographs at each place."""
        smooth = gaussian_blur(mean, USUAL_SIGMA)
        return replace(self, usual=smooth.clamp(min=max(LEAST_USUAL * float(mean.mean()), 1e-6)))


def nearest_kinds(found: Tensor, centres: Tensor, count: int) -> Tensor:
    """The kinds whose centres (K, c) are nearest to each vector (n, c), the nearest first; int64 (n, min(count, K))."""
    distances = torch.addmm(centres.square().sum(1), found, centres.T, alpha=-2)
    return distances.topk(min(count, len(centres)), dim=1, largest=False).indices


@dataclass(frozen=True)
class Grouped:
    """Vectors of a kind side by side, in groups of fixed size and number: no device has to say how many it found."""

    slots: Tensor
    """int64 (n,): where each vector lies among all groups' places."""
    kinds: Tensor
    """int64 (g,): of each group; groups that nothing is in come last."""

    @classmethod
    def by(cls, kinds: Tensor, count: int) -> Grouped:
        """kinds: of each vector, int64 (n,), below count."""
        order = kinds.argsort(stable=True)
        sizes = kinds.new_zeros(count).index_add_(0, kinds, torch.ones_like(kinds))
        groups = (sizes + GROUP - 1) // GROUP
        ends = groups.cumsum(0)
        first_of_kind, first_slot = sizes.cumsum(0) - sizes, (ends - groups) * GROUP
        ordered = kinds[order]
        numbers = torch.arange(len(kinds), device=kinds.device)
        slots = torch.empty_like(kinds).index_copy_(0, order, numbers + (first_slot - first_of_kind)[ordered])
        most = torch.arange(len(kinds) // GROUP + min(count, len(kinds)), device=kinds.device)
        return cls(slots, torch.searchsorted(ends, most, right=True).clamp(max=count - 1))

    def side_by_side(self, vectors: Tensor) -> Tensor:
        """(n, d) -> (g, GROUP, d), zero where a group has no more of them."""
        places = vectors.new_zeros(len(self.kinds) * GROUP, vectors.shape[1])
        return places.index_copy_(0, self.slots, vectors).unflatten(0, (-1, GROUP))


class KindMoments:
    """Running sums of the projected vectors of every kind: constant memory however many images."""

    def __init__(self, samples: Tensor, count: int, projection: Tensor, seed: int) -> None:
        """samples: vectors (n, C) that tell at most `count` kinds; projection (d, C): as `place_projection` gives it."""
        self.finding = halfway_white(samples)
        found = samples @ self.finding.T
        self.centres = kind_centres(found, count, seed)
        self.projection = projection
        kinds, dimensions = len(self.centres), len(projection)
        sums = samples.new_zeros(kinds, dimensions).index_add_(0, own := self._of(found), samples @ projection.T)
        self.origins = sums / torch.bincount(own, minlength=kinds).clamp(min=1)[:, None]
        """(K, d): about the means. Sums of squares about anything far away would tell little of small variances."""
        self.count = samples.new_zeros(kinds, dtype=torch.float64)
        self.total = samples.new_zeros(kinds, dimensions, dtype=torch.float64)
        self.outer = samples.new_zeros(kinds, dimensions, dimensions)

    def add(self, cells: Tensor) -> None:
        """Take (N, C, G, G) into account."""
        rows = cells.permute(0, 2, 3, 1).flatten(0, 2)
        kinds = self._of(rows @ self.finding.T)
        centred = F.linear(rows, self.projection) - self.origins[kinds]
        self.count += torch.bincount(kinds, minlength=len(self.count))
        self.total.index_add_(0, kinds, centred.double())
        groups = Grouped.by(kinds, len(self.centres))
        together = groups.side_by_side(centred)
        self.outer.index_add_(0, groups.kinds, torch.bmm(together.mT, together))

    def without(self, batches: Iterable[Tensor]) -> KindMoments:
        """As if batches (N, C, G, G) had never been taken into account; which kinds there are stays."""
        part = copy(self)
        part.count, part.total, part.outer = (torch.zeros_like(sums) for sums in (self.count, self.total, self.outer))
        for cells in batches:
            part.add(cells)
        rest = copy(self)
        rest.count, rest.total, rest.outer = self.count - part.count, self.total - part.total, self.outer - part.outer
        return rest

    def _of(self, found: Tensor) -> Tensor:
        return nearest_kinds(found, self.centres, 1)[:, 0]


def kind_gaussians(moments: KindMoments) -> KindGaussians:
    """A Gaussian for every kind that was seen, from moments of whitened vectors.

    The covariance of d dimensions from n cells is shrunk towards that within kinds in general by d / (d + n): the fewer, the
    more. Rounded to float16, the precision that models keep of these many numbers.
    """
    seen, dimensions = moments.count > 0, len(moments.projection)
    count = moments.count[seen].float()[:, None, None]
    mean = (moments.total[seen] / moments.count[seen, None]).float()
    scatter = moments.outer[seen] - count * mean[:, :, None] * mean[:, None, :]
    within = scatter.sum(0) / count.sum()
    shrinkage = dimensions / (dimensions + count)
    least = LEAST_VARIANCE * torch.eye(dimensions, device=mean.device)
    whitening = inverse_factor((1 - shrinkage) * scatter / count + shrinkage * within + least)
    return KindGaussians(
        moments.finding,
        moments.centres[seen],
        moments.projection,
        moments.origins[seen] + mean,
        whitening.half().float(),
    )


def halfway_white(samples: Tensor) -> Tensor:
    """Principal directions of vectors (n, C), each divided by the root of its deviation: halfway between the vectors as they
    are, where few directions decide what is near, and white ones, where noise does. (min(FINDING, C), C)."""
    variances, directions = torch.linalg.eigh(torch.cov(samples.T))
    variances, directions = variances[-FINDING:], directions[:, -FINDING:]
    return (directions * variances.clamp(min=1e-6 * float(variances[-1]) + 1e-12) ** -0.25).T.contiguous()


def kind_centres(found: Tensor, count: int, seed: int) -> Tensor:
    """Lloyd 1982: means (K, c) of at most `count` kinds of the vectors (n, c), where each is of the kind of the nearest mean.

    The same for a seed on CPUs; GPUs add in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.unique(found, dim=0)  # an empty background has many cells and is one kind
    centres = distinct[torch.randperm(len(distinct), generator=generator)[:count].to(found.device)]
    for _ in range(ROUNDS):
        kinds = torch.cat([nearest_kinds(part, centres, 1)[:, 0] for part in found.split(4096)])
        sizes = torch.zeros_like(centres[:, 0]).index_add_(0, kinds, torch.ones_like(found[:, 0]))
        means = torch.zeros_like(centres).index_add_(0, kinds, found) / sizes.clamp(min=1)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)  # a kind that lost all its vectors stays where it was
    return centres

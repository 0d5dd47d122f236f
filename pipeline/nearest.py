"""Normal cells kept as they are: how far a vector at a cell lies from the nearest of them, wherever that was seen.

PatchCore's memory (Roth et al. 2022). A Gaussian says what belongs at a place; this says what belongs to the product at
all, which counts where parts turn or move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 40_000
"""Cells of normal photographs that the kept ones are chosen from."""
SKETCH = 64
"""Random directions in which candidates are compared with each other, as Roth et al. 2022 do: many times as fast."""
FINEST = 1e-5
"""Smallest mean distance of normal cells from each other, of the square of their length: a hundred times the rounding."""


@dataclass(frozen=True, eq=False)
class NearestNormal:
    """Some cells of normal photographs; float32 on one device."""

    scale: Tensor
    """(C,): channels are multiplied by it."""
    cells: Tensor
    """(M, C): kept cells, scaled."""
    owners: Tensor | None = None
    """int64 (M,): the photograph of each, by its place among those that they were chosen from. Stored models forget it."""

    def distance(self, cells: Tensor) -> Tensor:
        """Squared distance from the nearest normal cell, (N, C, g, g) -> (N, g, g): about 1 for normal cells."""
        rows = (cells * self.scale[:, None, None]).permute(0, 2, 3, 1).flatten(1, 2)
        # Image by image, so that none's rounding depends on how many there are.
        return torch.stack([nearest_distance(image, self.cells) for image in rows]).unflatten(1, cells.shape[2:])

    def without(self, photographs: np.ndarray) -> NearestNormal:
        """Without the cells of some photographs, int64 (p,), as long as that leaves any."""
        assert self.owners is not None, "not of a stored model"
        others = ~torch.isin(self.owners, torch.from_numpy(photographs).to(self.owners.device))
        return NearestNormal(self.scale, self.cells[others], self.owners[others]) if others.any() else self


def nearest_distance(rows: Tensor, kept: Tensor) -> Tensor:
    """Squared Euclidean distance of each row (P, c) from the nearest of the kept ones (M, c); (P,)."""
    products = torch.addmm(kept.square().sum(1), rows, kept.T, alpha=-2)
    return (products.amin(1) + rows.square().sum(1)).clamp(min=0)


class SampledCells:
    """Cells of normal photographs, as many of each, drawn at random: what is worth keeping is chosen from them."""

    def __init__(self, photographs: int, seed: int, *, count: int = CANDIDATES) -> None:
        self.of_each = max(1, count // photographs)
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: list[Tensor] = []

    def add(self, cells: Tensor) -> None:
        """Take photographs (N, C, g, g) into account."""
        for image in cells.flatten(2):
            chosen = torch.randperm(image.shape[1], generator=self.generator)[: self.of_each]
            self.drawn.append(image[:, chosen.to(image.device)].T)

    def samples(self) -> Tensor:
        """(photographs, k, C)."""
        return torch.stack(self.drawn)


def nearest_normal(samples: Tensor, stages: Sequence[int], count: int, seed: int) -> NearestNormal:
    """Keep `count` cells, at most half, of those sampled (P, k, C), P >= 2, such that the others lie near one of them.

    stages: the channels of each, C together. Within a stage channels count as the extractor gives them; stages count
    alike, by their variance.
    """
    rows = samples.flatten(0, 1)
    totals = [stage.var(0).sum().clamp(min=1e-12) for stage in rows.split(list(stages), 1)]
    scale = torch.cat([total.rsqrt().expand(channels) for total, channels in zip(totals, stages, strict=True)])
    scaled = rows * scale
    chosen = spread_out(scaled, max(1, min(count, len(scaled) // 2)), seed)
    kept, owners = scaled[chosen], chosen // samples.shape[1]
    # So that cells of new photographs lie at about 1, as from Gaussians: those of one are asked how far the others' lie.
    distances = [
        nearest_distance(photograph, kept[owners != owner])
        for owner, photograph in enumerate(scaled.unflatten(0, samples.shape[:2]))
        if (owners != owner).any()
    ]
    # No finer than float32 tells such products apart, where normal cells are all alike.
    finest = FINEST * kept.square().sum(1).mean()
    unit = torch.cat(distances).mean().clamp(min=finest).clamp(min=1e-12).rsqrt()
    return NearestNormal(scale * unit, kept * unit, owners)


def spread_out(rows: Tensor, count: int, seed: int) -> Tensor:
    """Roth et al. 2022, algorithm 1: greedily, each time the row (n, c) farthest from those chosen; int64 (count,)."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(rows.shape[1], SKETCH, generator=generator).to(rows.device) / SKETCH**0.5
    sketch = rows @ directions
    lengths = sketch.square().sum(1)
    nearest = torch.full_like(lengths, torch.inf)
    chosen = torch.zeros(count, dtype=torch.int64, device=rows.device)
    for place in range(1, count):
        last = chosen[place - 1]
        nearest = torch.minimum(nearest, lengths - 2 * (sketch @ sketch[last]) + lengths[last])
        chosen[place] = nearest.argmax()
    return chosen

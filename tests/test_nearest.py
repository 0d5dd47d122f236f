"""Kept normal cells: which are kept, how far others lie from them, and what that finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.nearest import CANDIDATES, SKETCH, NearestNormal, SampledCells, nearest_normal, spread_out

CHANNELS, GRID = 6, 8


def clusters(count: int, centres: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(count, CHANNELS) around the centres (k, CHANNELS) in turn."""
    noise = 0.1 * torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return centres[torch.arange(count) % len(centres)] + noise


@pytest.fixture(scope="module")
def centres() -> torch.Tensor:
    return torch.randn(7, CHANNELS, generator=torch.Generator().manual_seed(1))


def cells_of(rows: torch.Tensor) -> torch.Tensor:
    """Photographs (n, C, GRID, GRID) that show the same everywhere: rows (n, C)."""
    return rows[:, :, None, None].expand(-1, -1, GRID, GRID)


def test_distances_are_those_from_the_nearest_kept_cell(centres: torch.Tensor) -> None:
    rows = clusters(400, centres)
    nearest = nearest_normal(rows.unflatten(0, (8, 50)), [CHANNELS], 30, seed=0)
    assert nearest.cells.shape == (30, CHANNELS)
    found = nearest.distance(cells_of(rows[:9]))
    expected = torch.cdist(rows[:9] * nearest.scale, nearest.cells).amin(1).square()
    torch.testing.assert_close(found, expected[:, None, None].expand(9, GRID, GRID), atol=1e-3, rtol=1e-3)


def test_every_place_is_measured_by_itself(centres: torch.Tensor) -> None:
    nearest = nearest_normal(clusters(400, centres).unflatten(0, (8, 50)), [CHANNELS], 30, seed=0)
    photograph = cells_of(clusters(1, centres)).clone()
    photograph[:, :, 4, 2] = 40.0
    found = nearest.distance(photograph)[0]
    rest = torch.cat([found[:4].flatten(), found[4, :2], found[4, 3:], found[5:].flatten()])
    assert found[4, 2] > 100 * rest.max()


@pytest.mark.parametrize(("photographs", "cells", "count"), [(4, 100, 200), (40, 50, 60)])
def test_cells_of_new_photographs_lie_at_1(photographs: int, cells: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def shown(some: int) -> torch.Tensor:
        """Every photograph has a character of its own, about which its cells lie."""
        character = torch.randn(some, 1, CHANNELS, generator=generator)
        return character + 0.5 * torch.randn(some, cells, CHANNELS, generator=generator)

    found = []
    for _ in range(20):
        nearest = nearest_normal(shown(photographs), [CHANNELS], count, seed=0)
        found.append(nearest.distance(cells_of(shown(8).flatten(0, 1))).mean().item())
    assert np.mean(found) == pytest.approx(1, rel=0.25)


def test_kept_cells_leave_no_kind_out() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(7, 3 * SKETCH, generator=generator)
    rows = kinds[torch.arange(500) % 6] + 0.1 * torch.randn(500, 3 * SKETCH, generator=generator)
    rare = torch.cat([rows, kinds[6:]])
    chosen = spread_out(rare, 7, seed=0)
    assert len(set(chosen.tolist())) == 7
    assert 500 in chosen
    assert {int(i) % 6 for i in chosen if i < 500} == set(range(6))


def test_what_is_normal_somewhere_is_normal_everywhere(centres: torch.Tensor) -> None:
    rows = clusters(400, centres)
    nearest = nearest_normal(rows.unflatten(0, (8, 50)), [CHANNELS], 60, seed=0)
    photograph = rows[: GRID * GRID].T.reshape(1, CHANNELS, GRID, GRID)
    turned = photograph.rot90(1, (2, 3))
    torch.testing.assert_close(nearest.distance(turned), nearest.distance(photograph).rot90(1, (1, 2)))


def test_stages_count_alike_and_channels_as_the_extractor_gives_them(centres: torch.Tensor) -> None:
    raw = clusters(300, centres)
    plain = nearest_normal(raw.unflatten(0, (6, 50)), [2, 4], 20, seed=0)
    larger = raw * torch.tensor([50.0, 50.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(
        nearest_normal(larger.unflatten(0, (6, 50)), [2, 4], 20, seed=0).distance(cells_of(larger)),
        plain.distance(cells_of(raw)),
        rtol=1e-3,
        atol=1e-3,
    )
    variances = (raw * plain.scale).var(0)
    torch.testing.assert_close(variances[:2].sum(), variances[2:].sum(), rtol=1e-3, atol=0)
    assert plain.scale.unique().numel() == 2


def test_an_images_distances_do_not_depend_on_its_company(centres: torch.Tensor) -> None:
    nearest = nearest_normal(clusters(400, centres).unflatten(0, (8, 50)), [CHANNELS], 30, seed=0)
    photographs = torch.randn(5, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(4))
    together = nearest.distance(photographs)
    assert all(torch.equal(nearest.distance(photographs[i : i + 1])[0], together[i]) for i in range(5))


def test_few_photographs_keep_half_of_their_cells(centres: torch.Tensor) -> None:
    nearest = nearest_normal(clusters(4, centres).unflatten(0, (2, 2)), [CHANNELS], 2000, seed=0)
    assert nearest.cells.shape == (2, CHANNELS)


def test_photographs_that_are_all_the_same_do_no_harm() -> None:
    same = torch.ones(2, 2, CHANNELS)
    nearest = nearest_normal(same, [CHANNELS], 2000, seed=0)
    assert nearest.distance(cells_of(same[0])).max() < 1
    other = nearest.distance(cells_of(1.5 * same[0]))
    assert other.isfinite().all() and other.min() > 1


def test_samples_come_from_every_photograph() -> None:
    sampled = SampledCells(CANDIDATES // 5, seed=0)
    cells = torch.arange(3.0)[:, None, None, None].expand(3, 1, GRID, GRID)
    sampled.add(cells[:2])
    sampled.add(cells[2:])
    assert sampled.samples()[..., 0].tolist() == [[0.0] * 5, [1.0] * 5, [2.0] * 5]
    every = SampledCells(2, seed=0)
    photograph = torch.randn(1, 2, GRID, GRID)
    every.add(photograph)
    assert sorted(every.samples()[0, :, 0].tolist()) == sorted(photograph[0, 0].flatten().tolist())


def test_distances_have_gradients(centres: torch.Tensor) -> None:
    nearest = NearestNormal(torch.ones(CHANNELS), centres)
    cells = cells_of(clusters(1, centres) + 1.0).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nearest.distance(cells).sum(), cells)
    closer = (cells - 0.1 * gradient).detach()
    assert nearest.distance(closer).sum() < nearest.distance(cells.detach()).sum()

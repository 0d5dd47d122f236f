"""Kept normal cells: which are kept, how far others lie from them, and what that finds."""

from __future__ import annotations

import pytest
import torch

from pipeline.nearest import CANDIDATES, Candidates, NearestNormal, coarser, nearest_normal, spread_out

CHANNELS, GRID = 6, 8
ALL = torch.ones(CHANNELS, dtype=torch.bool)
ONES = torch.ones(CHANNELS)


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
    nearest = nearest_normal(rows, [ALL], ONES, 30, seed=0)
    assert nearest.cells.shape == (30, CHANNELS)
    found = nearest.distance(cells_of(rows[:9]))
    expected = torch.cdist(rows[:9] * nearest.scale, nearest.cells).amin(1).square()
    torch.testing.assert_close(found, expected[:, None, None].expand(9, GRID, GRID), atol=1e-3, rtol=1e-3)


def test_every_place_of_the_coarser_grid_is_measured_by_itself(centres: torch.Tensor) -> None:
    nearest = nearest_normal(clusters(400, centres), [ALL], ONES, 30, seed=0)
    photograph = cells_of(clusters(1, centres)).clone()
    photograph[:, :, 4:6, 2:4] = 40.0
    found = nearest.distance(photograph)[0]
    assert found[4:6, 2:4].min() > 100 * found[:3].max()
    assert found.max() == found[4:6, 2:4].max()


def test_normal_cells_lie_at_1(centres: torch.Tensor) -> None:
    nearest = nearest_normal(clusters(2000, centres), [ALL], ONES, 50, seed=0)
    assert nearest.distance(cells_of(clusters(700, centres, seed=3))).mean() == pytest.approx(1, rel=0.1)


def test_kept_cells_leave_no_kind_out(centres: torch.Tensor) -> None:
    rare = torch.cat([clusters(500, centres[:6]), clusters(1, centres[6:], seed=2)])
    chosen = spread_out(rare, 7, seed=0)
    assert len(set(chosen.tolist())) == 7
    assert 500 in chosen
    assert {int(i) % 6 for i in chosen if i < 500} == set(range(6))


def test_what_is_normal_somewhere_is_normal_everywhere(centres: torch.Tensor) -> None:
    rows = clusters(400, centres)
    nearest = nearest_normal(rows, [ALL], ONES, 60, seed=0)
    photograph = rows[: GRID * GRID].T.reshape(1, CHANNELS, GRID, GRID)
    turned = photograph.rot90(1, (2, 3))
    torch.testing.assert_close(nearest.distance(turned), nearest.distance(photograph).rot90(1, (1, 2)))


def test_stages_count_alike_and_channels_as_the_extractor_gives_them(centres: torch.Tensor) -> None:
    raw = clusters(300, centres)
    stages = [torch.tensor([0, 1, 0, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 1, 1]).bool()]
    plain = nearest_normal(raw, stages, ONES, 20, seed=0)
    larger = raw.clone()
    larger[:, 1] *= 50
    assert plain.scale[[0, 2]].eq(0).all()
    torch.testing.assert_close(
        nearest_normal(larger, stages, ONES, 20, seed=0).distance(cells_of(larger)),
        plain.distance(cells_of(raw)),
        rtol=2e-2,
        atol=2e-2,
    )
    deviation = torch.tensor([3.0, 0.2, 1.0, 2.0, 5.0, 0.7])
    standardised = nearest_normal(raw / deviation, stages, deviation, 20, seed=0)
    torch.testing.assert_close(
        standardised.distance(cells_of(raw / deviation)), plain.distance(cells_of(raw)), rtol=2e-2, atol=2e-2
    )


def test_an_images_distances_do_not_depend_on_its_company(centres: torch.Tensor) -> None:
    nearest = nearest_normal(clusters(400, centres), [ALL], ONES, 30, seed=0)
    photographs = torch.randn(5, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(4))
    together = nearest.distance(photographs)
    assert all(torch.equal(nearest.distance(photographs[i : i + 1])[0], together[i]) for i in range(5))


def test_few_and_equal_photographs_do_no_harm() -> None:
    same = torch.ones(4, CHANNELS)
    nearest = nearest_normal(same, [ALL], ONES, 2000, seed=0)
    assert nearest.cells.shape == (2, CHANNELS)
    assert nearest.distance(cells_of(same)).isfinite().all()


def test_candidates_come_from_every_photograph(centres: torch.Tensor) -> None:
    photographs = CANDIDATES // 5
    drawn = Candidates(photographs, seed=0)
    cells = torch.arange(3.0)[:, None, None, None].expand(3, 1, GRID, GRID)
    drawn.add(cells[:2])
    drawn.add(cells[2:])
    assert drawn.rows().flatten().tolist() == [0.0] * 5 + [1.0] * 5 + [2.0] * 5
    every = Candidates(2, seed=0)
    photograph = torch.randn(1, 2, GRID, GRID)
    every.add(photograph)
    assert sorted(every.rows()[:, 0].tolist()) == sorted(coarser(photograph)[0, 0].flatten().tolist())


def test_distances_have_gradients(centres: torch.Tensor) -> None:
    nearest = NearestNormal(ONES, centres)
    cells = cells_of(clusters(1, centres) + 1.0).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nearest.distance(cells).sum(), cells)
    closer = (cells - 0.1 * gradient).detach()
    assert nearest.distance(closer).sum() < nearest.distance(cells.detach()).sum()

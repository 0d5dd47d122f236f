"""Gaussians of kinds of cells against plain numpy, and what they know that those of places do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.gaussian import fit_general, fit_places, place_projection
from pipeline.kinds import (
    ASKED,
    GROUP,
    LEAST_USUAL,
    LEAST_VARIANCE,
    Grouped,
    KindGaussians,
    KindMoments,
    kind_centres,
    kind_gaussians,
)

GRID, CHANNELS, KINDS = 8, 6, 5


@pytest.fixture(scope="module")
def shapes() -> torch.Tensor:
    """(KINDS, CHANNELS, CHANNELS): how the cells of each kind vary."""
    return 0.3 * torch.randn(KINDS, CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def means() -> torch.Tensor:
    """(KINDS, CHANNELS), far apart."""
    return 10 * torch.randn(KINDS, CHANNELS, generator=torch.Generator().manual_seed(2))


def photographs(count: int, means: torch.Tensor, shapes: torch.Tensor, seed: int) -> torch.Tensor:
    """(count, C, GRID, GRID): every cell is of a kind drawn for it alone."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(KINDS, (count, GRID, GRID), generator=generator)
    noise = torch.randn(count, GRID, GRID, CHANNELS, generator=generator)
    return (means[kinds] + torch.einsum("nxyd,nxycd->nxyc", noise, shapes[kinds])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def normal(means: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
    return photographs(40, means, shapes, seed=3)


def fitted(batches: list[torch.Tensor], *, kinds: int = KINDS, seed: int = 0) -> KindGaussians:
    general = fit_general(batches)
    samples = torch.cat(batches).permute(0, 2, 3, 1).flatten(0, 2)
    moments = KindMoments(samples, kinds, place_projection(general, CHANNELS, seed), seed)
    for batch in batches:
        moments.add(batch)
    return kind_gaussians(moments)


def of_kinds(gaussians: KindGaussians, rows: np.ndarray, normal: np.ndarray, count: int) -> np.ndarray:
    """The least of the distances of rows (n, C) under the Gaussians of the `count` nearest kinds, told from normal (m, C)."""
    finding, centres = gaussians.finding.double().numpy(), gaussians.centres.double().numpy()
    projection = gaussians.projection.double().numpy()

    def nearest(vectors: np.ndarray) -> np.ndarray:
        return ((vectors @ finding.T)[:, None] - centres).__pow__(2).sum(-1).argsort(1)

    own, white = nearest(normal)[:, 0], normal @ projection.T
    parts = [white[own == kind] for kind in range(len(centres))]
    within = sum(len(part) * np.cov(part.T, bias=True) for part in parts) / len(white)
    found = []
    for part in parts:
        shrinkage = CHANNELS / (CHANNELS + len(part))
        covariance = (
            (1 - shrinkage) * np.cov(part.T, bias=True) + shrinkage * within + LEAST_VARIANCE * np.eye(CHANNELS)
        )
        centred = rows @ projection.T - part.mean(0)
        found.append(np.einsum("nc,cd,nd->n", centred, np.linalg.inv(covariance), centred) / CHANNELS)
    return np.take_along_axis(np.stack(found, 1), nearest(rows)[:, :count], 1).min(1)


def test_the_distance_equals_numpys(normal: torch.Tensor, means: torch.Tensor, shapes: torch.Tensor) -> None:
    gaussians = fitted(list(normal.split(7)))
    others = photographs(5, means, 2 * shapes, seed=4)
    rows, learned = (x.permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for x in (others, normal))
    expected = of_kinds(gaussians, rows, learned, ASKED)
    np.testing.assert_allclose(gaussians.distance(others).flatten(), expected, rtol=5e-3)


def test_batches_do_not_matter_to_what_is_learned(normal: torch.Tensor) -> None:
    one, other = fitted([normal]), fitted(list(normal.split(3)))
    torch.testing.assert_close(one.distance(normal), other.distance(normal), rtol=1e-3, atol=1e-3)


def test_a_photograph_is_told_the_same_in_any_company(normal: torch.Tensor) -> None:
    gaussians = fitted([normal])
    alone = [gaussians.distance(photograph[None])[0] for photograph in normal[:8]]
    together = gaussians.distance(normal[:8])
    backwards = gaussians.distance(normal[:8].flip(0)).flip(0)
    assert torch.equal(torch.stack(alone), together)
    assert torch.equal(together, backwards)


def test_what_lies_elsewhere_is_normal_and_what_mixes_two_kinds_is_not(
    normal: torch.Tensor, means: torch.Tensor, shapes: torch.Tensor
) -> None:
    generator = torch.Generator().manual_seed(5)
    kinds = torch.arange(GRID * GRID).view(GRID, GRID) % KINDS  # every place has its own
    at_places = (means[kinds] + 0.1 * torch.randn(60, GRID, GRID, CHANNELS, generator=generator)).permute(0, 3, 1, 2)
    of_kind, general = fitted([at_places]), fit_general([at_places])
    of_places = fit_places([at_places], general, CHANNELS, seed=0)
    moved = at_places.roll(1, dims=2)
    assert of_kind.distance(moved).mean() == pytest.approx(of_kind.distance(at_places).mean().item(), rel=0.01)
    assert of_places.distance(moved).mean() > 3 * of_places.distance(at_places).mean()
    # A mixture lies amid all cells: near the Gaussian of all, far from every kind.
    mixed = (0.5 * (at_places + moved))[:5]
    assert of_kind.distance(mixed).median() > 20 * of_kind.distance(at_places).median()
    assert general.distance(mixed).median() < 2 * general.distance(at_places).median()


def test_normal_cells_lie_at_about_1(normal: torch.Tensor, means: torch.Tensor, shapes: torch.Tensor) -> None:
    new = photographs(20, means, shapes, seed=6)
    assert fitted([normal]).distance(new).mean().item() == pytest.approx(1, abs=0.3)


def test_what_is_usual_at_a_place_counts_less_there(normal: torch.Tensor) -> None:
    def wild(images: torch.Tensor, columns: slice, seed: int) -> torch.Tensor:
        changed = images.clone()
        changed[..., columns] += 0.7 * torch.randn(
            images[..., columns].shape, generator=torch.Generator().manual_seed(seed)
        )
        return changed

    left = wild(normal, slice(0, 4), 8)
    plain = fitted([left])
    gaussians = plain.counting_by_place(plain.distance(left).mean(0))
    before, after = plain.distance(left).mean(0), gaussians.distance(left).mean(0)
    assert before[:, :2].mean() > 1.5 * before[:, 6:].mean()
    assert after[:, :2].mean() == pytest.approx(1, abs=0.2)
    assert after[:, 6:].mean() == pytest.approx(1, abs=0.2)
    right = wild(left, slice(6, 8), 9)
    assert gaussians.distance(right)[:, :, 6:].mean() > 1.5
    assert plain.distance(right)[:, :, 6:].mean() < 1.5 * plain.distance(right)[:, :, :2].mean()


def test_where_nearly_nothing_is_seen_next_to_nothing_does_not_count_much(normal: torch.Tensor) -> None:
    gaussians = fitted([normal])
    mean = gaussians.distance(normal).mean(0)
    mean[: GRID // 2] = 1e-6
    usual = gaussians.counting_by_place(mean).usual
    assert usual is not None and usual[0].min() == pytest.approx(LEAST_USUAL * mean.mean().item())
    nothing = gaussians.counting_by_place(torch.zeros(GRID, GRID))
    assert nothing.distance(normal).isfinite().all()


def test_the_distance_has_a_gradient(normal: torch.Tensor) -> None:
    gaussians = fitted([normal])
    x = (normal[:2] + 1).requires_grad_()
    gaussians.distance(x).sum().backward()
    step = x.detach() - 1e-3 * x.grad / x.grad.norm()
    assert gaussians.distance(step).sum() < gaussians.distance(x.detach()).sum()


@pytest.mark.parametrize("kinds", [8, 64, 256])
def test_an_empty_background_is_normal_whatever_its_share(normal: torch.Tensor, kinds: int) -> None:
    half_empty = normal.repeat(25, 1, 1, 1)  # 32 000 cells of the background
    half_empty[:, :, : GRID // 2] = 12.0
    shown, strange = half_empty[:40], half_empty[:40].clone()
    strange[:, :, 1, 2] = half_empty.mean((0, 2, 3))  # amid all cells: of no kind
    others = []
    for seed in range(3):
        gaussians = fitted(list(half_empty.split(100)), kinds=kinds, seed=seed)
        distances = gaussians.distance(shown)
        assert distances[:, : GRID // 2].max() < 0.1
        assert gaussians.distance(strange)[:, 1, 2].min() > 20
        others.append(float(distances[:, GRID // 2 :].mean()))
    assert np.median(others) < 1  # now and then two of eight kinds fall together, as rounding has it


def test_a_photograph_of_full_size_is_told_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds, dimensions, channels = 512, 100, 192
    gaussians = KindGaussians(
        torch.randn(64, channels, generator=generator) / 8,
        torch.randn(kinds, 64, generator=generator),
        torch.randn(dimensions, channels, generator=generator) / 8,
        torch.randn(kinds, dimensions, generator=generator),
        torch.randn(kinds, dimensions, dimensions, generator=generator) / 10,
        torch.rand(32, 32, generator=generator) + 0.5,
    )
    images = torch.randn(4, channels, 32, 32, generator=generator)
    together = gaussians.distance(images)
    assert torch.equal(together, gaussians.distance(images.flip(0)).flip(0))
    assert torch.equal(together, torch.cat([gaussians.distance(image[None]) for image in images]))


@pytest.mark.parametrize("kinds", [1, 2, 3000])
def test_as_many_kinds_as_there_are(normal: torch.Tensor, kinds: int) -> None:
    gaussians = fitted([normal], kinds=kinds)
    assert len(gaussians.centres) == min(kinds, normal[:, 0].numel())
    assert gaussians.distance(normal).isfinite().all()


def test_photographs_that_show_nothing_have_one_normal_cell() -> None:
    grey = torch.full((4, CHANNELS, GRID, GRID), 0.5)
    gaussians = fitted([grey])
    assert gaussians.distance(grey).max() < 1
    grey[:, :, 2, 3] = 0.9
    assert gaussians.distance(grey)[:, 2, 3].min() > 100


def test_groups_hold_every_vector_once_and_only_its_kind() -> None:
    kinds = torch.tensor([3, 0, 3, 3, 1] * 20 + [6])
    vectors = torch.arange(1.0, len(kinds) + 1)[:, None]
    groups = Grouped.by(kinds, 7)
    together = groups.side_by_side(vectors)
    assert together.shape == (len(groups.kinds), GROUP, 1)
    assert torch.equal(together.flatten()[groups.slots], vectors[:, 0])
    assert together.sum() == vectors.sum(), "nothing but the vectors"
    for group, kind in zip(together, groups.kinds, strict=True):
        members = group[group > 0].long() - 1
        assert (kinds[members] == kind).all()


def test_centres_are_the_means_of_what_is_nearest_to_them(means: torch.Tensor) -> None:
    noise = torch.randn(500, CHANNELS, generator=torch.Generator().manual_seed(7))
    rows = means[torch.arange(500) % KINDS] + 0.1 * noise
    centres = kind_centres(rows, 12, seed=0)
    nearest = torch.cdist(rows, centres).argmin(1)
    spread = torch.stack(
        [rows[nearest == kind].var(0).sum() for kind in nearest.unique() if (nearest == kind).sum() > 1]
    )
    assert spread.mean() < 0.02 * rows.var(0).sum()
    assert torch.equal(centres, kind_centres(rows, 12, seed=0))

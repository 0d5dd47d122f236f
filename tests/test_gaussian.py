"""The Gaussians of residuals against plain numpy, and how they find what lies apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.gaussian import Moments, explained_by_place, fit_general, fit_places

GRID, CHANNELS = 4, 6


@pytest.fixture(scope="module")
def residuals() -> torch.Tensor:
    """(200, 6, 4, 4) with correlated channels, and a mean and scale of its own at every place."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(CHANNELS, CHANNELS, generator=generator)
    white = torch.randn(200, CHANNELS, GRID, GRID, generator=generator)
    scale = torch.linspace(0.5, 2, GRID * GRID).view(GRID, GRID)
    return torch.einsum("dc,ncxy->ndxy", mix, white) * scale + torch.randn(CHANNELS, GRID, GRID, generator=generator)


def test_the_general_distance_equals_numpys(residuals: torch.Tensor) -> None:
    gaussian = fit_general(residuals.split(64))
    cells = residuals.permute(0, 2, 3, 1).reshape(-1, CHANNELS).double().numpy()
    covariance = np.cov(cells.T, bias=True)
    covariance *= 1 + 0.01 * np.eye(CHANNELS)
    centred = cells - cells.mean(0)
    expected = np.einsum("nc,cd,nd->n", centred, np.linalg.inv(covariance), centred) / CHANNELS
    np.testing.assert_allclose(gaussian.distance(residuals).flatten(), expected, rtol=1e-3)


def test_the_distance_at_a_place_equals_numpys(residuals: torch.Tensor) -> None:
    general = fit_general([residuals])
    gaussian = fit_places(residuals.split(64), general, CHANNELS, seed=0)
    place = (1, 3)
    white = general.whitening[0].double().numpy() @ residuals[:, :, *place].double().numpy().T
    shrinkage = CHANNELS / (CHANNELS + 200)
    covariance = (1 - shrinkage) * np.cov(white) + shrinkage * np.eye(CHANNELS)
    centred = white - white.mean(1, keepdims=True)
    expected = np.einsum("cn,cd,dn->n", centred, np.linalg.inv(covariance), centred) / CHANNELS
    np.testing.assert_allclose(gaussian.distance(residuals)[:, *place], expected, rtol=2e-3)


@pytest.mark.parametrize(("spread", "expected"), [(0.0, 0.0), (1.0, 0.5), (10.0, 0.99)])
@pytest.mark.parametrize("count", [5, 400])
def test_places_explain_what_lies_between_them(spread: float, expected: float, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    means = spread * torch.randn(CHANNELS, 16, 16, generator=generator)
    moments = Moments(torch.eye(CHANNELS), by_place=True)
    for cells in (means + torch.randn(count, CHANNELS, 16, 16, generator=generator)).split(3):
        moments.add(cells)
    assert explained_by_place(moments) == pytest.approx(expected, abs=0.05)


def test_batches_do_not_matter(residuals: torch.Tensor) -> None:
    general = fit_general([residuals])
    for one, other in (
        (general, fit_general(residuals.split(7))),
        (fit_places([residuals], general, CHANNELS, 0), fit_places(residuals.split(7), general, CHANNELS, 0)),
    ):
        torch.testing.assert_close(one.distance(residuals), other.distance(residuals), rtol=1e-3, atol=1e-3)


def test_what_is_normal_elsewhere_is_only_seen_by_the_gaussian_of_its_place(residuals: torch.Tensor) -> None:
    general = fit_general([residuals])
    places = fit_places([residuals], general, CHANNELS, seed=0)
    misplaced = residuals.roll(8, dims=2).roll(3, dims=3)
    assert places.distance(misplaced).mean() > 2 * places.distance(residuals).mean()
    assert general.distance(misplaced).mean() == pytest.approx(general.distance(residuals).mean().item(), rel=0.01)


def test_with_reach_a_cell_is_measured_where_near_it_is_expected_most(residuals: torch.Tensor) -> None:
    places = fit_places([residuals], fit_general([residuals]), CHANNELS, seed=0)
    some = residuals[:3]
    found = places.distance(some, 1)
    for y, x in np.ndindex(GRID, GRID):
        near = [
            # What the cell would be told if it lay there.
            places.distance(some[:, :, y, x, None, None].expand(some.shape))[:, near_y, near_x]
            for near_y, near_x in np.ndindex(GRID, GRID)
            if abs(near_y - y) + abs(near_x - x) <= 1
        ]
        torch.testing.assert_close(found[:, y, x], torch.stack(near).amin(0))
    shifted = residuals.roll(1, dims=3)
    assert places.distance(shifted)[..., 1:].mean() > 2 * places.distance(residuals).mean()
    torch.testing.assert_close(places.distance(shifted, 2 * GRID), places.distance(residuals, 2 * GRID).roll(1, dims=2))
    general = fit_general([residuals])
    assert torch.equal(general.distance(some, 1), general.distance(some))


def test_channels_of_any_scale_count_alike_and_constant_ones_do_no_harm(residuals: torch.Tensor) -> None:
    scale = torch.tensor([0.1, 1.0, 3.0, 1.0, 0.3, 1.0]).view(-1, 1, 1)
    plain, scaled = fit_general([residuals]), fit_general([residuals * scale])
    torch.testing.assert_close(scaled.distance(residuals * scale), plain.distance(residuals), rtol=1e-2, atol=1e-2)
    constant = residuals.clone()
    constant[:, 2] = 5.0
    assert fit_general([constant]).distance(constant).isfinite().all()

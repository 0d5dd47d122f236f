"""Where cells lie, as channels."""

from __future__ import annotations

import pytest
import torch

from pipeline.placed import placed


@pytest.mark.parametrize("side", [2, 5, 64])
def test_places_vary_by_1_along_rows_and_columns(side: int) -> None:
    cells = torch.randn(3, 4, side, side)
    found = placed(cells)
    assert torch.equal(found[:, :4], cells)
    places = found[:, 4:].double()
    torch.testing.assert_close(places.mean((2, 3)), torch.zeros(3, 2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(places.var((2, 3), unbiased=False), torch.ones(3, 2, dtype=torch.float64))
    down, right = places[0]
    assert (down.diff(dim=0) > 0).all() and (down.diff(dim=1) == 0).all()
    assert torch.equal(right, down.T)
    assert torch.equal(places[0], places[2])

"""Connected anomalous regions of a map, and the same in pixels of the photograph."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from pipeline.regions import Region, find_regions


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_regions_are_8_connected_and_sorted_by_peak(dtype):
    drawing = """
        . . . . . . . .
        . 2 . . . . . 9
        . . 3 . . . . .
        . . . 2 . 1 1 .
        . . . . . . . .
        5 . . . . . . .
    """
    rows = drawing.replace(".", "0").split()
    found = find_regions(np.array(rows, dtype).reshape(6, 8), 1.0)
    assert found == [
        Region(x=7, y=1, width=1, height=1, area=1, peak=9.0),
        Region(x=0, y=5, width=1, height=1, area=1, peak=5.0),
        Region(x=1, y=1, width=3, height=3, area=3, peak=3.0),
    ]
    assert all(type(value) in (int, float) for region in found for value in astuple(region))


def test_a_map_below_the_threshold_has_no_region():
    assert find_regions(np.full((4, 4), 1.5, np.float16), 1.5) == []
    (whole,) = find_regions(np.full((4, 5), 1.5, np.float16), 1.4)
    assert whole == Region(x=0, y=0, width=5, height=4, area=20, peak=1.5)


def test_regions_stay_on_the_photograph() -> None:
    region = Region(x=255, y=0, width=1, height=256, area=256, peak=1.0).scaled(0.5, 2.0)
    assert (region.x, region.width, region.y, region.height) == (127, 1, 0, 512)

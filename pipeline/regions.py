"""Connected anomalous regions: where on a map, and hence on its photograph, something is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Region:
    """One connected anomalous region: bounding box and area in pixels (of the map or the photograph), highest score."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float

    def scaled(self, x_scale: float, y_scale: float) -> Region:
        """The region in an image so many times as wide and high: the box covers it wholly, nothing becomes empty."""
        x, y = math.floor(self.x * x_scale), math.floor(self.y * y_scale)
        return replace(
            self,
            x=x,
            y=y,
            width=max(1, math.ceil((self.x + self.width) * x_scale) - x),
            height=max(1, math.ceil((self.y + self.height) * y_scale) - y),
            area=max(1, round(self.area * x_scale * y_scale)),
        )


def find_regions(map_hw: np.ndarray, threshold: float) -> list[Region]:
    """Connected parts (8-connectivity) of one map above `threshold`, in pixels of the map, largest peak first."""
    labels, _ = ndimage.label(map_hw > threshold, structure=np.ones((3, 3)))
    found = []
    for label, (ys, xs) in enumerate(ndimage.find_objects(labels), start=1):
        inside = map_hw[ys, xs][labels[ys, xs] == label]
        found.append(
            Region(xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start, inside.size, float(inside.max()))
        )
    return sorted(found, key=lambda region: -region.peak)

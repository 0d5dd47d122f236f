"""Localisation maps as rows of an Arrow table, and back: half floats, or eight bits with each map's range."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MapFormat = Literal["float16", "uint8", "none"]


def maps_schema(map_format: MapFormat) -> pa.Schema:
    """One row an image; `map` holds height * width values, row by row.

    uint8 maps carry their range: value = lo + map / 255 * (hi - lo). Raises ValueError for "none".
    """
    columns = [("image_id", pa.string()), ("height", pa.int32()), ("width", pa.int32())]
    if map_format == "float16":
        return pa.schema([*columns, ("map", pa.list_(pa.float16()))])
    if map_format == "uint8":
        ranges = [("lo", pa.float32()), ("hi", pa.float32())]
        return pa.schema([*columns, ("map", pa.list_(pa.uint8())), *ranges])
    raise ValueError(f"no maps are stored as {map_format!r}")


def maps_table(image_ids: list[str], maps_nhw: NDArray[np.floating], map_format: MapFormat) -> pa.Table:
    """(N, H, W) maps as rows of maps_schema(map_format). Raises ValueError for values float16 cannot hold."""
    count, height, width = maps_nhw.shape
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is refused in words
        half_nhw = maps_nhw.astype(np.float16)
    if not np.isfinite(half_nhw).all():
        bad = int(np.argmin(np.isfinite(half_nhw).all(axis=(1, 2))))
        raise ValueError(f"map {bad} of the shard ({image_ids[bad]}) holds values that float16 cannot")
    columns = {
        "image_id": pa.array(image_ids, pa.string()),
        "height": pa.array(np.full(count, height, np.int32)),
        "width": pa.array(np.full(count, width, np.int32)),
    }
    if map_format == "uint8":
        lo = maps_nhw.min(axis=(1, 2)).astype(np.float32)
        hi = maps_nhw.max(axis=(1, 2)).astype(np.float32)
        span = np.where(hi > lo, hi - lo, 1)[:, None, None]
        steps = np.rint((maps_nhw.astype(np.float32) - lo[:, None, None]) * (255 / span))
        columns |= {
            "map": _lists(np.clip(steps, 0, 255).astype(np.uint8)),
            "lo": pa.array(lo),
            "hi": pa.array(hi),
        }
    else:
        columns["map"] = _lists(half_nhw)
    return pa.table(columns, schema=maps_schema(map_format))


def _lists(values_nhw: NDArray[Any]) -> pa.ListArray:
    """(N, H, W) as N lists of H * W values."""
    per_image = values_nhw[0].size
    offsets = np.arange(len(values_nhw) + 1, dtype=np.int64) * per_image
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values_nhw.reshape(-1)))


def maps_of(rows: pa.Table) -> NDArray[np.float16]:
    """(n, H, W) of one row group; a shard's maps share their size."""
    height, width = rows["height"][0].as_py(), rows["width"][0].as_py()
    stored = rows["map"].chunk(0).flatten().to_numpy().reshape(len(rows), height, width)
    if stored.dtype == np.float16:
        return stored
    lo, hi = (rows[name].to_numpy()[:, None, None] for name in ("lo", "hi"))
    return (lo + stored.astype(np.float32) / 255 * (hi - lo)).astype(np.float16)

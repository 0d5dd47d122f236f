"""Result tables with made rows."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipeline.regions import Region
from pipeline.results import FailureRow, ScoreRow, write_shard
from pipeline.storage import Location

NIGHT = "2025-03-09"
SCORED_AT = datetime(2025, 3, 9, 2, 30, 15, 250_000, tzinfo=UTC)


def score_row(number: int, **changes: Any) -> ScoreRow:
    row = ScoreRow(
        image_id=f"{number:032x}",
        archive="s3://line/night.tar",
        member=f"part/{number}.png",
        width=640,
        height=480,
        score=0.1 * number,
        kl_score=0.01 * number,
        feature_score=1 / 3,
        threshold=0.35,
        is_anomalous=0.1 * number > 0.35,
        regions=tuple(Region(i, 2 * i, 3, 4, 5 + i, 0.1 * number) for i in range(number % 3)),
        model_version="widget-0123abcd",
        scored_at=SCORED_AT,
    )
    return dataclasses.replace(row, **changes)


def failure_row(number: int) -> FailureRow:
    return FailureRow(f"f{number}", "s3://line/night.tar", f"bad/{number}.png", "decode", "truncated", "ended early")


def some_maps(count: int, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(count).uniform(0, 5, (count, height, width)).astype(np.float32)


def write(results: Location, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "category": "widget",
        "night": NIGHT,
        "shard": "night.tar-00000",
        "scores": [score_row(i) for i in range(3)],
        "maps_nhw": some_maps(3),
        "failures": [failure_row(0)],
        "map_format": "float16",
    }
    write_shard(results, **(arguments | changes))

"""What runs/*.json say, as tables: a row for a run, for each of its archives, for each normal score of its models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.night_files import file_name
from pipeline.storage import Location

READ_THREADS = 16

RUNS_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("run", "night")],
        *[(name, pa.timestamp("s", tz="UTC")) for name in ("started", "finished")],
        *[(name, pa.float64()) for name in ("seconds", "images_per_second")],
        *[(name, pa.int64()) for name in ("images", "scored", "failed", "anomalous", "skipped_shards", "lost_shards")],
        ("exit_status", pa.int64()),
        ("record", pa.string()),
    ]
)
ARCHIVES_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("run", "night", "category", "archive", "kind")],
        *[(name, pa.int64()) for name in ("scored", "failed", "anomalous", "bytes")],
        ("seconds", pa.float64()),
    ]
)
CALIBRATION_SCHEMA = pa.schema(
    [("category", pa.string()), ("model_version", pa.string()), ("rank", pa.int32()), ("normal_score", pa.float64())]
)

RECORDS = {"runs": RUNS_SCHEMA, "archives": ARCHIVES_SCHEMA, "calibration": CALIBRATION_SCHEMA}


def run_tables(results: Location, categories: Sequence[str] = (), nights: Sequence[str] = ()) -> dict[str, pa.Table]:
    """The tables of RECORDS, of these categories and nights only where given. Raises UserError for a damaged record."""
    with ThreadPoolExecutor(READ_THREADS) as threads:
        found = list(threads.map(_tables, _files(results, nights)))
    # A model that several runs scored with is one model, and a year of nights names it every time.
    normal_scores: dict[tuple[str, str], pa.Array] = {}
    for each in found:
        for model, scores in each.normal_scores.items():
            normal_scores.setdefault(model, scores)
    joined = {
        "runs": pa.concat_tables([RUNS_SCHEMA.empty_table(), *(each.runs for each in found)]),
        "archives": pa.concat_tables([ARCHIVES_SCHEMA.empty_table(), *(each.archives for each in found)]),
        "calibration": _calibration(normal_scores),
    }
    wanted = pa.array(categories, pa.string())
    return {
        name: table.filter(pc.is_in(table["category"], value_set=wanted))
        if categories and "category" in table.column_names
        else table
        for name, table in joined.items()
    }


def run_records(results: Location, nights: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records themselves, the oldest first. Raises UserError for a file that holds none."""
    with ThreadPoolExecutor(READ_THREADS) as threads:
        return sorted(threads.map(_record, _files(results, nights)), key=lambda record: record["started"])


def pixel_thresholds(results: Location, nights: Sequence[str]) -> dict[tuple[str, str], float]:
    """By category and model version: above it a pixel of a map belongs to a region; of models whose runs recorded it."""
    return {
        (category, record["models"][category]): threshold
        for record in run_records(results, nights)
        for category, threshold in record.get("pixel_thresholds", {}).items()
    }


def _files(results: Location, nights: Sequence[str]) -> list[Location]:
    begins = tuple(file_name(f"{night}-") for night in nights) or ("",)
    return [f for f in (results / "runs").files() if f.name.endswith(".json") and f.name.startswith(begins)]


def _record(file: Location) -> dict[str, Any]:
    try:
        record = file.read_json()
        if {"night", "started", "archives"} <= record.keys():
            return record
        reason = "it lacks a night, a start or its archives"
    except (ValueError, AttributeError) as error:
        reason = repr(error)
    raise UserError(f"{file} is not a readable run record ({reason}): remove it")


class _Tables(NamedTuple):
    """What one record says."""

    runs: pa.Table
    archives: pa.Table
    normal_scores: dict[tuple[str, str], pa.Array]
    """By category and model version."""


def _tables(file: Location) -> _Tables:
    run = file.name.removesuffix(".json")
    try:
        record = _record(file)
        known = {"run": run, "record": json.dumps(record, ensure_ascii=False)} | record["counts"] | record
        archives = [
            each | {"run": run, "night": record["night"], "archive": each["location"]} for each in record["archives"]
        ]
        scores = {
            (category, record["models"][category]): pa.array(found, pa.float64())
            for category, found in record.get("normal_scores", {}).items()
        }
        return _Tables(_typed([known], "runs"), _typed(archives, "archives"), scores)
    except (KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{file} is not a readable run record ({error!r}): remove it") from error


def _calibration(normal_scores: Mapping[tuple[str, str], pa.Array]) -> pa.Table:
    """A row for each score."""
    parts = [
        pa.Table.from_arrays(
            [
                pa.repeat(category, len(scores)),
                pa.repeat(version, len(scores)),
                pa.array(range(len(scores)), pa.int32()),
                scores,
            ],
            schema=CALIBRATION_SCHEMA,
        )
        for (category, version), scores in normal_scores.items()
    ]
    return pa.concat_tables([CALIBRATION_SCHEMA.empty_table(), *parts])


def _typed(rows: list[dict[str, Any]], name: str) -> pa.Table:
    """Rows as one of the tables; times may be ISO 8601 text."""
    schema = RECORDS[name]
    times = {field.name for field in schema if pa.types.is_timestamp(field.type)}
    loose = pa.schema([(field.name, pa.string() if field.name in times else field.type) for field in schema])
    return pa.Table.from_pylist([{key: row.get(key) for key in schema.names} for row in rows], schema=loose).cast(
        schema
    )

"""What a report says, as the results tables have it: counts by severity, the worst photographs, failures, trend and drift."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.named_queries import QUERIES
from pipeline.night_files import EVALUATION, partitions
from pipeline.query import run_queries, run_query
from pipeline.run_tables import pixel_thresholds
from pipeline.storage import Location

STEPS_PER_THRESHOLD = 100
"""Severity is the score in units of its threshold. It is counted in hundredths, rounded up: bucket > 100 is `score > threshold`
to the last bit, and bucket > 100 f what it would be with f times the threshold."""

TOP_BUCKET = 3 * STEPS_PER_THRESHOLD + 1
"""Of all that is more than three times its threshold."""

TREND_NIGHTS = 30
LISTED_FAILURES = 500
LONGEST_TEXT = 300
"""Characters of a name or a detail that a page shows."""


def _severity(score: str) -> str:
    return f"CASE WHEN threshold > 0 THEN {score} / threshold WHEN {score} > threshold THEN 1e9 ELSE 0 END"


def _bucket(score: str) -> str:
    hundredths = f"ceil({STEPS_PER_THRESHOLD} * ({_severity(score)}))"
    return (
        f"(CASE WHEN {score} > threshold THEN greatest({STEPS_PER_THRESHOLD + 1}, least({TOP_BUCKET}, {hundredths})) "
        f"ELSE greatest(0, least({STEPS_PER_THRESHOLD}, {hundredths})) END)::INTEGER"
    )


_COUNTS = f"SELECT category, {_bucket('score')} AS bucket, count(*) AS images FROM newest GROUP BY ALL ORDER BY ALL"

# Versions of one model may share their normal photographs, which must not count twice.
_NORMAL_COUNTS = f"""
    WITH used AS (
        SELECT category, arg_max(model_version, scored_at) AS model_version, arg_max(threshold, scored_at) AS threshold
        FROM newest GROUP BY category
    )
    SELECT category, {_bucket("normal_score")} AS bucket, count(*) AS images
    FROM calibration JOIN used USING (category, model_version) GROUP BY ALL ORDER BY ALL
"""

_CATEGORIES = """
    SELECT category, count(*) AS images, list_sort(list(DISTINCT model_version)) AS versions,
           list_sort(list(DISTINCT threshold)) AS thresholds
    FROM newest GROUP BY ALL ORDER BY ALL
"""

_WORST = f"""
    WITH judged AS (SELECT *, {_severity("score")} AS severity, {_bucket("score")} AS bucket FROM newest)
    SELECT category, night, archive, member, image_id, width, height, score, threshold, severity, bucket, is_anomalous, regions,
           model_version
    FROM judged
    QUALIFY row_number() OVER (PARTITION BY category ORDER BY severity DESC, image_id)
            <= greatest(1, $images // (SELECT count(DISTINCT category) FROM newest))
    ORDER BY severity DESC, image_id LIMIT $images
"""

_FAILURES = f"""
    SELECT category, night, archive, member, stage, error, detail
    FROM failures ANTI JOIN newest USING (night, category, image_id)
    ORDER BY ALL LIMIT {LISTED_FAILURES}
"""

_FAILURE_COUNTS = """
    SELECT category, count(DISTINCT image_id) AS images
    FROM failures ANTI JOIN newest USING (night, category, image_id) GROUP BY ALL
"""


@dataclass(frozen=True)
class Category:
    """What came of one category's photographs in the nights of the report."""

    name: str
    images: int
    versions: list[str]
    """Of the models that scored them."""
    thresholds: list[float]
    """Theirs."""
    counts: dict[int, int]
    """Photographs by bucket of severity."""
    normal_counts: dict[int, int]
    """The same of the normal photographs that the thresholds of models come from; empty when not recorded."""
    failures: int
    drift: list[dict[str, Any]]
    """Rows of the question `drift`, one a night and model."""
    trend: list[dict[str, Any]]
    """Rows of the question `nightly-summary`, one a night."""
    curves: dict[str, Any] | None
    """The newest row of what evaluate measured, where it holds curves."""

    def anomalous(self) -> int:
        """Photographs above their threshold."""
        return sum(images for bucket, images in self.counts.items() if bucket > STEPS_PER_THRESHOLD)


@dataclass(frozen=True)
class Report:
    """All that a page shows but pictures."""

    nights: list[str]
    categories: list[Category]
    worst: list[dict[str, Any]]
    """Rows of the scores table with `severity` and `bucket`, the most severe first."""
    failures: list[dict[str, Any]]
    """The first LISTED_FAILURES rows of the failures table."""
    pixel_thresholds: dict[tuple[str, str], float]
    """By category and model version: above it a pixel of a map belongs to a region."""


def gather(results: Location, *, nights: Sequence[str], categories: Sequence[str], images: int) -> Report:
    """Read a report's tables, all as they are at one moment; up to `images` photographs are listed, as many of each category.

    Without `nights`: the last one (the last evaluation where there was nothing else). Raises UserError where nothing was
    scored, or nothing of a category that is asked for.
    """
    there = partitions(results, None, None)
    if not there:
        raise UserError(f"{results} holds no scores: run jobs/score_archives.py first")
    _require(categories, {category for category, _ in there}, results.uri)
    real = sorted({night for category, night in there if not categories or category in categories} - {EVALUATION})
    shown = list(dict.fromkeys(nights)) or (real[-1:] or [EVALUATION])
    _require(categories, {category for category, night in there if night in shown}, ", ".join(shown))
    queries: dict[str, tuple[str, Mapping[str, Any]]] = {
        "categories": (_CATEGORIES, {}),
        "counts": (_COUNTS, {}),
        "normal_counts": (_NORMAL_COUNTS, {}),
        "worst": (_WORST, {"images": images}),
        "failures": (_FAILURES, {}),
        "failure_counts": (_FAILURE_COUNTS, {}),
    }
    # Labelled test photographs are chosen to be defective: that their scores differ from calibration says nothing.
    if EVALUATION not in shown:
        queries["drift"] = (QUERIES["drift"].sql, QUERIES["drift"].parameters)
    tables = run_queries(results, queries, categories=categories, nights=shown)
    rows: dict[str, list[dict[str, Any]]] = {name: table.to_pylist() for name, table in tables.items()}
    if not rows["categories"] and not rows["failures"]:
        raise UserError(f"nothing was scored in {', '.join(shown)}: there is nothing to report")
    trend = _trend(results, [night for night in real if night <= max(shown)][-TREND_NIGHTS:], categories)
    counts, normal_counts = _by_category(rows["counts"]), _by_category(rows["normal_counts"])
    failed = {row["category"]: row["images"] for row in rows["failure_counts"]}
    known_of = {row["category"]: row for row in rows["categories"]}
    curves = _curves(results)
    return Report(
        nights=shown,
        categories=[
            Category(
                name=name,
                images=known_of[name]["images"] if name in known_of else 0,
                versions=known_of[name]["versions"] if name in known_of else [],
                thresholds=known_of[name]["thresholds"] if name in known_of else [],
                counts=counts.get(name, {}),
                normal_counts=normal_counts.get(name, {}),
                failures=failed.get(name, 0),
                drift=[row for row in rows.get("drift", []) if row["category"] == name],
                trend=[row for row in trend if row["category"] == name],
                curves=curves.get(name),
            )
            for name in sorted(known_of.keys() | failed.keys())
        ],
        worst=rows["worst"],
        failures=rows["failures"],
        pixel_thresholds=pixel_thresholds(results, shown),
    )


def _require(categories: Sequence[str], known: Set[str], where: str) -> None:
    if missing := sorted(set(categories) - known):
        raise UserError(f"no results of {', '.join(missing)} in {where} (there: {', '.join(sorted(known)) or 'none'})")


def _trend(results: Location, nights: Sequence[str], categories: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the question `nightly-summary`; of the categories, those that these nights have."""
    if not nights:
        return []
    rows: list[dict[str, Any]] = run_query(
        results, QUERIES["nightly-summary"].sql, categories=categories, nights=nights
    ).to_pylist()
    return rows


def _by_category(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for row in rows:
        found.setdefault(row["category"], {})[row["bucket"]] = row["images"]
    return found


def _curves(results: Location) -> dict[str, dict[str, Any]]:
    """By category: the newest row of RESULTS/metrics that holds curves. Raises UserError for a damaged file."""
    found: dict[str, dict[str, Any]] = {}
    for file in (results / "metrics").files():
        if file.name.endswith(".parquet"):
            try:
                rows = pq.read_table(io.BytesIO(file.read_bytes())).to_pylist()
            except pa.ArrowException as error:
                raise UserError(f"{file} is damaged: remove it, and evaluate again") from error
            found |= {row["category"]: row for row in rows if row.get("curve_fpr")}
    return found

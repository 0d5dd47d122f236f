"""Scoring a labelled test split and measuring the maps against its masks; shards are measured by workers and merged."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from pipeline.archives import Archive, image_id
from pipeline.batch import score_archives
from pipeline.batch_plan import BatchPlan, Workers, committed_shards
from pipeline.datasets import Layout, labelled_records
from pipeline.errors import UserError
from pipeline.images import decode_mask, resize_mask
from pipeline.metrics import LocalizationMetrics
from pipeline.model_store import scoring_model
from pipeline.night_files import EVALUATION
from pipeline.results import iter_maps, read_scores
from pipeline.storage import Location
from pipeline.totals import ShardOutcome, Totals


@dataclass(frozen=True)
class EvaluationPlan:
    """A scoring run over labelled images, and what is true of each of them."""

    batch: BatchPlan
    masks: Mapping[str, Mapping[str, Location | None]]
    """Per category and image id: the mask, None for a normal image."""


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    totals: Totals
    metrics: dict[str, Any]
    """{"categories": {name: metrics}, "mean": metrics}; undefined metrics are None."""
    reasons: dict[str, dict[str, str]]
    """Per category: why a metric is undefined."""
    missing: int
    """Labelled images that could not be scored and are in no metric."""
    table: Location
    """The metrics as Parquet."""


def plan(
    dataset: Location, layout: Layout, categories: Sequence[str], models: Location, results: Location
) -> EvaluationPlan:
    """Find labelled images, masks and models. Raises UserError for what is missing, before any work starts."""
    archives, masks = [], {}
    for category in dict.fromkeys(categories):
        archive, masks[category] = labelled_archive(dataset, layout, category)
        archives.append(archive)
    batch = BatchPlan(
        archives=tuple(archives),
        models={category: scoring_model(models, category) for category in categories},
        results=results,
        night=EVALUATION,
        map_format="float16",
        # Small shards let several actors share one category.
        shard_images=64,
        started=datetime.now(UTC),
        # A labelled image that fails is missing from the metrics.
        max_failure_fraction=0.0,
    )
    return EvaluationPlan(batch, masks)


def run(
    plan: EvaluationPlan, workers: Workers, progress: Callable[[ShardOutcome], None], fpr_limit: float
) -> Evaluation:
    """Score what is not scored yet, then measure every category from its committed shards."""
    batch = plan.batch
    try:
        LocalizationMetrics(fpr_limit)
    except ValueError as error:
        raise UserError(f"--fpr-limit {fpr_limit}: {error}") from error
    totals = score_archives(batch, workers, progress)
    shards = {archive.category: committed_shards(batch, archive) for archive in batch.archives}
    versions = {category: info.version for category, info in batch.models.items()}
    measured = measure(batch.results, shards, plan.masks, versions, fpr_limit=fpr_limit)
    found = summary(measured)
    reasons = {category: metrics.reasons() for category, metrics in measured.items() if metrics.images}
    missing = sum(len(plan.masks[category]) - metrics.images for category, metrics in measured.items())
    curves = {category: metrics.curves() for category, metrics in measured.items() if metrics.images}
    table = write_metrics(batch.results, f"{EVALUATION}-{batch.started:%Y%m%dT%H%M%SZ}", found, versions, curves)
    return Evaluation(totals, found, reasons, missing, table)


def labelled_archive(dataset: Location, layout: Layout, category: str) -> tuple[Archive, dict[str, Location | None]]:
    """A category's test split as an archive, and the mask of each image id (None for normal images)."""
    records = labelled_records(dataset, layout, category)
    members = tuple(record.image.relative_to(dataset) for record in records)
    archive = Archive(dataset, "folder", category, members=members).fingerprinted()
    ids = (image_id(archive.location.uri, member) for member in members)
    return archive, {key: record.mask for key, record in zip(ids, records, strict=True)}


@ray.remote
def measure_shard(
    results: Location,
    category: str,
    shard: str,
    masks: Mapping[str, Location | None],
    scores: Mapping[str, float],
    fpr_limit: float,
) -> LocalizationMetrics:
    """Metrics of one shard: its maps against the masks, its image scores against whether there is a defect."""
    metrics = LocalizationMetrics(fpr_limit)
    for ids, maps in iter_maps(results, category=category, night=EVALUATION, shard=shard):
        truth = np.zeros(maps.shape, bool)
        for i, key in enumerate(ids):
            mask = masks[key]
            if mask is not None:
                truth[i] = resize_mask(decode_mask(mask.read_bytes()), maps.shape[-1])
        metrics.update(maps, truth, np.array([scores[key] for key in ids]))
    return metrics


def measure(
    results: Location,
    shards: Mapping[str, list[str]],
    masks: Mapping[str, Mapping[str, Location | None]],
    versions: Mapping[str, str],
    *,
    fpr_limit: float,
) -> dict[str, LocalizationMetrics]:
    """Metrics per category from its finished shards (names per category), masks (per category and image id) and model."""
    pending = {}
    for category, names in shards.items():
        table = read_scores(results, category=category, night=EVALUATION)
        table = table.filter(pc.field("model_version") == versions[category])
        scores = dict(zip(table["image_id"].to_pylist(), table["score"].to_pylist(), strict=True))
        pending[category] = [
            measure_shard.remote(results, category, name, masks[category], scores, fpr_limit) for name in names
        ]
    measured = {}
    for category, futures in pending.items():
        merged = LocalizationMetrics(fpr_limit)
        for future in futures:
            try:
                merged.merge(ray.get(future))
            except ray.exceptions.RayTaskError as error:
                reason = " ".join(str(error.cause).split())
                raise UserError(f"category {category!r} cannot be measured: {reason}") from error
        measured[category] = merged
    return measured


def summary(measured: Mapping[str, LocalizationMetrics]) -> dict[str, Any]:
    """{"categories": {name: metrics}, "mean": metrics}: NaN becomes None, counts in the mean are sums."""
    categories = {name: metrics.compute() for name, metrics in sorted(measured.items()) if metrics.images}
    if not categories:
        raise UserError("no image of any category could be scored: see the failures table")
    mean: dict[str, float] = {}
    for key in next(iter(categories.values())):
        values = [metrics[key] for metrics in categories.values()]
        if key in ("images", "regions"):
            mean[key] = sum(values)
        else:
            known = [value for value in values if not math.isnan(value)]
            mean[key] = sum(known) / len(known) if known else math.nan
    plain = {name: _without_nan(metrics) for name, metrics in categories.items()}
    return {"categories": plain, "mean": _without_nan(mean)}


def _without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}


def write_metrics(
    results: Location,
    run: str,
    found: Mapping[str, Any],
    versions: Mapping[str, str],
    curves: Mapping[str, Mapping[str, NDArray[np.float64]]],
) -> Location:
    """RESULTS/metrics/<run>.parquet: one row per category with its model version and its pixel curves for drawing."""
    rows = [
        {"category": name, "model_version": versions[name], **metrics}
        | {f"curve_{axis}": values.tolist() for axis, values in curves[name].items()}
        for name, metrics in found["categories"].items()
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd")
    file = results / "metrics" / f"{run}.parquet"
    file.write_bytes(buffer.getvalue())
    return file

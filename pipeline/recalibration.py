"""Reviewed nights: what of the results a review is joined with, and the thresholds that it proposes and puts in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow.compute as pc

from pipeline.config import ScoringConfig
from pipeline.errors import UserError
from pipeline.model_store import model_info, replace_threshold, scoring_model, weights_of
from pipeline.night_files import EVALUATION, partitions
from pipeline.query import run_query
from pipeline.review import Floats, Proposal, Review, propose
from pipeline.run_tables import run_records
from pipeline.storage import Location

# A night may hold rows of several models; the newest one's can be compared with each other.
NEWEST_MODEL = """
    SELECT category, image_id, score, threshold, model_version,
           arg_max(model_version, scored_at) OVER (PARTITION BY category) AS newest_version
    FROM newest ORDER BY category, image_id
"""


@dataclass(frozen=True)
class ScoredCategory:
    """The photographs of one category's night that its newest model scored."""

    category: str
    version: str
    threshold: float
    image_ids: tuple[str, ...]
    scores: Floats
    """(n,), n >= 1, in the order of `image_ids`."""
    others: int
    """Photographs whose newest row is another model's."""


def newest_night(results: Location) -> str:
    """The last night of the results that is no labelled run. Raises UserError where there is none."""
    nights = {night for _, night in partitions(results, None, None)} - {EVALUATION}
    if not nights:
        raise UserError(
            f"{results} holds no night: score archives first, or name a labelled run with --night {EVALUATION}"
        )
    return max(nights)


def categories_of(results: Location, night: str, asked: Sequence[str]) -> list[str]:
    """The categories that have results of the night, of those asked for or of all. Raises UserError where one has none."""
    there = [category for category, _ in partitions(results, None, night)]
    if missing := [category for category in asked if category not in there]:
        raise UserError(f"no results of {', '.join(missing)} on night {night} (there: {', '.join(there) or 'none'})")
    if not there:
        raise UserError(f"no results of night {night} in {results}: check --night")
    return sorted(set(asked) or there)


def scored_categories(results: Location, night: str, categories: Sequence[str]) -> list[ScoredCategory]:
    """What the night's newest models say of every photograph; categories without any are left out."""
    rows = run_query(results, NEWEST_MODEL, categories=categories, nights=[night])
    found = []
    for category in pc.unique(rows["category"]).to_pylist():
        of_category = rows.filter(pc.field("category") == category)
        own = of_category.filter(pc.field("model_version") == pc.field("newest_version"))
        found.append(
            ScoredCategory(
                category=category,
                version=own["model_version"][0].as_py(),
                threshold=own["threshold"][0].as_py(),
                image_ids=tuple(own["image_id"].to_pylist()),
                scores=own["score"].to_numpy(),
                others=len(of_category) - len(own),
            )
        )
    return found


def configured_rates(results: Location, night: str) -> dict[str, float]:
    """By model version: the false-alarm rate that it was calibrated for, as the night's run records tell."""
    return {
        version: record["configs"][category]["scoring"]["false_alarm_rate"]
        for record in run_records(results, [night])
        for category, version in record.get("models", {}).items()
        if category in record.get("configs", {})
    }


def unknown_images(review: Review, night: Sequence[ScoredCategory]) -> list[str]:
    """Reviewed ids that no photograph of the night has, in the review's order."""
    known = {image for scored in night for image in scored.image_ids}
    return [image for image in review.defective if image not in known]


def proposals(
    review: Review, night: Sequence[ScoredCategory], rates: Mapping[str, float], asked_rate: float | None
) -> dict[str, Proposal]:
    """By category. Without an asked rate each model's own counts, by version in `rates`, or else the default."""
    default = ScoringConfig().false_alarm_rate
    found = {}
    for scored in night:
        verdicts = [review.defective.get(image) for image in scored.image_ids]
        found[scored.category] = propose(
            scored.scores,
            np.array([verdict is False for verdict in verdicts]),
            np.array([verdict is True for verdict in verdicts]),
            threshold=scored.threshold,
            rate=asked_rate if asked_rate is not None else rates.get(scored.version, default),
        )
    return found


def apply(models: Location, scored: ScoredCategory, proposal: Proposal, review: Location, night: str) -> str | None:
    """Put a model with the proposed threshold in use and return its version; None where the threshold is in use already.

    Raises UserError where the model in use gives other scores than the night's.
    """
    proposed = proposal.proposed
    assert proposed is not None and proposed.false_alarm_rate is not None
    used = scoring_model(models, scored.category)
    if weights_of(used) != weights_of(model_info(models, scored.category, scored.version)):
        raise UserError(
            f"{scored.category}: the night was scored by {scored.version}, in use is {used.version}, whose scores are others: "
            "score a night with it and review that"
        )
    if used.calibration["threshold"] == proposed.threshold:
        return None
    now = datetime.now(UTC)
    return replace_threshold(
        used,
        proposed.threshold,
        rate=proposal.asked_rate,
        false_alarms=(proposed.false_alarm_rate.low, proposed.false_alarm_rate.high),
        reason={
            "review": review.uri,
            "night": night,
            "normal": proposal.normal,
            "defective": proposal.defective,
            "at": now.isoformat(timespec="seconds"),
        },
        now=now,
    )

"""The stream's last stage: an actor that scores a shard's photographs and commits its rows."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.archives import Failure, image_id
from pipeline.batch_plan import BatchPlan, Workers
from pipeline.errors import UserError
from pipeline.memory import reuse_freed_memory, use_system_allocator
from pipeline.regions import find_regions
from pipeline.results import FailureRow, ScoreRow, write_shard
from pipeline.shard_reading import without_images
from pipeline.storage_errors import STORAGE_ERRORS
from pipeline.telemetry import ScoringTelemetry
from pipeline.threads import compute_with
from pipeline.totals import ShardOutcome

if TYPE_CHECKING:
    from pipeline.scoring import Scorer


class ScoringActor:
    """Stage 4, photographs -> maps, scores and regions, committed as the shard's files. Loads each model once."""

    def __init__(self, plan: BatchPlan, workers: Workers) -> None:
        compute_with(workers.threads)
        use_system_allocator()
        reuse_freed_memory()
        self.plan = plan
        self.device = "cuda" if workers.gpus_per_actor > 0 else "cpu"
        self.scorers: dict[str, Scorer] = {}
        self.telemetry = ScoringTelemetry()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One shard's outcome as a row."""
        clock = time.monotonic()
        category = self.plan.archives[row["archive"]].category
        if (said := without_images(row, category)) is not None:
            return asdict(said)
        failures = [(name, Failure(**failure)) for name, failure in json.loads(row["failures"])]
        outcome = ShardOutcome(row["archive"], row["shard"], len(row["names"]) + len(failures), category=category)
        try:
            anomalous = self._score(row, failures)
        except (UserError, *STORAGE_ERRORS) as error:
            return asdict(replace(outcome, error=" ".join(str(error).split())))
        scored, read, codes = len(row["names"]), row["bytes"], Counter(failure.error for _, failure in failures)
        seconds = time.monotonic() - clock
        self.telemetry.shard(category, scored=scored, anomalous=anomalous, failed=codes, read=read, seconds=seconds)
        counts = {"scored": scored, "failed": len(failures), "anomalous": anomalous, "bytes": read, "seconds": seconds}
        return asdict(replace(outcome, **counts, committed=time.time(), failures=json.dumps(codes)))

    def _scorer(self, category: str) -> Scorer:
        from pipeline.model_weights import load_scorer  # not above: the driver and the readers do without torch

        if category not in self.scorers:
            self.scorers[category] = load_scorer(self.plan.models[category], device=self.device)
        return self.scorers[category]

    def _score(self, row: dict[str, Any], failures: list[tuple[str, Failure]]) -> int:
        """Score and commit one shard; returns how many of its images are anomalous."""
        plan, archive = self.plan, self.plan.archives[row["archive"]]
        names, scores, maps = row["names"], [], None
        if len(names):
            scorer = self._scorer(archive.category)
            calibration = scorer.calibration
            assert calibration is not None
            side = scorer.config.scoring.map_size
            sizes = np.frombuffer(row["sizes"], np.int32).reshape(-1, 2)
            result = scorer.score(np.frombuffer(row["images"], np.uint8).reshape(-1, side, side, 3))
            maps = result.maps
            for i, name in enumerate(names):
                width, height = (int(length) for length in sizes[i])
                regions = [
                    region.scaled(width / side, height / side)
                    for region in find_regions(maps[i], calibration.pixel_threshold)
                ]
                scores.append(
                    ScoreRow(
                        image_id=image_id(archive.location.uri, name),
                        archive=archive.location.uri,
                        member=name,
                        width=width,
                        height=height,
                        score=float(result.scores[i]),
                        kl_score=float(result.kl_scores[i]),
                        feature_score=float(result.feature_scores[i]),
                        threshold=calibration.threshold,
                        is_anomalous=bool(result.scores[i] > calibration.threshold),
                        regions=tuple(regions),
                        model_version=plan.models[archive.category].version,
                        scored_at=plan.started,
                    )
                )
        write_shard(
            plan.results,
            category=archive.category,
            night=plan.night,
            shard=row["shard"],
            scores=scores,
            maps_nhw=maps,
            failures=[
                FailureRow(
                    image_id(archive.location.uri, name),
                    archive.location.uri,
                    name,
                    failure.stage,
                    failure.error,
                    failure.detail,
                )
                for name, failure in failures
            ],
            map_format=plan.map_format,
        )
        return sum(score.is_anomalous for score in scores)

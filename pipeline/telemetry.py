"""Counters of the scoring stage for Prometheus, by way of Ray's metrics agents: what is scored, how fast, what fails.

As Prometheus sees them, each tagged with the category:

    ray_defectmap_images_scored_total       ray_defectmap_images_anomalous_total     ray_defectmap_image_bytes_read_total
    ray_defectmap_images_failed_total       tagged with the error code too
    ray_defectmap_shard_seconds             histogram: scoring and writing one shard; Ray estimates its sum from the buckets
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ray.util.metrics import Counter, Histogram

SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

_log = logging.getLogger(__name__)


class _Metrics:
    def __init__(self) -> None:
        tags = ("category",)
        self.scored = Counter("defectmap_images_scored", "Images scored.", tags)
        self.anomalous = Counter("defectmap_images_anomalous", "Images scored above the threshold.", tags)
        self.failed = Counter("defectmap_images_failed", "Images that could not be scored.", (*tags, "error"))
        self.bytes = Counter("defectmap_image_bytes_read", "Encoded bytes of the images read.", tags)
        self.seconds = Histogram("defectmap_shard_seconds", "Seconds to score and write a shard.", list(SECONDS), tags)


class ScoringTelemetry:
    """One scoring actor's counters. What goes wrong with them is logged once and ends them, never the scoring."""

    def __init__(self) -> None:
        self._metrics: _Metrics | None = None
        self._off = False

    def shard(
        self, category: str, *, scored: int, anomalous: int, failed: Mapping[str, int], read: int, seconds: float
    ) -> None:
        """Count a committed shard: images, failures by error code, bytes read, seconds in the actor."""
        if self._off:
            return
        tags = {"category": category}
        try:
            metrics = self._metrics = self._metrics or _Metrics()
            for counter, value in ((metrics.scored, scored), (metrics.anomalous, anomalous), (metrics.bytes, read)):
                if value:  # a counter refuses 0
                    counter.inc(value, tags)
            for error, count in failed.items():
                metrics.failed.inc(count, tags | {"error": error})
            metrics.seconds.observe(seconds, tags)
        except Exception:  # of whatever kind: a night's scoring is worth more than its metrics
            self._off = True
            _log.warning("metrics are off: they could not be recorded", exc_info=True)

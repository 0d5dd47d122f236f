"""A scoring run's balance: what became of every shard, and whether images in = scored + failures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.archive_members import ARCHIVE_ERRORS
from pipeline.batch_plan import BatchPlan
from pipeline.night_reading import iter_rows


@dataclass(frozen=True)
class ShardOutcome:
    """What became of one shard (or, with shard None, how many members its archive had and how many shards)."""

    archive: int
    shard: str | None
    members: int
    scored: int = 0
    failed: int = 0
    anomalous: int = 0
    shards: int = 0
    """Shards that there are to score; only on an archive's own row."""
    skipped: int = 0
    """Shards that an earlier run had finished; only on an archive's own row."""
    error: str = ""
    """Why the shard, or the rest of the archive, could not be scored at all; the next run tries again."""
    category: str = ""
    """Of the archive."""
    bytes: int = 0
    """Encoded bytes of the shard's images."""
    seconds: float = 0.0
    """Of scoring and committing the shard."""
    committed: float = 0.0
    """When it was committed, seconds since 1970; the driver may hear of it much later."""
    failures: str = "{}"
    """How many images failed by error code, as JSON: a dictionary would change its type from row to row."""


SUMMED = ("scored", "failed", "anomalous", "bytes", "seconds")
"""Numbers of shards that add up to those of archives."""


@dataclass(frozen=True)
class Totals:
    """A run's balance."""

    images: int
    scored: int
    failed: int
    anomalous: int
    shards: int
    lost_shards: int
    """Read but neither committed nor refused with an error."""
    unbalanced_archives: int
    """Of which not every image was scored or failed, or of which nothing was heard."""
    skipped_shards: int
    errors: tuple[str, ...]
    bytes: int
    """Encoded bytes of the images that were scored or failed."""
    failures: dict[str, int]
    """Failed images by error code."""
    failed_fractions: dict[str, float]
    """Failed images of all images, by category, those of earlier runs of the night included: 0 to 1."""
    archive_failures: int
    """Archives that could not be read to their end, in this run or an earlier one: nobody knows how many images that hides."""
    not_scored: tuple[ShardOutcome, ...]
    """What has an error: shards, or with shard None what is left of an archive."""
    by_archive: tuple[dict[str, float], ...]
    """What this run did of each archive: SUMMED of its shards."""

    @property
    def balanced(self) -> bool:
        """Whether every image of every archive was scored or has a failures row."""
        return self.unbalanced_archives == 0 and self.lost_shards == 0

    def fine(self, max_failure_fraction: float) -> bool:
        """Whether all was scored, but for no more than this fraction of any category's images; every archive to its end."""
        few = max(self.failed_fractions.values(), default=0) <= max_failure_fraction
        return self.balanced and not self.errors and few and not self.archive_failures


def total(outcomes: Sequence[ShardOutcome], archives: int, earlier: Sequence[ShardOutcome] = ()) -> Totals:
    """Add up outcomes of so many archives. `images` counts what the archives hold, the others what was committed.

    earlier: of shards that runs before this one committed. A night stays as bad as it is, however often it is started.
    """
    heads = [outcome for outcome in outcomes if outcome.shard is None]
    shards = [outcome for outcome in outcomes if outcome.shard is not None]
    members = {head.archive: head.members for head in heads}
    done, failures = Counter[int](), Counter[str]()
    by_archive: list[dict[str, float]] = [dict.fromkeys(SUMMED, 0) for _ in range(archives)]
    for outcome in shards:
        for name in SUMMED:
            by_archive[outcome.archive][name] += getattr(outcome, name)
        done[outcome.archive] += outcome.scored + outcome.failed
        failures.update(json.loads(outcome.failures))
    failed, images = Counter[str](), Counter[str]()
    archive_failures = 0
    for outcome in (*earlier, *shards):
        failed[outcome.category] += outcome.failed
        images[outcome.category] += outcome.scored + outcome.failed
        archive_failures += sum(json.loads(outcome.failures).get(code, 0) for code in ARCHIVE_ERRORS)
    return Totals(
        images=sum(members.values()),
        scored=sum(outcome.scored for outcome in shards),
        failed=sum(outcome.failed for outcome in shards),
        anomalous=sum(outcome.anomalous for outcome in shards),
        shards=sum(not outcome.error for outcome in shards),
        lost_shards=sum(head.shards for head in heads) - len({outcome.shard for outcome in shards}),
        unbalanced_archives=sum(members.get(archive) != done[archive] for archive in range(archives)),
        skipped_shards=sum(head.skipped for head in heads),
        errors=tuple(sorted({outcome.error for outcome in outcomes if outcome.error})),
        bytes=sum(outcome.bytes for outcome in shards),
        failures=dict(failures.most_common()),
        failed_fractions={category: failed[category] / count for category, count in sorted(images.items()) if count},
        archive_failures=archive_failures,
        not_scored=tuple(outcome for outcome in outcomes if outcome.error),
        by_archive=tuple(by_archive),
    )


def earlier_outcomes(plan: BatchPlan, committed: Sequence[Sequence[str]]) -> list[ShardOutcome]:
    """What became of the shards that were committed before, by archive, counted in the tables."""
    archive_of = {name: i for i, names in enumerate(committed) for name in names}
    scored, failed = Counter[str](), {name: Counter[str]() for name in archive_of}
    for category in {plan.archives[i].category for i in archive_of.values()}:
        for name, rows in iter_rows("scores", plan.results, category, plan.night):
            scored[name] += len(rows)
        for name, rows in iter_rows("failures", plan.results, category, plan.night):
            if name in failed:
                failed[name].update(rows["error"].to_pylist())
    return [
        ShardOutcome(
            *(i, name, scored[name] + failed[name].total(), scored[name], failed[name].total()),
            category=plan.archives[i].category,
            failures=json.dumps(failed[name]),
        )
        for name, i in archive_of.items()
    ]

"""The stages of the streaming jobs one after the other in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.batch_plan import BatchPlan, Workers
from pipeline.shard_reading import decode_shard, list_archive, read_unit
from pipeline.totals import ShardOutcome

ONE_THREAD = Workers(1, 1, 1.0, 0.0)


def read(plan: BatchPlan, committed: Sequence[str] = (), archive: int = 0) -> list[dict[str, Any]]:
    """What both reading stages give for one archive of the plan."""
    row = {"archive": archive, "committed": list(committed)}
    return [shard for unit in list_archive(row, plan) for shard in read_unit(unit, plan)]


def stream(
    plan: BatchPlan,
    actor: Callable[[dict[str, Any]], dict[str, Any]],
    before: Sequence[Sequence[str]] | None = None,
) -> list[ShardOutcome]:
    """All archives of the plan through all stages, the last of which is the actor; `before` names the shards of each that need
    not be done again."""
    done = before or [[] for _ in plan.archives]
    rows = (_carried(row) for number, names in enumerate(done) for row in read(plan, names, number))
    return [ShardOutcome(**_carried(actor(_carried(decode_shard(row, plan))))) for row in rows]


def _carried(row: dict[str, Any]) -> dict[str, Any]:
    """A row as Ray Data carries it from stage to stage: what Arrow cannot hold would end the night there."""
    (carried,) = pa.Table.from_pylist([row]).to_pylist()
    return carried

"""The streaming jobs on Ray Data: archives -> units -> shards -> decode -> score -> Parquet, or -> restore -> pictures.

One row of the stream is one shard. The stages run side by side under Ray Data's back-pressure; a shard is committed by
the actor that computed it, so a crash anywhere costs at most the shards in flight. One more row for each archive
says how many members it has: that must equal what was done plus what failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import isinf
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from pipeline.batch_plan import BatchPlan, Workers, all_committed_shards
from pipeline.errors import StalledError
from pipeline.results import write_run
from pipeline.run_record import run_record
from pipeline.shard_reading import decode_shard, list_archive, read_unit
from pipeline.shard_restoring import RestorePlan, RestoringActor, earlier_restored, restored_shards
from pipeline.shard_scoring import ScoringActor
from pipeline.totals import ShardOutcome, Totals, earlier_outcomes, total

STALL_MINUTES = 60.0
"""Without any progress, after which jobs stop: a worker that never starts, a storage that never answers. A shard takes seconds to
minutes, with the slowest networks longer."""
LISTING_TASKS = 4
"""At once. A directory of 100 000 members is listed in a second or two, and is work for many readers."""


def score_archives(
    plan: BatchPlan,
    workers: Workers,
    progress: Callable[[ShardOutcome], None],
    stall_minutes: float = STALL_MINUTES,
) -> Totals:
    """Run the stream to its end and write the run's record, calling `progress` for every shard as it commits.

    Raises StalledError when no stage got anything done for `stall_minutes`, inf for ever.
    """
    clock = time.monotonic()
    before = all_committed_shards(plan)
    outcomes = _outcomes(plan, workers, before, ScoringActor, {}, progress, stall_minutes)
    totals = total(outcomes, len(plan.archives), earlier_outcomes(plan, before))
    record = run_record(plan, totals, time.monotonic() - clock)
    write_run(plan.results, f"{plan.night}-{plan.started:%Y%m%dT%H%M%SZ}", record)
    return totals


def restore_archives(
    plan: BatchPlan,
    workers: Workers,
    settings: RestorePlan,
    progress: Callable[[ShardOutcome], None],
    stall_minutes: float = STALL_MINUTES,
) -> Totals:
    """The same stream with pictures at its end; its record is what every shard leaves. Raises as that one does."""
    before = restored_shards(plan, settings)
    outcomes = _outcomes(plan, workers, before, RestoringActor, {"settings": settings}, progress, stall_minutes)
    return total(outcomes, len(plan.archives), earlier_restored(plan, settings, before))


def _outcomes(
    plan: BatchPlan,
    workers: Workers,
    before: Sequence[Sequence[str]],
    actor: type,
    arguments: dict[str, Any],
    progress: Callable[[ShardOutcome], None],
    stall_minutes: float,
) -> list[ShardOutcome]:
    """Run the stream; `before` names the shards of each archive that need not be done again."""
    context = ray.data.DataContext.get_current()
    # Every shard leaves its task as soon as it is complete instead of waiting for a larger block.
    context.target_max_block_size = 1
    context.execution_no_progress_timeout_s = -1 if isinf(stall_minutes) else 60 * stall_minutes
    shards = (
        ray.data.from_items(
            [{"archive": i, "committed": list(committed)} for i, committed in enumerate(before)],
            override_num_blocks=len(plan.archives),
        )
        # Stages that ask for the same share of a CPU become one task, and the units would stay with one reader.
        .flat_map(list_archive, fn_kwargs={"plan": plan}, num_cpus=0.05, compute=TaskPoolStrategy(LISTING_TASKS))
        .flat_map(read_unit, fn_kwargs={"plan": plan}, num_cpus=0.2)
        .map(decode_shard, fn_kwargs={"plan": plan}, num_cpus=0.5)
        .map(
            actor,
            fn_constructor_kwargs={"plan": plan, "workers": workers, **arguments},
            compute=ActorPoolStrategy(size=workers.actors),
            num_cpus=workers.cpus_per_actor,
            num_gpus=workers.gpus_per_actor or None,
        )
    )
    outcomes = []
    try:
        for row in shards.iter_rows():
            outcome = ShardOutcome(**row)
            outcomes.append(outcome)
            progress(outcome)
    except ExecutionTimeoutError as error:
        raise StalledError(f"nothing went on for {stall_minutes:g} minutes") from error
    return outcomes

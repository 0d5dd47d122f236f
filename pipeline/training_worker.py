"""What a training worker does: one network after the other, until the queue is empty."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from pipeline.errors import UserError, one_line
from pipeline.fit import Rank
from pipeline.images import ImageError
from pipeline.memory import give_back_free_memory, reuse_freed_memory
from pipeline.photograph_file import load_within
from pipeline.s3_options import s3_endpoint
from pipeline.storage_errors import explain
from pipeline.training import train
from pipeline.training_job import TrainingJob

WAIT_S = 30.0
"""Until a network whose storage failed is tried again."""


def work(settings: dict[str, Any]) -> None:
    """Ray Train's train function, one call per worker.

    What the user can mend, or a diverged loss, fails that network alone; storage that fails is waited for. Anything else
    ends the workers, and Ray Train starts them again.
    """
    slot, board, slots = settings["slot"], settings["board"], settings["slots"]
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size())
    while (name := _next(board, slot, rank)) is not None:
        torch.set_num_threads(slots.cpus)
        reuse_freed_memory()
        job = ray.get(board.job.remote(name))
        try:
            found = train(
                job,
                load=partial(load_within, limit_gib=slots.in_memory_gib),
                report=partial(board.post.remote, name),
                rank=rank,
                device=ray.train.torch.get_device(),
            )
        except Exception as error:
            ray.get(_tell(board, slot, job, error))
            if rank.count > 1 or not _bearable(error):
                raise  # Ray Train must end the other workers, which wait for this one
            if _storage_failed(error):
                time.sleep(WAIT_S)
        else:
            if rank.index == 0:
                ray.get(board.end.remote(slot, name, {"state": "done", "found": found, "reason": None}))
        gc.collect()
        give_back_free_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _next(board: Any, slot: int, rank: Rank) -> str | None:
    name = ray.get(board.take.remote(slot)) if rank.index == 0 else None
    return name if rank.count == 1 else ray.train.collective.broadcast_from_rank_zero(name)


def _tell(board: Any, slot: int, job: TrainingJob, error: Exception) -> Any:
    """What the error means for the network, told to the board."""
    if _storage_failed(error):
        cause = error.__cause__ if isinstance(error, UserError) else error
        assert isinstance(cause, Exception)
        reason = f"{job.dataset} or {job.models}: {explain(job.models.uri, cause, s3_endpoint())}"
        return board.postpone.remote(slot, job.name, reason)
    if _bearable(error):
        return board.end.remote(slot, job.name, {"state": "failed", "reason": one_line(error)})
    return board.blame.remote(slot, job.name, one_line(error))


def _bearable(error: Exception) -> bool:
    """Whether this process can go on to the next network."""
    return isinstance(error, UserError | FloatingPointError | torch.OutOfMemoryError | MemoryError) or (
        _storage_failed(error)
    )


def _storage_failed(error: Exception) -> bool:
    """Whether it was the storage, which may be back soon: neither what is not there nor what cannot be decoded."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    return isinstance(cause, OSError | BotoCoreError | ClientError | ResponseParserError) and not isinstance(
        cause, FileNotFoundError | ImageError
    )

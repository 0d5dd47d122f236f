"""Threads of the processes that compute."""

from __future__ import annotations

import os

WAITING = "GOMP_SPINCOUNT", "10000"
"""Threads that wait for each other look this often, about half a millisecond, before they sleep. To sleep at once costs a process
that has its cores for itself a fifth of a training step, which has thousands of waits; to look on for as long as OpenMP does by
default costs whatever else runs on the machine its time, and the threads theirs where cores are shared."""


def wait_briefly() -> None:
    """Set `WAITING` for this process, if OpenMP is not loaded yet, and those that it starts; a user's own choice stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*WAITING)


def compute_with(threads: int) -> None:
    """Give this process's torch so many threads. To be called before torch, and OpenMP with it, is imported."""
    wait_briefly()
    import torch  # the driver and the readers know who calls this, and do without torch

    torch.set_num_threads(threads)

"""Threads of the processes that compute."""

from __future__ import annotations

import os

WAITING = "OMP_WAIT_POLICY", "PASSIVE"
"""Threads that wait for each other sleep. By default they spin, which costs whatever else runs on the machine its time, and
themselves too: two jobs side by side on two cores took twice as long; alone it makes no difference."""


def compute_with(threads: int) -> None:
    """Give this process's torch so many threads. To be called before torch is imported, which is when OpenMP reads its policy."""
    os.environ.setdefault(*WAITING)
    import torch  # the driver and the readers know who calls this, and do without torch

    torch.set_num_threads(threads)

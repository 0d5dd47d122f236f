"""Memory of the processes that work through shards and networks: those that compute reuse what they freed, the others, and
training between two networks, give it back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import pyarrow as pa

ONE_HEAP = "MALLOC_ARENA_MAX", "1"
"""For the environment in which Ray starts: Ray's workers compute in threads, to which glibc would give heaps that are too
small for large tensors. It reads this when a process begins."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's <malloc.h>."""


def use_system_allocator() -> None:
    """Let Arrow allocate as the rest of the process does: its own allocators keep what they freed."""
    pa.set_memory_pool(pa.system_memory_pool())


def reuse_freed_memory() -> None:
    """Let glibc keep what is freed until `give_back_free_memory`; with other allocators nothing changes.

    By default every large tensor is mapped anew, and the system clears its pages as they are touched: a third of the time of
    scoring on a CPU. Threads of their own reuse memory only where `ONE_HEAP` is set.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 64 << 20)


def give_back_free_memory() -> None:
    """Return to the system what glibc keeps of freed memory; with other allocators nothing."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None

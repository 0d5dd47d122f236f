"""Memory of the processes that work through shards and networks: those that compute reuse what they freed and have it in huge
pages, the others, and training between two networks, give it back to the system."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

ONE_HEAP = "MALLOC_ARENA_MAX", "1"
"""For the environment in which Ray starts: Ray's workers compute in threads, to which glibc would give heaps that are too
small for large tensors. It reads this when a process begins."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's <malloc.h>."""
HUGE_HEAP = 8 << 30
"""Bytes of a process's heap for which huge pages are asked, or half of the machine's memory where that is less."""


def use_system_allocator() -> None:
    """Let Arrow allocate as the rest of the process does: its own allocators keep what they freed."""
    pa.set_memory_pool(pa.system_memory_pool())


def reuse_freed_memory() -> None:
    """Let glibc keep what is freed until `give_back_free_memory`, after which this is to be called again, and ask for huge pages
    for it; with other allocators nothing changes.

    By default every large tensor is mapped anew, and the system clears its pages as they are touched: a third of the time of
    scoring on a CPU. What is kept lies anywhere in gigabytes, and with pages of 4 KiB a virtual machine looks up where, again
    and again: another third. A huge page that is touched is there as a whole: a tenth more memory, twice as much where all
    is small. Threads of their own reuse memory only where `ONE_HEAP` is set.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 64 << 20)
        if _addresses_cost_nothing():
            _grow_heap_in_huge_pages()


def _addresses_cost_nothing() -> bool:
    """Whether the heap may grow far beyond what is used: nobody counts or fills what is not touched, and it is glibc's own."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    loaded, glibc = (ctypes.cast(ctypes.CDLL(name).malloc, ctypes.c_void_p).value for name in (None, "libc.so.6"))
    return (
        all(limit == resource.RLIM_INFINITY for limit in limits)
        and not (overcommit.exists() and overcommit.read_text().strip() == "2")
        and "MALLOC_PERTURB_" not in os.environ
        and loaded == glibc
    )


def _grow_heap_in_huge_pages() -> None:
    """Take addresses, no memory, for the heap to come, and ask for huge pages there.

    Had the heap grown by itself, its new parts would be in small pages again. glibc's own way, GLIBC_TUNABLES, is for whole
    processes as they start, and so for Ray's services and the readers, too.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = min(HUGE_HEAP, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)
    block = libc.malloc(ctypes.c_size_t(size))
    if block is None:
        return
    first = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(first, size - (first - block), mmap.MADV_HUGEPAGE)  # in vain where the system has none
    libc.free(block)


def give_back_free_memory() -> None:
    """Return to the system what glibc keeps of freed memory; with other allocators nothing."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None

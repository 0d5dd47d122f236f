"""Processes that compute reuse what they freed, until they give it back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.memory import ONE_HEAP
from tests.job_runs import ROOT

CODE = """
import resource
import threading
import torch
from pipeline.memory import give_back_free_memory, reuse_freed_memory

def taken():  # pages that a tensor of 64 MiB has the system clear
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():  # MiB of this process in memory
    return int(open("/proc/self/statm").read().split()[1]) // 256

def compute():
    torch.ones(1)
    mapped = [taken() for _ in range(3)][-1]
    reuse_freed_memory()
    reused = [taken() for _ in range(3)][-1]
    before = held()
    give_back_free_memory()
    print(mapped, reused, before - held())

thread = threading.Thread(target=compute)  # as in Ray's workers
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_reused_and_given_back() -> None:
    environment = os.environ | dict([ONE_HEAP])
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    mapped, reused, given_back = map(int, done.stdout.split())
    assert reused < mapped / 10
    assert given_back >= 60

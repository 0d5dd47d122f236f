"""Memory of a process that computes: huge pages are asked for, what is freed is kept, and given back between two networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
PROGRAM = """
import json, re, resource, sys
from pathlib import Path
import torch
from pipeline.memory import give_back_free_memory, reuse_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def flags(address):
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        start, end = (int(each, 16) for each in mapping.split()[0].split("-"))
        if start <= address < end:
            return re.search(r"VmFlags: (.*)", mapping)[1].split()
    return []  # freed, and mapped no more

def allocate(mib):
    return torch.full((mib << 20,), 7, dtype=torch.uint8)

if "limited" in sys.argv:
    size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), resource.RLIM_INFINITY))
before = resident()
reuse_freed_memory()
asked = resident() - before
turns = []
for _ in range(2):
    address = allocate(200).data_ptr()
    kept = resident() - before
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate(100)
    again = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    flagged = "hg" in flags(address + (100 << 20))
    give_back_free_memory()
    turns.append({"flagged": flagged, "kept": kept, "again": again, "left": resident() - before})
    reuse_freed_memory()
print(json.dumps({"asked": asked, "turns": turns}))
"""


def measured(*arguments: str) -> dict[str, Any]:
    """What the program says of its memory."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "MALLOC_PERTURB_")}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    assert len(found["turns"]) == 2
    for turn in found["turns"]:  # the second after memory was given back
        assert turn["kept"] > 150 * MIB
        assert turn["left"] < 50 * MIB
    return found


def has_huge_pages() -> bool:
    smaps = Path("/proc/self/smaps")
    return Path("/sys/kernel/mm/transparent_hugepage").exists() and smaps.exists() and "VmFlags" in smaps.read_text()


@pytest.mark.skipif(not has_huge_pages(), reason="a system without huge pages, or that does not tell")
def test_memory_that_is_reused_may_be_huge_pages_and_is_given_back() -> None:
    found = measured()
    assert found["asked"] < 16 * MIB, "addresses, not memory"
    assert all(turn["flagged"] for turn in found["turns"])
    # In the second turn it may be a piece that the first one left, and that was given back.
    assert found["turns"][0]["again"] < 25, "100 MiB that were new would be 50 huge pages, or 25 600 small ones"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_is_reused_where_addresses_are_limited() -> None:
    assert measured("limited")["turns"][0]["again"] < 5000

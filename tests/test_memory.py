"""Memory of a process that computes: in huge pages, kept when it is freed, given back between two networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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

def allocate(mib):
    return torch.full((mib << 20,), 7, dtype=torch.uint8)

before = resident()
reuse_freed_memory()
asked = resident() - before
turns = []
for _ in range(2):
    flagged = "hg" in flags(allocate(200).data_ptr() + (100 << 20))
    kept = resident() - before
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate(190)
    again = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    give_back_free_memory()
    turns.append({"flagged": flagged, "kept": kept, "again": again, "left": resident() - before})
    reuse_freed_memory()
print(json.dumps({"asked": asked, "turns": turns}))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or "VmFlags" not in Path("/proc/self/smaps").read_text(),
    reason="a system without huge pages, or that does not tell",
)
def test_large_tensors_lie_in_huge_pages_that_are_reused_and_given_back() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["asked"] < 16 * MIB, "addresses, not memory"
    assert len(found["turns"]) == 2
    for turn in found["turns"]:  # the second after memory was given back
        assert turn["flagged"]
        assert turn["kept"] > 150 * MIB
        assert turn["again"] < 50, "190 MiB that were new would be 95 huge pages, or 48 640 small ones"
        assert turn["left"] < 50 * MIB

"""OpenMP is told how long to look before threads sleep, before torch loads it, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.job_runs import ROOT


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_what_openmp_says_of_itself(given: dict[str, str], used: str) -> None:
    code = "from pipeline.threads import compute_with; compute_with(2); import torch; print(torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "2"
    assert used in done.stderr

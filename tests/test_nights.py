"""Nights as the job meets them: bad inputs of every kind, kills in the middle, and two runs at once."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.storage import Location
from tests.chaos import arguments, differences, disturbed, kill_process, make_night, tables
from tests.job_runs import JOB_S, ROOT

pytestmark = pytest.mark.slow


def test_a_night_has_one_run_at_a_time_and_kills_leave_no_trace(
    models: Path, tmp_path: Path, start: Callable[..., tuple[object, str, str]]
) -> None:
    night, calm = Location.parse(make_night(tmp_path / "night")), Location.parse(tmp_path / "calm")
    command = [sys.executable, str(ROOT / "jobs/score_archives.py"), *map(str, arguments(night, models, calm))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        lock = calm / "locks/night=2026-01-31.json"
        while not lock.exists():
            assert first.poll() is None, "the first run ended before it held its night"
            time.sleep(0.05)
        status, _, errors = start("score_archives", *arguments(night, models, calm)[:-1])  # without --wait
        output, _ = first.communicate(timeout=JOB_S)
    assert (status, "in work by another run" in errors) == (2, True), errors
    assert first.returncode == 0, output
    assert not lock.exists()
    expected = tables(calm)
    assert (len(expected["scores"]), len(expected["failures"])) == (63, 9)

    again = Location.parse(tmp_path / "disturbed")
    starts, killed = disturbed(night, models, again, ["actor", "job"], random.Random(0), kill_process)
    assert killed == ["actor", "job"]
    assert starts == 2, "the actor comes back by itself, the job is started again"
    assert not differences(tables(again), expected)

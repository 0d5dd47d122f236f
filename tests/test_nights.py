"""Nights as the job meets them: bad inputs of every kind, kills in the middle, and two runs at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.storage import Location
from tests.bad_inputs import write_corpus
from tests.chaos import arguments, differences, disturbed, kill_process, make_night, tables
from tests.job_runs import ROOT, job, rows

pytestmark = pytest.mark.slow


def test_every_bad_input_is_told_and_every_good_image_beside_it_is_scored(models: Path, tmp_path: Path) -> None:
    expected = write_corpus(tmp_path / "corpus")
    results = tmp_path / "results"
    run = job(
        *("score_archives", "--archives", tmp_path / "corpus", "--category", "brick", "--models", models),
        *("--results", results, "--night", "2026-01-31", "--maps", "none"),
        env={"RAY_OVERRIDE_RESOURCES": ""},  # every core: readers beside the actor, and an actor of several threads
    )
    assert run.returncode == 1, run.stdout + run.stderr  # far more failures than a good night has
    assert "not scored" not in run.stdout
    (record,) = (json.loads(path.read_text()) for path in (results / "runs").glob("*.json"))
    told = Counter(str(row["error"]) for row in rows(results, "failures"))
    wanted = Counter(code for kind in expected for _, code in kind.failures)
    assert told == wanted
    assert record["counts"]["scored"] == len(rows(results, "scores")) == sum(kind.good for kind in expected)
    assert record["counts"]["images"] == record["counts"]["scored"] + record["counts"]["failed"]


def test_a_night_has_one_run_at_a_time_and_kills_leave_no_trace(models: Path, tmp_path: Path) -> None:
    night, calm = Location.parse(make_night(tmp_path / "night")), Location.parse(tmp_path / "calm")
    command = [sys.executable, str(ROOT / "jobs/score_archives.py"), *map(str, arguments(night, models, calm))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        lock = calm / "locks/night=2026-01-31.json"
        while not lock.exists():
            assert first.poll() is None, "the first run ended before it held its night"
            time.sleep(0.05)
        second = job("score_archives", *arguments(night, models, calm)[:-1])  # without --wait
        output, _ = first.communicate(timeout=300)
    assert second.returncode == 2, second.stdout + second.stderr
    assert "in work by another run" in second.stderr
    assert first.returncode == 0, output
    assert not lock.exists()
    expected = tables(calm)
    assert (len(expected["scores"]), len(expected["failures"])) == (63, 9)

    again = Location.parse(tmp_path / "disturbed")
    starts, killed = disturbed(night, models, again, ["actor", "job"], random.Random(0), kill_process)
    assert killed == ["actor", "job"]
    assert starts == 2, "the actor comes back by itself, the job is started again"
    assert not differences(tables(again), expected)

"""One run per night: told by real processes that contend for it, on a local disk and on real S3 servers."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.night_lock import LockLostError, NightLock, hold_night
from pipeline.storage import Location
from tests.fault_proxy import Fault, fault_proxy

NIGHT = "2026-01-31"
PATIENCE_S = 60
SPAWN = multiprocessing.get_context("spawn")

STALE = b"""{"token": "0", "host": "gone", "pid": 1, "since": "2026-01-31T22:00:00+00:00",
             "expires": "2026-01-31T22:01:00+00:00", "expiry_s": 0.1}"""


@pytest.fixture(params=["local", "seaweed_s3"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.parse(tmp_path) if request.param == "local" else request.getfixturevalue(request.param)


def _file(results: Location, night: str = NIGHT) -> Location:
    return results / "locks" / f"night={night}.json"


def _wait_until_lost(lock: NightLock, at_most_s: float) -> float:
    """Seconds until it was lost."""
    started = time.monotonic()
    while not lock.lost:
        assert time.monotonic() - started < at_most_s, "the holder did not notice"
        time.sleep(0.02)
    return time.monotonic() - started


# --- one process ----------------------------------------------------------------------------------


def test_the_second_run_is_told_who_holds_the_night(results: Location) -> None:
    with hold_night(results, NIGHT, wait=False) as lock:
        assert not lock.lost
        with pytest.raises(UserError) as refused, hold_night(results, NIGHT, wait=False):
            pytest.fail("two runs of one night")
        with hold_night(results, "2026-02-01", wait=False):
            pass
        assert _file(results).read_json()["pid"] == os.getpid()
    message = str(refused.value)
    assert "\n" not in message
    assert f"night {NIGHT} is in work by another run" in message
    assert f"host {os.uname().nodename}, process {os.getpid()}, since 20" in message
    assert "expires 20" in message
    assert results.files(recursive=True) == []


def test_the_lock_is_free_after_an_exception(results: Location) -> None:
    with pytest.raises(KeyboardInterrupt), hold_night(results, NIGHT, wait=False):
        raise KeyboardInterrupt
    with hold_night(results, NIGHT, wait=False):
        pass


@pytest.mark.slow
def test_a_night_that_lasts_longer_than_the_expiry_stays_held(results: Location) -> None:
    with hold_night(results, NIGHT, wait=False, expiry_s=6) as lock:
        first = _file(results).read_stored().version
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with pytest.raises(UserError, match="another run"), hold_night(results, NIGHT, wait=False, expiry_s=6):
                pytest.fail("two runs of one night")
            lock.check()
            time.sleep(0.2)
        assert _file(results).read_stored().version != first


def test_a_holder_whose_lock_was_taken_notices_and_leaves_the_others_lock(results: Location) -> None:
    losing = pytest.raises(LockLostError, match=NIGHT)
    with losing, hold_night(results, NIGHT, wait=False, expiry_s=15) as lock:
        _file(results).write_bytes(STALE)
        _wait_until_lost(lock, at_most_s=10)  # at the expiry it would be lost by itself
        with pytest.raises(LockLostError):
            lock.check()
    assert _file(results).read_bytes() == STALE


def test_a_holder_that_ends_before_it_notices_leaves_the_others_lock(results: Location) -> None:
    with hold_night(results, NIGHT, wait=False):
        _file(results).write_bytes(STALE)
    assert _file(results).read_bytes() == STALE


def test_a_holder_whose_lock_was_removed_notices(results: Location) -> None:
    losing = pytest.raises(LockLostError, match=NIGHT)
    with losing, hold_night(results, NIGHT, wait=False, expiry_s=15) as lock:
        _file(results).remove()
        _wait_until_lost(lock, at_most_s=10)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "stall"])
def test_a_holder_out_of_reach_of_the_storage_gives_up_at_the_expiry(
    s3: Location, server: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """And so before others may take over, which they may after the expiry. A storage that is back changes nothing."""
    with fault_proxy(server, stall_s=1000) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        losing = pytest.raises(LockLostError, match=NIGHT)
        with losing, hold_night(s3, NIGHT, wait=False, expiry_s=8) as lock:
            acquired = proxy.requests["PUT"]
            while proxy.requests["PUT"] == acquired:  # until a renewal, which finds all connections made
                time.sleep(0.02)
            proxy.break_some(1.0, [fault], seed=0)
            assert 4 < _wait_until_lost(lock, at_most_s=12) < 10
            proxy.break_some(0.0, [], seed=0)
            time.sleep(2)
            assert lock.lost
        assert proxy.injected[fault] > 0


def test_a_storage_out_of_reach_for_less_than_the_expiry_loses_nothing(
    s3: Location, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with hold_night(s3, NIGHT, wait=False, expiry_s=20) as lock:
            for method in ("GET", "PUT"):
                proxy.break_next(method, "slow_down", "reset", "lost_reply")
            until = time.monotonic() + PATIENCE_S
            while proxy.injected.total() < 6 and time.monotonic() < until:
                time.sleep(0.1)
            lock.check()
        assert proxy.injected.total() == 6
    assert s3.files(recursive=True) == []


def test_who_waits_is_told_once_for_whom(results: Location) -> None:
    told: list[str] = []
    with hold_night(results, NIGHT, wait=False) as first:
        threading.Timer(2, first.release).start()
        with hold_night(results, NIGHT, wait=True, expiry_s=3, tell=told.append):
            pass
    (line,) = told
    assert f"process {os.getpid()}" in line


def test_a_file_that_is_no_lock_is_left_alone(results: Location) -> None:
    _file(results).write_bytes(b"not ours")
    with pytest.raises(UserError, match="removed by hand"), hold_night(results, NIGHT, wait=False):
        pytest.fail("took a file that it does not know")
    assert _file(results).read_bytes() == b"not ours"


def test_nights_with_odd_names_keep_apart(tmp_path: Path) -> None:
    results = Location.parse(tmp_path)
    with hold_night(results, "../a", wait=False), hold_night(results, "a", wait=False):
        assert {file.name for file in results.files(recursive=True)} == {"night=..%2Fa.json", "night=a.json"}


# --- several processes ----------------------------------------------------------------------------


def _contend(results: Location, nights: list[str], start: Barrier, outcomes: Queue) -> None:
    """Tries for each night at the same moment as the other; who gets it keeps it until both have tried."""
    for night in nights:
        start.wait(PATIENCE_S)
        try:
            with hold_night(results, night, wait=False, expiry_s=30):
                start.wait(PATIENCE_S)
                outcomes.put((night, True))
        except UserError:
            start.wait(PATIENCE_S)
            outcomes.put((night, False))


def test_of_two_runs_started_at_once_one_gets_the_night(results: Location) -> None:
    """New nights and nights whose holder died, in turns."""
    nights = [f"night-{number:02d}" for number in range(20)]
    for night in nights[::2]:
        _file(results, night).write_bytes(STALE)
    start, outcomes = SPAWN.Barrier(2), SPAWN.Queue()
    runs = [SPAWN.Process(target=_contend, args=(results, nights, start, outcomes)) for _ in range(2)]
    time.sleep(2.5)  # until the stale locks are seen to be stale
    for run in runs:
        run.start()
    told = [outcomes.get(timeout=PATIENCE_S) for _ in range(2 * len(nights))]
    for run in runs:
        run.join(PATIENCE_S)
        assert run.exitcode == 0
    winners = {night: sum(won for of, won in told if of == night) for night in nights}
    assert winners == dict.fromkeys(nights, 1)
    assert results.files(recursive=True) == []


def _hold(results: Location, expiry_s: float, held: Event) -> None:
    with hold_night(results, NIGHT, wait=False, expiry_s=expiry_s):
        held.set()
        time.sleep(PATIENCE_S)


def test_a_killed_holders_night_is_free_after_the_expiry(results: Location) -> None:
    held = SPAWN.Event()
    run = SPAWN.Process(target=_hold, args=(results, 5.0, held))
    run.start()
    try:
        assert held.wait(PATIENCE_S)
    finally:
        run.kill()
        run.join(PATIENCE_S)
    killed = time.monotonic()
    with pytest.raises(UserError, match=f"process {run.pid}"), hold_night(results, NIGHT, wait=False):
        pytest.fail("taken over before the expiry")
    with hold_night(results, NIGHT, wait=True, expiry_s=5.0):
        assert 2 < time.monotonic() - killed < 30
    assert results.files(recursive=True) == []

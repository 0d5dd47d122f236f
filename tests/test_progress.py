"""What a scoring run says while it runs and at its end."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import LOG_EVERY, ScoringProgress, duration_text, model_line, show_totals, size_text
from pipeline.totals import ShardOutcome, total

MIB = 2**20


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What reaches a log."""
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, width=200, highlight=False))
    return text


def shard(archive: int, name: str, mib: float, scored: int = 10, **changes: int) -> ShardOutcome:
    return ShardOutcome(archive, name, scored, scored=scored, bytes=int(mib * MIB), **changes)


def archive_row(archive: int, shards: int, skipped: int = 0) -> ShardOutcome:
    return ShardOutcome(archive, None, members=0, shards=shards, skipped=skipped)


def test_the_time_left_follows_from_the_bytes_gone_through(clock: Clock) -> None:
    state = ScoringProgress([100 * MIB, 300 * MIB], clock)
    assert state.seconds_left() is None
    clock.now += 50
    state(shard(0, "a", 49))
    state(shard(0, "b", 49))
    assert state.seconds_left() == pytest.approx(50 * 302 / 98)
    # The archive was 2 MiB larger than its images: now that it is done, these are not waited for.
    state(archive_row(0, shards=2))
    assert state.seconds_left() == pytest.approx(150)
    clock.now += 75
    state(shard(1, "c", 150))
    assert state.seconds_left() == pytest.approx(125 * 150 / 250)
    state(shard(1, "d", 149))
    state(archive_row(1, shards=2))
    assert state.seconds_left() == 0


def test_an_archive_is_done_when_its_shards_are_not_when_it_is_read(clock: Clock) -> None:
    state = ScoringProgress([MIB], clock)
    state(archive_row(0, shards=2))
    state(shard(0, "a", 0.5))
    assert state.line().startswith("0/1 archives")
    state(shard(0, "b", 0.4))
    assert state.line().startswith("1/1 archives")


def test_what_an_earlier_run_scored_is_neither_left_nor_counted_as_work(clock: Clock) -> None:
    state = ScoringProgress([100 * MIB, 100 * MIB, 100 * MIB], clock)
    clock.now += 10
    state(archive_row(0, shards=0, skipped=7))
    assert state.seconds_left() is None
    state(shard(1, "last", 20))
    state(archive_row(1, shards=1, skipped=7))
    assert state.seconds_left() == pytest.approx(10 * 100 / 20)
    state(archive_row(2, shards=5, skipped=15))  # a zip tells its shards before they are scored
    assert state.seconds_left() == pytest.approx(10 * 25 / 20)


def test_images_that_unpack_to_more_than_their_archive_leave_no_negative_time(clock: Clock) -> None:
    state = ScoringProgress([10 * MIB, 10 * MIB], clock)
    clock.now += 10
    state(shard(0, "a", 70))
    assert state.seconds_left() == pytest.approx(10)


def test_the_line_tells_counts_rate_bytes_and_time(clock: Clock) -> None:
    state = ScoringProgress([100 * MIB, 100 * MIB], clock)
    clock.now += 40
    state(shard(0, "a", 100, scored=90, anomalous=4, failed=10))
    state(archive_row(0, shards=1))
    assert state.line() == (
        "1/2 archives, 90 scored (4 anomalous), 10 failed, 2.5 images/s, 100.0 MiB read, 0:40, about 0:40 left"
    )


def test_a_log_gets_a_line_now_and_then(clock: Clock, printed: io.StringIO) -> None:
    with ScoringProgress([MIB] * 100, clock) as state:
        for number in range(100):
            clock.now += LOG_EVERY / 10
            state(shard(number, f"s{number}", 1))
    lines = printed.getvalue().splitlines()
    assert len(lines) == 10
    assert "100 scored" in lines[0]
    assert all("left" in line for line in lines)


def test_a_terminal_gets_one_line_that_changes_and_goes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, width=200, force_terminal=True, highlight=False))
    with ScoringProgress([MIB], clock) as state:
        clock.now += 2 * LOG_EVERY
        state(shard(0, "a", 1))
        state._live.refresh()
    assert "10 scored" in text.getvalue()
    assert text.getvalue().rstrip().endswith("\x1b[2K"), "the line is erased at the end"


def test_the_totals_name_codes_categories_above_the_limit_and_what_was_not_scored(printed: io.StringIO) -> None:
    outcomes = [
        ShardOutcome(0, "a", 10, 8, 2, 1, category="bolt", bytes=3 * MIB, failures='{"truncated": 2}'),
        ShardOutcome(1, "b", 10, 10, category="nut", bytes=MIB),
        ShardOutcome(1, "c", 5, category="nut", error="disk [full]"),
        ShardOutcome(0, None, 10, shards=1, category="bolt"),
        ShardOutcome(1, None, 15, shards=2, category="nut"),
    ]
    show_totals(total(outcomes, 2), max_failure_fraction=0.1)
    assert printed.getvalue().splitlines() == [
        "25 images in = 18 scored (1 anomalous) + 2 failed; 2 shards written, 4.0 MiB read",
        "failed: 2 truncated; see the failures table",
        "bolt: 20.0 % of the images failed, --max-failure-fraction allows 10 %",
        "not scored: disk [full]",
        "some images are neither scored nor failed: run the same command again",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * MIB, "1.5 GiB"), (2**50, "1048576.0 GiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def outcome(**changes: Any) -> dict[str, Any]:
    known = {
        "alpha": 0.2,
        "subtract_prediction": False,
        "covariance": "place",
        "context_weight": 0.0,
        "reach": 0,
        "turned": False,
        "top_pixels": 64,
        "pixel_auroc": 0.99,
        "pro_0.30": 0.95,
        "image_auroc": 1.0,
        "false_alarm_rate": 0.01,
        "false_alarms_low": 0.00123,
        "false_alarms_high": 0.021,
        "normal_images": 264,
        "by_rank": True,
        "known_by_heart": False,
        "threshold": 7.1234,
        "oddest": [{"image": f"bottle/{i}.png", "score": 9.0 - i} for i in range(10)],
    }
    return known | changes


def test_a_new_models_line_tells_what_its_threshold_rests_on() -> None:
    line = model_line("bottle", outcome(), {})
    assert "1 % requested, 95 % interval 0.12-2.1 % by the scores of 264 normal images; threshold 7.12" in line
    assert line.endswith("the oddest of those scored: bottle/0.png 9, bottle/1.png 8, bottle/2.png 7")
    assert "26 normal images if they follow a normal law" in model_line(
        "bottle", outcome(normal_images=26, by_rank=False), {}
    )
    assert "26 normal images (held-out ones alone: the network knows the others by heart)" in model_line(
        "bottle", outcome(normal_images=26, known_by_heart=True), {}
    )

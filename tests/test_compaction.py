"""Compaction: the same rows before, after, in the middle and after a kill at any step, for readers at any moment."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import compaction
from pipeline.compaction import Compaction, compact_night, old_nights, plan_compaction
from pipeline.errors import UserError
from pipeline.results import finished_shards, iter_maps, read_failures, read_scores, write_shard
from pipeline.storage import Location
from tests.test_results import NIGHT, failure_row, score_row, some_maps

ROOT = Path(__file__).parent.parent
SMALL = 2500
"""Bytes: a few shards of these tests a file."""

Seen = tuple[set[str], list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, str]]]


def write(results: Location, number: int, **changes: Any) -> None:
    """Shard `number`: a few scores and maps; every third one has a failure, every fourth nothing else."""
    count = 0 if number % 4 == 3 else 1 + number % 3
    rows = [score_row(10 * number + i) for i in range(count)]
    arguments: dict[str, Any] = {
        "category": "widget",
        "night": NIGHT,
        "shard": f"é night {number}.tar-00000",
        "scores": rows,
        "maps_nhw": some_maps(count) + number if count else None,
        "failures": [failure_row(number)] if number % 3 == 0 else [],
        "map_format": "float16",
    }
    write_shard(results, **(arguments | changes))


def seen(results: Location) -> Seen:
    """All that readers see of the night, each map as the digest of its bytes: quick to print where it differs."""
    maps = [
        (key, digest(one))
        for ids, maps_nhw in iter_maps(results, category="widget", night=NIGHT)
        for key, one in zip(ids, maps_nhw, strict=True)
    ]
    shards = finished_shards(results, category="widget", night=NIGHT)
    return shards, read_scores(results).to_pylist(), read_failures(results).to_pylist(), maps


def digest(map_hw: np.ndarray) -> str:
    return f"{map_hw.shape} {hashlib.sha256(map_hw.tobytes()).hexdigest()[:12]}"


def files(results: Location, table: str = "") -> list[str]:
    return [file.relative_to(results) for file in (results / table if table else results).files(recursive=True)]


def compact(results: Location, **options: Any) -> Compaction:
    return compact_night(results, "widget", NIGHT, **options)


@pytest.fixture
def results(tmp_path: Path) -> Location:
    """Eight shards: scores and maps in shards 0-2 and 4-6, failures in 0, 3 and 6, nothing at all in 7."""
    results = Location.parse(tmp_path / "results")
    for number in range(8):
        write(results, number)
    return results


class Killed(BaseException):
    """The process is gone: nothing in the package catches this."""


class Steps:
    """Counts the changes of the storage; calls `before` ahead of each, and dies at number `kill`, once and for all."""

    def __init__(self, patch: pytest.MonkeyPatch, *, kill: int = -1, before: Callable[[], None] | None = None) -> None:
        self.count = 0
        self.kill = kill
        self.before = before
        self.lock = threading.RLock()
        for name in ("write_bytes", "remove"):
            patch.setattr(Location, name, self.counted(getattr(Location, name)))

    def counted(self, change: Callable[..., None]) -> Callable[..., None]:
        def step(location: Location, *arguments: Any) -> None:
            if self.before:
                self.before()
            with self.lock:
                if 0 <= self.kill <= self.count:
                    raise Killed
                self.count += 1
                change(location, *arguments)

        return step


def steps_of(results: Location, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """How many changes of the storage a compaction makes; leaves the night compacted."""
    with monkeypatch.context() as patch:
        steps = Steps(patch)
        compact(results, **options)
    return steps.count


def copy(results: Location, name: str) -> Location:
    other = results.parent / name
    for file in results.files(recursive=True):
        (other / file.relative_to(results)).write_bytes(file.read_bytes())
    return other


def test_rows_and_shards_stay_the_same_in_fewer_files(results: Location) -> None:
    before = seen(results)
    assert len(files(results)) == 8 + 6 + 3
    assert plan_compaction(results, "widget", NIGHT) == Compaction(8, 17, 0, 0)
    assert compact(results) == Compaction(8, 17, 3, 0)
    assert seen(results) == before
    assert [len(files(results, table)) for table in ("scores", "maps", "failures")] == [1, 1, 1]
    assert compact(results) == plan_compaction(results, "widget", NIGHT) == Compaction(0, 0, 0, 0)
    assert seen(results) == before


def test_files_are_cut_at_the_target_and_maps_fill_their_row_groups(results: Location) -> None:
    # Shards of 40 maps, of which row groups of 128 hold three and a bit.
    for number in range(10, 20):
        rows = [score_row(1000 * number + i) for i in range(40)]
        write(results, number, scores=rows, maps_nhw=some_maps(40) + number)
    before = seen(results)
    compact(results)
    (whole,) = (results / "maps").files(recursive=True)
    metadata = pq.read_metadata(whole.uri)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [128, 128, 128, 28]
    assert seen(results) == before
    one = list(iter_maps(results, category="widget", night=NIGHT, shard="é night 13.tar-00000"))
    assert sum(len(ids) for ids, _ in one) == 40
    assert np.array_equal(np.concatenate([maps for _, maps in one]), (some_maps(40) + 13).astype(np.float16))


def test_large_tables_become_several_files(results: Location) -> None:
    before = seen(results)
    done = compact(results, target_bytes=1)
    # One file for each shard that has rows, and for scores the commit.
    assert [len(files(results, table)) for table in ("scores", "maps", "failures")] == [6, 6, 3]
    assert done.written == 15
    assert seen(results) == before


def test_maps_of_other_sizes_and_formats_stay_apart(results: Location) -> None:
    write(results, 20, scores=[score_row(i) for i in range(200, 203)], maps_nhw=some_maps(3, 4, 4))
    write(results, 21, scores=[score_row(i) for i in range(210, 213)], maps_nhw=some_maps(3), map_format="uint8")
    before = seen(results)
    compact(results)
    assert len(files(results, "maps")) == 3
    assert seen(results) == before


def test_duckdb_reads_the_same_rows(results: Location) -> None:
    def rows() -> list[Any]:
        found = []
        for table in ("scores", "maps", "failures"):
            pattern = f"{results.uri}/{table}/*/*/*.parquet"
            # DuckDB needs one more package to give times with a zone to Python.
            columns = "* REPLACE (epoch_ms(scored_at) AS scored_at)" if table == "scores" else "*"
            query = f"SELECT {columns} FROM read_parquet('{pattern}', hive_partitioning = true) ORDER BY ALL"
            found.append(duckdb.connect().sql(query).fetchall())
        return found

    before = rows()
    assert [len(part) for part in before] == [12, 12, 3]
    compact(results, target_bytes=SMALL)
    assert rows() == before


def test_late_shards_join_a_compacted_night(results: Location, tmp_path: Path) -> None:
    compact(results, target_bytes=SMALL)
    for number in (8, 9, 45):  # the last one sorts between others
        write(results, number)
    undisturbed = Location.parse(tmp_path / "undisturbed")
    for number in (*range(10), 45):
        write(undisturbed, number)
    assert seen(results) == seen(undisturbed)
    assert compact(results).shards == 11
    assert seen(results) == seen(undisturbed)
    assert [len(files(results, table)) for table in ("scores", "maps", "failures")] == [1, 1, 1]


def test_a_shard_inside_a_compacted_file_is_not_written_again(results: Location) -> None:
    before = seen(results)
    compact(results)
    with pytest.raises(UserError, match=r"shard é night 1\.tar-00000 is finished, inside .*commit\.parquet: leave it"):
        write(results, 1)
    assert seen(results) == before
    assert len(files(results)) == 3


def test_another_night_and_an_unfinished_shard_are_left_alone(results: Location) -> None:
    write(results, 1, night="2025-03-10")
    write(results, 30)
    unfinished = next(file for file in (results / "scores").files(recursive=True) if "%2030" in file.name)
    unfinished.remove()
    others = [file for file in files(results) if "%2030" in file or "2025-03-10" in file]
    assert len(others) == 4
    compact(results)
    assert set(others) < set(files(results))
    write(results, 30)
    assert len(finished_shards(results, category="widget", night=NIGHT)) == 9


def assert_nothing_missing_for_others(results: Location, expected: Seen) -> None:
    """A reader that knows Parquet alone has every row, some of them perhaps twice."""
    for table, rows in (("scores", expected[1]), ("failures", expected[2]), ("maps", expected[3])):
        found = [
            image
            for file in (results / table).files(recursive=True)
            for image in pq.read_table(file.uri, columns=["image_id"], partitioning=None)["image_id"].to_pylist()
        ]
        wanted = [row["image_id"] if isinstance(row, dict) else row[0] for row in rows]
        assert set(found) == set(wanted)
        assert len(found) <= 2 * len(wanted)


@pytest.mark.parametrize("again", [False, True], ids=["first", "with late shards"])
def test_readers_see_the_same_at_every_step_and_after_a_kill_at_any(
    results: Location, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    if again:
        compact(results, target_bytes=SMALL)
        for number in (8, 9, 12):
            write(results, number)
    expected = seen(results)
    count = steps_of(copy(results, "counted"), monkeypatch, target_bytes=SMALL)
    assert count > 12
    for kill in range(count):
        killed = copy(results, f"killed-{kill}")
        with monkeypatch.context() as patch:
            steps = Steps(patch, kill=kill)
            with pytest.raises(Killed):
                compact(killed, target_bytes=SMALL)
            assert steps.count == kill
        assert_nothing_missing_for_others(killed, expected)
        # Over all kills these are all moments of an undisturbed compaction too.
        assert seen(killed) == expected, kill
        compact(killed, target_bytes=SMALL)
        assert seen(killed) == expected, kill
        assert compact(killed, target_bytes=SMALL) == Compaction(0, 0, 0, 0)
        if not again:
            assert sorted(files(killed)) == sorted(files(results.parent / "counted")), kill


def test_late_shards_after_a_kill_lose_nothing_and_what_was_given_up_goes_after_a_day(
    results: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = steps_of(copy(results, "counted"), monkeypatch, target_bytes=SMALL)
    for kill in range(count):
        killed = copy(results, f"killed-{kill}")
        with monkeypatch.context() as patch:
            Steps(patch, kill=kill)
            with pytest.raises(Killed):
                compact(killed, target_bytes=SMALL)
        write(killed, 9)
        expected = seen(killed)
        assert len(expected[0]) == 9
        compact(killed)
        assert seen(killed) == expected
        with monkeypatch.context() as patch:
            patch.setattr(compaction, "ABANDONED", timedelta(0))
            compact(killed)
        assert seen(killed) == expected
        assert [len(files(killed, table)) for table in ("scores", "maps", "failures")] == [1, 1, 1]


def test_files_of_a_compaction_at_work_are_left_to_it(results: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Steps(patch, kill=2)
        with pytest.raises(Killed):
            compact(results, target_bytes=SMALL)
    started = [file for file in files(results) if "@" in file]
    assert len(started) == 2
    write(results, 9)  # another compaction has other inputs, hence other names
    compact(results)
    assert set(started) < set(files(results))


def test_two_compactions_of_one_night_at_once_lose_nothing(results: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second runs as a whole between two steps of the first, wherever that is, with one more shard."""
    count = steps_of(copy(results, "counted"), monkeypatch, target_bytes=SMALL)
    for moment in range(count):
        both = copy(results, f"both-{moment}")
        turns = iter(range(count))

        def second(both: Location = both, moment: int = moment, turns: Iterator[int] = turns) -> None:
            if next(turns, None) == moment:
                write(both, 9)
                compact(both)

        with monkeypatch.context() as patch:
            Steps(patch, before=second)
            try:
                compact(both, target_bytes=SMALL)
            except UserError as error:
                assert "went away meanwhile" in str(error)  # noqa: PT017
        undisturbed = copy(results, f"alone-{moment}")
        write(undisturbed, 9)
        assert seen(both) == seen(undisturbed), moment
        compact(both)
        assert seen(both) == seen(undisturbed), moment


DYING = """
import os, sys
from pipeline.compaction import compact_night
from pipeline.storage import Location
left = int(sys.argv[2])
def dying(change):
    def step(location, *arguments):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        change(location, *arguments)
    return step
Location.write_bytes, Location.remove = dying(Location.write_bytes), dying(Location.remove)
compact_night(Location.parse(sys.argv[1]), "widget", sys.argv[3], target_bytes=2500)
"""


@pytest.mark.parametrize("kill", [0, 3, 6, 11])
def test_a_process_that_dies_leaves_a_readable_night(results: Location, kill: int) -> None:
    expected = seen(results)
    command = [sys.executable, "-c", DYING, results.uri, str(kill), NIGHT]
    assert subprocess.run(command, cwd=ROOT, timeout=120, check=False).returncode == 9
    assert seen(results) == expected
    compact(results, target_bytes=SMALL)
    assert seen(results) == expected
    assert all("@" in file for file in files(results))


def test_shards_of_any_name_are_compacted(results: Location) -> None:
    names = ["a/b@c", "..", "compacted@0001-abcdef-commit", b"stra\xdfe".decode(errors="surrogateescape")]
    for number, name in enumerate(names, 50):
        write(results, number, shard=name)
    before = seen(results)
    assert before[0] > set(names)
    compact(results)
    assert seen(results) == before


READERS: dict[str, Callable[[Location], Any]] = {
    "shards": lambda results: finished_shards(results, category="widget", night=NIGHT),
    "scores": lambda results: read_scores(results).to_pylist(),
    "failures": lambda results: read_failures(results, category="widget", night=NIGHT).to_pylist(),
    "maps": lambda results: seen(results)[3],
}


def interrupted_at(step: int, patch: pytest.MonkeyPatch, *actions: Callable[[], None]) -> dict[str, int]:
    """Runs the actions ahead of the reader's accesses to the storage from number `step` on; returns their count."""
    count = {"accesses": 0, "busy": 0}
    lock = threading.RLock()

    def watched(access: Callable[..., Any]) -> Callable[..., Any]:
        def read(location: Location, *arguments: Any, **options: Any) -> Any:
            with lock:
                if not count["busy"]:
                    count["accesses"] += 1
                    if 0 <= count["accesses"] - step - 1 < len(actions):
                        count["busy"] = 1
                        actions[count["accesses"] - step - 1]()
                        count["busy"] = 0
            return access(location, *arguments, **options)

        return read

    for name in ("files", "read_bytes", "open"):
        patch.setattr(Location, name, watched(getattr(Location, name)))
    return count


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("again", [False, True], ids=["first", "with late shards"])
def test_a_compaction_in_the_middle_of_a_reading_goes_unnoticed(
    results: Location, monkeypatch: pytest.MonkeyPatch, reader: str, again: bool
) -> None:
    if again:
        compact(results, target_bytes=SMALL)
        write(results, 8)
        write(results, 9)
    expected = READERS[reader](results)
    step, accesses = 0, 1
    while step < accesses:
        night = copy(results, f"night-{step}")
        with monkeypatch.context() as patch:
            count = interrupted_at(step, patch, lambda night=night: compact(night, target_bytes=SMALL))  # type: ignore[misc]
            assert READERS[reader](night) == expected, step
        accesses = max(accesses, count["accesses"])
        assert step >= count["accesses"] or "commit" in str(files(night))
        step += 1
    assert accesses >= 2


@pytest.mark.parametrize("reader", READERS)
def test_a_compaction_killed_in_the_middle_of_a_reading_and_finished_a_moment_later_goes_unnoticed(
    results: Location, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    expected = READERS[reader](results)
    count = steps_of(copy(results, "counted"), monkeypatch, target_bytes=SMALL)
    for kill in range(1, count, 3):
        for step in range(6):
            night = copy(results, f"night-{kill}-{step}")

            def start(night: Location = night, kill: int = kill) -> None:
                with monkeypatch.context() as patch:
                    Steps(patch, kill=kill)
                    with pytest.raises(Killed):
                        compact(night, target_bytes=SMALL)

            def finish(night: Location = night) -> None:
                compact(night, target_bytes=SMALL)

            with pytest.MonkeyPatch.context() as patch:
                interrupted_at(step, patch, start, finish)
                assert READERS[reader](night) == expected, (kill, step)


def test_shards_written_in_the_middle_of_a_compaction_keep_all_their_rows(
    results: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    undisturbed = copy(results, "undisturbed")
    write(undisturbed, 12)
    step, accesses = 0, 1
    while step < accesses:
        night = copy(results, f"night-{step}")
        with monkeypatch.context() as patch:
            count = interrupted_at(step, patch, lambda night=night: write(night, 12))  # type: ignore[misc]
            compact(night)
        accesses = max(accesses, count["accesses"])
        if step < count["accesses"]:
            assert seen(night) == seen(undisturbed), step
        step += 1
    assert accesses > 10


def test_a_listing_that_misses_the_compaction_is_repeated(results: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long listing comes in pages: it can be too early for the commit and too late for the small files."""
    expected = seen(results)
    list_files = Location.files
    compacted = {"done": False}

    def files_in_pages(location: Location, **options: Any) -> list[Location]:
        first = list_files(location, **options)
        if "/scores/" in location.uri and not compacted["done"] and compacted.setdefault("listed", False):
            compacted["done"] = True
            compact(results)
            second = list_files(location, **options)
            half = len(first) // 2
            return [*first[:half], *(file for file in second if file in first[half:])]
        compacted["listed"] = True
        return first

    for reader in READERS.values():
        night = copy(results, "torn")
        assert reader(night)
    monkeypatch.setattr(Location, "files", files_in_pages)
    assert finished_shards(results, category="widget", night=NIGHT) == expected[0]
    assert compacted["done"]


def test_a_damaged_commit_is_named(results: Location) -> None:
    compact(results)
    (commit,) = (results / "scores").files(recursive=True)
    commit.write_bytes(commit.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"commit\.parquet is not a readable results file .* run the night again"):
        read_scores(results)


def test_a_damaged_small_file_stops_the_compaction_before_anything_is_removed(results: Location) -> None:
    victim = (results / "maps").files(recursive=True)[2]
    victim.write_bytes(b"PAR1 no table")
    before = files(results)
    with pytest.raises(UserError, match="is not a readable results file"):
        compact(results)
    assert set(before) < {*files(results)} | {""}
    assert all(file in files(results) for file in before)


def test_storage_that_keeps_less_than_it_was_given_stops_the_compaction(
    results: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole_write = seen(results), Location.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Location, "write_bytes", lambda location, data: whole_write(location, data[:-1]))
        with pytest.raises(OSError, match="bytes after"):
            compact(results)
    assert seen(results) == before


def test_the_nights_before_a_date_or_those_named(results: Location) -> None:
    for category, night in (("widget", "2025-03-08"), ("bolt", "2025-03-08"), ("bolt", "evaluation")):
        write(results, 1, category=category, night=night)
    assert old_nights(results, before=date(2025, 3, 9)) == [("bolt", "2025-03-08"), ("widget", "2025-03-08")]
    assert old_nights(results, categories=["bolt"], before=date(2025, 4, 1)) == [("bolt", "2025-03-08")]
    assert old_nights(results, nights=["evaluation", NIGHT]) == [("bolt", "evaluation"), ("widget", NIGHT)]
    with pytest.raises(UserError, match="no scores of category screw: check the name"):
        old_nights(results, categories=["bolt", "screw"], before=date(2025, 4, 1))
    with pytest.raises(UserError, match="no scores of night yesterday"):
        old_nights(results, nights=["yesterday"])


def test_on_s3_even_in_the_middle_of_a_reading(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    results = s3 / "results"
    for number in range(3):
        write(results, number)
    before = seen(results)
    maps: Iterator[Any] = iter_maps(results, category="widget", night=NIGHT)
    first = next(maps)
    assert compact(results, target_bytes=SMALL).shards == 3
    rest = [first, *maps]
    assert [(key, digest(one)) for ids, many in rest for key, one in zip(ids, many, strict=True)] == before[3]
    assert seen(results) == before
    write(results, 5)
    expected = seen(results)
    with monkeypatch.context() as patch:
        Steps(patch, kill=2)
        with pytest.raises(Killed):
            compact(results)
    assert seen(results) == expected
    (orphan, *_) = [file for file in (results / "maps").files(recursive=True) if "@0002" in file.name]
    assert abs(datetime.now(UTC) - orphan.modified()) < timedelta(minutes=5)
    compact(results)
    assert seen(results) == expected
    assert len(files(results)) == 3


def job(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs/compact.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, check=False)


def test_the_job_plans_compacts_and_names_what_fails(results: Location) -> None:
    write(results, 1, category="bolt")
    write(results, 2, category="bolt")
    before = seen(results)
    planned = job("--results", results, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert f"widget, {NIGHT}: 8 shards in 17 files\n" in planned.stdout
    assert seen(results) == before
    (results / "maps" / "category=bolt").files(recursive=True)[0].write_bytes(b"")
    done = job("--results", results)
    assert done.returncode == 1, done.stderr
    assert f"widget, {NIGHT}: 8 shards in 17 files into 3" in done.stdout
    assert "not compacted: bolt" in done.stdout
    assert len(files(results / "scores" / "category=widget")) == 1
    mistake = job("--results", results, "--nights", NIGHT, "--before", NIGHT)
    assert mistake.returncode == 2
    assert mistake.stderr.startswith("error: --nights and --before exclude each other")

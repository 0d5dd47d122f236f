"""The stages of the scoring job without Ray: what a reader gives, what decoding refuses, how the balance adds up."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tarfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.util.metrics import Counter

from pipeline.archives import Archive
from pipeline.batch_plan import BatchPlan, Workers, all_committed_shards, committed_shards
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.images import encode_png
from pipeline.model_store import ModelInfo
from pipeline.resources import Node, Resources
from pipeline.results import FailureRow, ScoreRow, write_shard
from pipeline.run_record import run_record
from pipeline.shard_reading import decode_shard, list_archive, read_unit
from pipeline.shard_scoring import ScoringActor
from pipeline.storage import Location
from pipeline.telemetry import ScoringTelemetry
from pipeline.totals import ShardOutcome, earlier_outcomes, total
from tests.job_runs import ROOT
from tests.stages import ONE_THREAD, read, stream


@pytest.fixture
def plan(tmp_path: Path, tiny: Config) -> BatchPlan:
    """Five images and a text file of the category cloth, in shards of 2."""
    folder = tmp_path / "cloth"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(encode_png(np.full((40, 50, 3), 40 * i, np.uint8)))
    (folder / "5.png").write_text("no image")
    location = Location.parse(tmp_path)
    info = ModelInfo(location, "cloth", "v1", tiny, {"pixel_threshold": 1.0}, True, 0.0, None, {})
    archive = Archive(Location.parse(folder), "folder", "cloth").fingerprinted()
    return BatchPlan(
        archives=(archive,),
        models={"cloth": info},
        results=location / "results",
        night="2026-01-31",
        map_format="float16",
        shard_images=2,
        started=datetime(2026, 1, 31, tzinfo=UTC),
    )


@pytest.fixture(params=["folder", "zip", "tar"])
def any_plan(plan: BatchPlan, request: pytest.FixtureRequest) -> BatchPlan:
    """The same files in a folder, a zip or a tar."""
    (folder,) = plan.archives
    if request.param == "folder":
        return plan
    path = Path(folder.location.uri)
    packed = path.parent / f"night.{request.param}"
    if request.param == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(path.iterdir()):
                archive.write(file, file.name)
    else:
        with tarfile.open(packed, "w") as tar:
            for file in sorted(path.iterdir()):
                tar.add(file, file.name)
    found = Archive(Location.parse(packed), request.param, "cloth").fingerprinted()
    return dataclasses.replace(plan, archives=(found,))


def test_a_reader_gives_the_same_rows_again_whatever_was_committed_meanwhile(any_plan: BatchPlan) -> None:
    plan = any_plan
    first = read(plan)
    (plan.results / "scores/category=cloth/night=2026-01-31" / f"{first[0]['shard']}.parquet").write_bytes(b"")
    assert read(plan) == first
    assert [len(shard["names"]) for shard in first] == [2, 2, 2, 0]
    assert json.loads(first[-1]["failures"]) == [6, 3, 0]


def test_committed_shards_are_not_read_again(any_plan: BatchPlan) -> None:
    names = [row["shard"] for row in read(any_plan)][:3]
    left = read(any_plan, [names[0], names[2]])
    assert [row["shard"] for row in left] == [names[1], ""]
    assert json.loads(left[-1]["failures"]) == [2, 1, 2]
    assert [row["shard"] for row in read(any_plan, names)] == [""]


def test_a_large_archive_is_work_for_many_readers(any_plan: BatchPlan) -> None:
    units = list(list_archive({"archive": 0, "committed": []}, any_plan))
    of_each = [[row["shard"] for row in read_unit(unit, any_plan) if row["shard"]] for unit in units]
    assert [len(shards) for shards in of_each] == ([3] if any_plan.archives[0].kind == "tar" else [1, 1, 1, 0])


def test_a_storage_that_gives_up_is_named_and_upsets_the_balance(
    any_plan: BatchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (archive,) = any_plan.archives
    units = list(list_archive({"archive": 0, "committed": []}, any_plan))

    def gone(*_: object) -> BinaryIO:
        raise ConnectionResetError("the network is gone")

    monkeypatch.setattr(Location, "open", gone)
    monkeypatch.setattr(Location, "read_bytes", gone)
    monkeypatch.setattr(Location, "listing", gone)
    rows = [row for unit in units for row in read_unit(unit, any_plan)]
    assert {row["error"] for row in rows if row["shard"] or archive.kind == "tar"} == {
        f"{archive.location}: the network is gone"
    }
    outcomes = [outcome_of(row, any_plan) for row in rows]
    assert total(outcomes, 1).errors
    assert total(outcomes, 1).balanced == (archive.kind == "tar")  # where nothing is known of what there is
    if archive.kind != "tar":
        (row,) = read(any_plan)
        assert row["error"]


def outcome_of(row: dict[str, Any], plan: BatchPlan) -> ShardOutcome:
    """What the scoring actor makes of a row that has nothing to score."""
    return ShardOutcome(**ScoringActor(plan, ONE_THREAD)(decode_shard(row, plan)))


@pytest.mark.parametrize("change", ["content", "shard size", "model"])
def test_shards_of_a_changed_archive_size_or_model_have_other_names(plan: BatchPlan, change: str) -> None:
    (archive,) = plan.archives
    if change == "content":
        (Path(archive.location.uri) / "0.png").write_bytes(encode_png(np.zeros((40, 50, 3), np.uint8)))
        other = dataclasses.replace(plan, archives=(archive.fingerprinted(),))
    elif change == "shard size":
        other = dataclasses.replace(plan, shard_images=3)
    else:
        other = dataclasses.replace(plan, models={"cloth": dataclasses.replace(plan.models["cloth"], version="v2")})
    assert other.suffix(other.archives[0]) != plan.suffix(archive)


def test_decoding_keeps_the_order_and_names_what_fails(plan: BatchPlan) -> None:
    rows = read(plan)
    decoded = decode_shard(rows[2], plan)
    assert decoded["names"] == ["4.png"]
    images = np.frombuffer(decoded["images"], np.uint8).reshape(-1, 32, 32, 3)
    assert (images == 160).all()
    assert np.frombuffer(decoded["sizes"], np.int32).tolist() == [50, 40]
    ((name, failure),) = json.loads(decoded["failures"])
    assert (name, failure["stage"], failure["error"]) == ("5.png", "decode", "not_an_image")


def test_a_lost_shard_or_archive_is_noticed_even_where_the_sums_agree() -> None:
    done = ShardOutcome(0, "s0", 2, scored=2)
    head = ShardOutcome(0, None, members=2, shards=1)
    assert total([done, head], 1).balanced
    assert not total([done, dataclasses.replace(head, shards=2)], 1).balanced
    assert not total([done, dataclasses.replace(head, members=3)], 1).balanced
    assert total([done, head], 2).unbalanced_archives == 1

    other = ShardOutcome(1, "s1", 2, scored=1, failed=1)
    assert total([done, head, other, dataclasses.replace(head, archive=1)], 2).balanced
    swapped = [dataclasses.replace(head, members=1), dataclasses.replace(head, archive=1, members=3)]
    assert total([done, other, *swapped], 2).unbalanced_archives == 2


def outcomes_of_a_night(failed: int = 0, error: str = "") -> list[ShardOutcome]:
    """Ten images of cloth, of which some failed as truncated, and two shards of felt, one of them perhaps not scored."""
    codes = json.dumps({"truncated": failed} if failed else {})
    return [
        ShardOutcome(0, "a", 10, 10 - failed, failed, 3, category="cloth", bytes=1000, failures=codes),
        ShardOutcome(1, "b", 90, 90, category="felt", bytes=9000),
        ShardOutcome(1, "c", 4, 0 if error else 4, category="felt", bytes=0 if error else 400, error=error),
        ShardOutcome(0, None, 10, shards=1, category="cloth"),
        ShardOutcome(1, None, 94, shards=2, category="felt"),
    ]


def test_a_night_is_fine_up_to_the_fraction_of_failures_in_each_category() -> None:
    assert total(outcomes_of_a_night(), 2).fine(0.0)
    some = total(outcomes_of_a_night(failed=2), 2)
    assert (some.failures, some.failed_fractions) == ({"truncated": 2}, {"cloth": 0.2, "felt": 0.0})
    assert some.fine(0.2)
    assert not some.fine(0.19), "two of all 104 images are few, but a fifth of the cloth is not"
    assert not total(outcomes_of_a_night(error="the disk is full"), 2).fine(1.0)
    assert total([], 0).fine(0.0)
    broken = ShardOutcome(0, "a", 11, 10, 1, category="cloth", failures='{"archive_damaged": 1}')
    head = ShardOutcome(0, None, 11, shards=1, category="cloth")
    assert not total([broken, head], 1).fine(1.0), "nobody knows what a broken archive hides"


def test_a_night_stays_as_bad_as_it_is_when_nothing_is_left_to_do(plan: BatchPlan) -> None:
    rows = [decode_shard(row, plan) for row in read(plan)]
    for row in rows[:-1]:
        failures = [
            FailureRow(f"{row['shard']}-{name}", "a", name, failure["stage"], failure["error"], failure["detail"])
            for name, failure in json.loads(row["failures"])
        ]
        scores = [
            ScoreRow(f"{row['shard']}-{name}", "a", name, 50, 40, 1, 1, 1, 2, False, (), "v1", plan.started)
            for name in row["names"]
        ]
        where = {"category": "cloth", "night": plan.night, "shard": row["shard"], "map_format": "none"}
        write_shard(plan.results, scores=scores, maps_nhw=None, failures=failures, **where)
    (done,) = all_committed_shards(plan)
    earlier = earlier_outcomes(plan, [done])
    assert [(outcome.scored, outcome.failed) for outcome in earlier] == [(2, 0), (2, 0), (1, 1)]
    left = [ShardOutcome(0, None, 0, shards=0, skipped=3, category="cloth")]
    again = total(left, 1, earlier)
    assert again.failed_fractions == {"cloth": 1 / 6}
    assert (again.fine(0.2), again.fine(0.1), again.failed) == (True, False, 0)


def test_an_archive_that_is_replaced_after_the_plan_is_left_to_the_next_run(any_plan: BatchPlan) -> None:
    (archive,) = any_plan.archives
    if archive.kind == "folder":
        pytest.skip("each loose image is a file of its own")
    units = list(list_archive({"archive": 0, "committed": []}, any_plan))
    path = Path(archive.location.uri)
    os.utime(path, ns=(0, 0))
    found = [row for unit in units for row in read_unit(unit, any_plan)]
    assert not any(row["data"] for row in found)
    assert "replaced after the run began" in found[0]["error"]


def test_the_run_record_says_what_failed_what_was_not_scored_and_how_it_ended(plan: BatchPlan) -> None:
    (archive,) = plan.archives
    two = dataclasses.replace(plan, archives=(archive, archive), max_failure_fraction=0.5)
    record = json.loads(json.dumps(run_record(two, total(outcomes_of_a_night(2, error="the disk is full"), 2), 20.0)))
    assert record["counts"] == {
        "images": 104,
        "scored": 98,
        "failed": 2,
        "anomalous": 3,
        "shards": 2,
        "lost_shards": 0,
        "unbalanced_archives": 1,
        "archive_failures": 0,
        "skipped_shards": 0,
        "bytes": 10000,
    }
    assert record["failures"] == {"truncated": 2}
    assert record["not_scored"] == [{"archive": archive.location.uri, "shard": "c", "error": "the disk is full"}]
    assert (record["exit_status"], record["images_per_second"], record["seconds"]) == (1, 5.0, 20.0)
    assert record["started"] < record["finished"]
    assert run_record(two, total(outcomes_of_a_night(2), 2), 0.0)["exit_status"] == 0


def test_a_scored_shard_reports_its_bytes_and_failures(plan: BatchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = ScoringActor(plan, ONE_THREAD)
    counted: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(actor, "_score", lambda row, failures: 1)
    monkeypatch.setattr(actor.telemetry, "shard", lambda category, **counts: counted.append((category, counts)))
    outcomes = stream(plan, actor)
    files = sorted(Path(plan.archives[0].location.uri).iterdir())
    assert [outcome.bytes for outcome in outcomes] == [
        *(sum(file.stat().st_size for file in files[i : i + 2]) for i in (0, 2, 4)),
        0,
    ]
    assert {outcome.category for outcome in outcomes} == {"cloth"}
    assert json.loads(outcomes[2].failures) == {"not_an_image": 1}
    assert [(category, counts["failed"], counts["read"]) for category, counts in counted] == [
        ("cloth", {}, outcomes[0].bytes),
        ("cloth", {}, outcomes[1].bytes),
        ("cloth", {"not_an_image": 1}, outcomes[2].bytes),
    ]

    def full(row: object, failures: object) -> int:
        raise OSError("the disk is full")

    monkeypatch.setattr(actor, "_score", full)
    refused = ShardOutcome(**actor(decode_shard(read(plan)[0], plan)))
    assert (refused.error, refused.scored, refused.bytes, refused.members) == ("the disk is full", 0, 0, 2)
    assert len(counted) == 3


def test_metrics_that_fail_stop_and_the_scoring_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts = {"scored": 3, "anomalous": 0, "failed": {"truncated": 1}, "read": 100, "seconds": 0.5}
    telemetry = ScoringTelemetry()
    telemetry.shard("cloth", **counts)
    assert not caplog.records

    def gone(*arguments: object) -> None:
        raise RuntimeError("no agent")

    monkeypatch.setattr(Counter, "inc", gone)
    telemetry.shard("cloth", **counts)
    telemetry.shard("cloth", **counts)
    assert [record.message for record in caplog.records] == ["metrics are off: they could not be recorded"]


def test_committed_shards_of_all_archives_are_those_of_each(plan: BatchPlan) -> None:
    folder = Path(plan.archives[0].location.uri).parent / "more" / "cloth"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encode_png(np.zeros((40, 50, 3), np.uint8)))
    more = Archive(Location.parse(folder), "folder", "cloth").fingerprinted()
    two = dataclasses.replace(plan, archives=(*plan.archives, more))
    assert all_committed_shards(two) == [[], []]
    for number in (0, 1):
        for row in read(two, archive=number)[:2]:
            if row["shard"]:
                commit = two.results / "scores/category=cloth/night=2026-01-31" / f"{row['shard']}.parquet"
                commit.write_bytes(b"")
    found = all_committed_shards(two)
    assert [len(names) for names in found] == [2, 1]
    assert found == [committed_shards(two, archive) for archive in two.archives]


def test_the_size_of_an_archive_is_that_of_its_files(plan: BatchPlan, tmp_path: Path) -> None:
    (archive,) = plan.archives
    files = list(Path(archive.location.uri).iterdir())
    assert archive.size() == sum(file.stat().st_size for file in files)
    assert (
        dataclasses.replace(archive, members=("0.png", "gone.png")).size() == (tmp_path / "cloth/0.png").stat().st_size
    )
    (tmp_path / "night.tar").write_bytes(b"12345")
    assert Archive(Location.parse(tmp_path / "night.tar"), "tar", "cloth").size() == 5


def test_reading_always_keeps_part_of_a_cpu() -> None:
    for cpus in (1, 2, 3, 16):
        workers = Resources([Node(cpus)]).scoring_workers()
        assert workers.actors * workers.cpus_per_actor + 0.75 <= cpus
        assert workers.threads == cpus, "what reading leaves idle is computed on"
    assert Resources([Node(16, 4)]).scoring_workers() == Workers(4, 1, 0.0, 1.0)
    assert Resources([Node(16)] * 4).scoring_workers(2) == Workers(2, 16, 15, 0.0)
    assert Resources([Node(4)]).scoring_workers(2) == Workers(2, 2, 1, 0.0)
    assert Resources([Node(2)]).scoring_workers(2) == Workers(2, 1, 0.5, 0.0)
    assert Resources([Node(3), Node(1), Node(1), Node(1)]).scoring_workers(2) == Workers(2, 1, 1, 0.0)
    with pytest.raises(UserError, match="--actors 3 are too many"):
        Resources([Node(2)]).scoring_workers(3)
    with pytest.raises(UserError, match="--actors 2 leave none"):
        Resources([Node(1), Node(1)]).scoring_workers(2)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 40))
def test_all_actors_fit_and_wherever_they_lie_one_machine_can_read(nodes: list[int], actors: int) -> None:
    try:
        workers = Resources([Node(cpus) for cpus in nodes]).scoring_workers(actors)
    except UserError:
        return
    share, reading = workers.cpus_per_actor, 0.05 + 0.2 + 0.5
    assert sum(int(cpus / share + 1e-9) for cpus in nodes) >= workers.actors
    assert sum(cpus // workers.threads for cpus in nodes) >= workers.actors
    # The fewest actors that would leave too little on every machine are more than there are.
    assert sum(math.floor((cpus - reading) / share + 1e-9) + 1 for cpus in nodes) > workers.actors


def test_planning_reading_and_decoding_do_without_torch():
    code = "import sys, pipeline.batch, jobs.score_archives; sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

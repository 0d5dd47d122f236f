"""The stages of the scoring job without Ray: what a reader gives, what decoding refuses, how the balance adds up."""

from __future__ import annotations

import dataclasses
import json
import tarfile
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from pipeline.archives import Archive
from pipeline.batch import (
    BatchPlan,
    ScoringActor,
    ShardOutcome,
    Workers,
    _on_photograph,
    decode_shard,
    list_archive,
    read_unit,
    total,
)
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.images import encode_png
from pipeline.model_store import ModelInfo
from pipeline.ray_session import Resources
from pipeline.scoring import Region
from pipeline.storage import Location


@pytest.fixture
def plan(tmp_path: Path, tiny: Config) -> BatchPlan:
    """Five images and a text file of the category cloth, in shards of 2."""
    folder = tmp_path / "cloth"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(encode_png(np.full((40, 50, 3), 40 * i, np.uint8)))
    (folder / "5.png").write_text("no image")
    location = Location.parse(tmp_path)
    info = ModelInfo(location, "cloth", "v1", tiny, {}, True, 0.0, None, {})
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


def read(plan: BatchPlan, committed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of the first archive's shards and totals, as the two reading stages give them."""
    units = list_archive({"archive": 0, "committed": list(committed)}, plan)
    return [row for unit in units for row in read_unit(unit, plan)]


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
    return ShardOutcome(**ScoringActor(plan, Workers(1, 1, 1.0, 0.0))(decode_shard(row, plan)))


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


def test_regions_stay_on_the_photograph() -> None:
    region = _on_photograph(Region(x=255, y=0, width=1, height=256, area=256, peak=1.0), 0.5, 2.0)
    assert (region.x, region.width, region.y, region.height) == (127, 1, 0, 512)


def test_reading_always_keeps_part_of_a_cpu() -> None:
    for cpus in (1, 2, 3, 16):
        workers = Resources(cpus, 0, cpus).scoring_workers()
        assert workers.actors * workers.cpus_per_actor + 0.75 <= cpus
        assert workers.threads >= 1
    assert Resources(16, 4, 16).scoring_workers() == Workers(4, 1, 0.0, 1.0)
    assert Resources(64, 0, 16).scoring_workers(2).cpus_per_actor <= 15
    with pytest.raises(UserError, match="--actors 3"):
        Resources(2, 0, 2).scoring_workers(3)

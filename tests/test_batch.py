"""The stages of the scoring job without Ray: what a reader gives, what decoding refuses, how the balance adds up."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipeline.archives import Archive
from pipeline.batch import BatchPlan, ShardOutcome, Workers, _on_photograph, decode_shard, read_archive, total
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


def test_a_reader_gives_the_same_rows_again_whatever_was_committed_meanwhile(plan: BatchPlan) -> None:
    row = {"archive": 0, "committed": []}
    first = list(read_archive(row, plan))
    (plan.results / "scores/category=cloth/night=2026-01-31" / f"{first[0]['shard']}.parquet").write_bytes(b"")
    assert list(read_archive(row, plan)) == first
    assert [len(shard["names"]) for shard in first] == [2, 2, 2, 0]
    assert json.loads(first[-1]["failures"]) == [6, 3, 0]


def test_committed_shards_are_not_read_again(plan: BatchPlan) -> None:
    names = [row["shard"] for row in read_archive({"archive": 0, "committed": []}, plan)][:3]
    left = list(read_archive({"archive": 0, "committed": [names[0], names[2]]}, plan))
    assert [row["shard"] for row in left] == [names[1], ""]
    assert json.loads(left[-1]["failures"]) == [2, 1, 2]


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
    rows = list(read_archive({"archive": 0, "committed": []}, plan))
    decoded = decode_shard(rows[2], plan)
    assert decoded["names"] == ["4.png"]
    images = np.frombuffer(decoded["images"], np.uint8).reshape(-1, 32, 32, 3)
    assert (images == 160).all()
    assert np.frombuffer(decoded["sizes"], np.int32).tolist() == [50, 40]
    ((name, failure),) = json.loads(decoded["failures"])
    assert (name, failure["stage"], failure["error"]) == ("5.png", "decode", "not_an_image")


def test_a_lost_shard_is_noticed_even_where_the_sums_agree() -> None:
    done = ShardOutcome(0, "s0", 2, scored=2)
    read = ShardOutcome(0, None, members=2, shards=2)
    assert not total([done, read]).balanced
    assert total([done, dataclasses.replace(read, shards=1)]).balanced
    assert not total([done, dataclasses.replace(read, members=3, shards=1)]).balanced


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

"""What names a training's photographs, in which order they come, and where they are kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.datasets import Record, training_records
from pipeline.errors import UserError
from pipeline.images import encode_png
from pipeline.photograph_file import load_within
from pipeline.storage import Location
from pipeline.training_images import (
    data_fingerprint,
    files_fingerprint,
    load_photographs,
    load_training_images,
    split_holdout,
)
from tests.conftest import make_photographs


@pytest.fixture(params=["local", "s3"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Two categories of twelve and nine photographs."""
    root = Location.parse(tmp_path / "data") if request.param == "local" else request.getfixturevalue("s3") / "data"
    for seed, (name, count) in enumerate({"cloth": 12, "wool": 9}.items()):
        for i, photograph in enumerate(make_photographs(count, seed)):
            (root / name / f"{i:02d}.png").write_bytes(encode_png(photograph))
    return root


def records_of(dataset: Location) -> dict[str, list[Record]]:
    return {name: training_records(dataset, "folder", name) for name in ("cloth", "wool")}


def test_photographs_are_split_and_come_in_the_order_of_their_records(dataset: Location, tiny: Config) -> None:
    records = records_of(dataset)
    images = load_training_images(records, tiny.training, 32, load_photographs)
    every = {name: load_photographs(found, 32) for name, found in records.items()}
    for name, photographs in every.items():
        training, held_out = split_holdout(len(photographs), tiny.training.holdout_fraction, tiny.training.seed)
        np.testing.assert_array_equal(images.training[images.parts[name]], photographs[training])
        np.testing.assert_array_equal(images.held_out[name], photographs[held_out])
        assert images.names[name] == [records[name][i].image.uri for i in (*training, *held_out)]
    assert images.fingerprint == data_fingerprint(np.concatenate([*every.values()]))
    assert images.labels.tolist() == [0] * 8 + [1] * 5


def test_files_are_named_by_what_is_in_them_on_s3_and_by_size_and_time_elsewhere(dataset: Location) -> None:
    cloth = records_of(dataset)["cloth"]
    before = files_fingerprint(cloth)
    assert files_fingerprint(cloth[::-1]) == before
    assert files_fingerprint(cloth[1:]) != before
    data = cloth[0].image.read_bytes()
    cloth[0].image.write_bytes(data)
    if not dataset.is_local:
        assert files_fingerprint(cloth) == before
    cloth[0].image.write_bytes(data[::-1])
    if dataset.is_local:
        os.utime(cloth[0].image.uri, ns=(0, 0))
    assert files_fingerprint(cloth) != before


@pytest.mark.parametrize("dataset", ["local"], indirect=True)
def test_photographs_within_the_limit_stay_in_memory(dataset: Location) -> None:
    cloth = records_of(dataset)["cloth"]
    assert not isinstance(load_within(cloth, 32, limit_gib=1.0), np.memmap)


@pytest.mark.parametrize("dataset", ["local"], indirect=True)
def test_a_disk_that_is_too_full_is_told_before_anything_is_decoded(
    dataset: Location,
) -> None:
    cloth = records_of(dataset)["cloth"]
    with pytest.raises(UserError, match=r"need \d+\.\d GiB in .*: free some, set TMPDIR"):
        load_within(cloth * 1000, 32_768, limit_gib=0.0)

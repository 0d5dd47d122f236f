"""Every kind of bad input through the real reading and decoding: named for what it is, and no harm to what is beside it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from jobs.score_archives import Options, plan_night
from pipeline.archives import find_archives, read_shards, read_units
from pipeline.images import ImageError, decode
from pipeline.run_record import run_record
from pipeline.shard_scoring import ScoringActor
from pipeline.storage import Location
from pipeline.totals import total
from tests.bad_inputs import BadInput, Expected, bad_inputs, write_corpus
from tests.job_runs import rows
from tests.stages import ONE_THREAD, stream

CORPUS = {bad.expected.kind: bad for bad in bad_inputs()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def test_the_corpus_is_found_as_one_archive_for_each_kind(tmp_path: Path) -> None:
    expected = write_corpus(tmp_path)
    assert len(expected) == len(CORPUS) == len(bad_inputs()) > 100
    found = {archive.location.name for archive in find_archives([str(tmp_path)], category="bottle")}
    assert found == {one.path for one in expected}


@pytest.mark.parametrize("bad", CORPUS.values(), ids=CORPUS.keys())
@pytest.mark.parametrize("shard_images", [1, 256])
def test_bad_input(bad: BadInput, shard_images: int, corpus: Path) -> None:
    expected: Expected = bad.expected
    (archive,) = find_archives([str(corpus / expected.path)], category="bottle")
    units = read_units(archive, shard_images=shard_images)
    shards = [shard for unit in units for shard in read_shards(archive, unit, shard_images=shard_images)]
    members = [member for shard in shards for member in shard.members]

    failures = Counter[tuple[str, str]]()
    good = 0
    for member in members:
        if member.failure:
            failures[member.failure.stage, member.failure.error] += 1
            assert member.failure.detail
            assert "\n" not in member.failure.detail
            continue
        assert member.data is not None
        try:
            decode(member.data)
            good += 1
        except ImageError as error:
            failures["decode", error.error] += 1

    assert sorted(failures.elements()) == list(expected.failures)
    assert good == expected.good
    assert len(members) == expected.good + len(expected.failures)
    if archive.kind != "tar":
        assert sum(len(unit.entries or ()) for unit in units) == len(members)
    assert len({member.name for member in members if member.data}) == sum(m.data is not None for m in members)
    assert [shard.index for shard in shards] == list(range(len(shards)))


@pytest.mark.slow
def test_a_night_of_them_tells_every_bad_input_and_scores_every_good_image_beside_it(
    corpus: Path, models: Path, tmp_path: Path
) -> None:
    results = Location.parse(tmp_path / "results")
    options = Options((str(corpus),), str(models), str(results), category="brick", maps="none")
    plan = plan_night(options, results, "2026-01-31")
    totals = total(stream(plan, ScoringActor(plan, ONE_THREAD)), len(plan.archives))
    assert totals.balanced and not totals.errors
    record = run_record(plan, totals, seconds=1.0)
    assert record["exit_status"] == 1, "far more failures than a good night has"
    told = Counter(str(row["error"]) for row in rows(results, "failures"))
    expected = [bad.expected for bad in CORPUS.values()]
    assert told == Counter(code for one in expected for _, code in one.failures)
    assert record["counts"]["scored"] == len(rows(results, "scores")) == sum(one.good for one in expected)
    assert record["counts"]["images"] == record["counts"]["scored"] + record["counts"]["failed"]

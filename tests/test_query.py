"""Questions to the results tables: right answers, from no more files and bytes than the question needs."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from jobs.query import Options, query
from pipeline import query as query_module
from pipeline import s3_objects
from pipeline.compaction import compact_night
from pipeline.errors import UserError
from pipeline.named_queries import QUERIES
from pipeline.query import SharedFile, run_query
from pipeline.results import iter_maps, write_run
from pipeline.storage import Location
from pipeline.thresholds import rank_bound
from tests.made_results import NIGHT, SCORED_AT, failure_row, score_row, some_maps, write

OLD = "2025-03-08"
CALIBRATION = np.random.default_rng(0).normal(0.2, 0.05, 40)


@pytest.fixture(params=["local", "s3"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Two categories and two nights, one of them compacted, and their runs."""
    where = Location.parse(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    results = where / "results"
    for night in (OLD, NIGHT):
        write(results, night=night)
        write(
            results, night=night, shard="night.tar-00001", scores=[score_row(i) for i in (3, 4)], maps_nhw=some_maps(2)
        )
        write(results, night=night, category="bolt", failures=[], map_format="uint8")
        write_run(results, f"{night}-run", record(night))
    compact_night(results, "widget", OLD, target_bytes=2**20)
    return results


def record(night: str) -> dict[str, Any]:
    return {
        "night": night,
        "started": f"{night}T02:30:00+00:00",
        "finished": f"{night}T02:31:00+00:00",
        "counts": {"images": 9, "scored": 8, "failed": 1},
        "models": {"widget": "widget-0123abcd"},
        "normal_scores": {"widget": sorted(CALIBRATION.tolist())},
        "archives": [archive("tar", seconds=8.0), archive("zip", seconds=2.0)],
        "seconds": 60.0,
        "exit_status": 0,
    }


def archive(kind: str, seconds: float) -> dict[str, Any]:
    own = {"location": f"s3://line/{kind}", "kind": kind, "category": "widget", "seconds": seconds}
    return own | {"scored": 4, "failed": 0, "anomalous": 1, "bytes": 2**20}


def rows(results: Location, sql: str, **options: Any) -> list[dict[str, Any]]:
    return run_query(results, sql, **options).to_pylist()


def ask(results: Location, name: str, **changes: Any) -> list[dict[str, Any]]:
    return rows(results, QUERIES[name].sql, parameters=QUERIES[name].parameters | changes)


def test_views_hold_every_row_once(results: Location) -> None:
    counted = "SELECT category, night, count(*) AS n FROM {} GROUP BY ALL ORDER BY ALL"
    everywhere = [(c, n) for c in ("bolt", "widget") for n in (OLD, NIGHT)]
    for view, counts in {"scores": (3, 5), "newest": (3, 5), "maps": (3, 5), "regions": (3, 4)}.items():
        found = {(row["category"], row["night"]): row["n"] for row in rows(results, counted.format(view))}
        assert found == {part: counts[part[0] == "widget"] for part in everywhere}
    assert rows(results, counted.format("failures")) == [
        {"category": "widget", "night": night, "n": 2} for night in (OLD, NIGHT)
    ]
    (largest,) = rows(results, "SELECT * FROM regions ORDER BY peak DESC, area DESC, night DESC, category LIMIT 1")
    assert (largest["image_width"], largest["width"]) == (640, 3)
    assert rows(results, "SELECT count(*) AS n, min(started) AS first FROM runs")[0]["n"] == 2


@pytest.mark.parametrize("category", ["widget", "bolt"])
def test_maps_come_back_whatever_they_were_stored_as(results: Location, category: str) -> None:
    found = rows(results, f"SELECT * FROM maps WHERE category = '{category}' AND night = '{NIGHT}'")
    for ids, maps in iter_maps(results, category=category, night=NIGHT):
        for image, expected in zip(ids, maps, strict=True):
            (row,) = (row for row in found if row["image_id"] == image)
            values = np.array(row["map"]).reshape(row["height"], row["width"])
            np.testing.assert_allclose(values, expected.astype(np.float32), atol=0.003)


def test_unfinished_shards_and_leftovers_do_not_count(results: Location) -> None:
    before = rows(results, "SELECT count(*) AS n FROM failures")
    for file in (results / "scores" / "category=widget" / f"night={NIGHT}").files():
        file.remove()
    after = rows(results, "SELECT count(*) AS n FROM failures")
    assert (before, after) == ([{"n": 4}], [{"n": 2}])


def test_a_photograph_scored_twice_counts_once_in_newest(results: Location) -> None:
    later = SCORED_AT + timedelta(hours=1)
    again = [score_row(i, scored_at=later, model_version="widget-new", is_anomalous=True) for i in range(3)]
    write(results, shard="night.tar-00000-new", scores=again)
    where = f"WHERE category = 'widget' AND night = '{NIGHT}'"
    assert rows(results, f"SELECT count(*) AS n FROM scores {where}") == [{"n": 8}]
    found = rows(results, f"SELECT model_version, count(*) AS n FROM newest {where} GROUP BY ALL ORDER BY ALL")
    assert found == [{"model_version": "widget-0123abcd", "n": 2}, {"model_version": "widget-new", "n": 3}]


@pytest.mark.parametrize(
    ("sql", "options"),
    [
        (f"SELECT count(*) AS n, max(score) AS s FROM scores WHERE night = '{NIGHT}' AND category = 'bolt'", {}),
        ("SELECT count(*) AS n, max(score) AS s FROM scores", {"nights": [NIGHT], "categories": ["bolt"]}),
    ],
)
def test_other_partitions_and_tables_are_not_read(results: Location, sql: str, options: dict[str, Any]) -> None:
    asked = (
        f"scores/category=bolt/night={NIGHT}",
        "compacted@",
        f"scores/category=bolt/night={OLD}",
    )  # the last tells columns
    for file in results.files(recursive=True):
        if not any(part in file.uri for part in asked):
            file.write_bytes(b"not Parquet, and not JSON")
    assert rows(results, sql, **options) == [{"n": 3, "s": pytest.approx(0.2)}]
    with pytest.raises(UserError):
        rows(results, "SELECT max(score) FROM scores")


def test_columns_that_are_not_asked_for_are_not_fetched(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    results = s3 / "results"
    write(results, scores=[score_row(i) for i in range(8)], maps_nhw=some_maps(8, 256, 256))
    (file,) = (results / "maps").files(recursive=True)
    fetched: list[int] = []

    def counting(*arguments: Any, start: int = 0, **others: Any) -> Any:
        stored = read(*arguments, start=start, **others)
        fetched.append(len(stored.data))
        return stored

    read = s3_objects.read_stored
    monkeypatch.setattr(s3_objects, "read_stored", counting)
    assert len(rows(results, "SELECT image_id, height FROM maps")) == 8
    few, _ = sum(fetched), fetched.clear()
    assert few < 0.2 * file.size()
    assert len(rows(results, "SELECT image_id, map FROM maps")) == 8
    assert sum(fetched) > 0.9 * file.size()


def test_a_compaction_in_the_middle_of_a_query_is_not_noticed(
    results: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = query_module._files

    def overtaken(*arguments: Any) -> Any:
        found = listed(*arguments)
        monkeypatch.setattr(query_module, "_files", listed)
        compact_night(results, "widget", NIGHT, target_bytes=2**20)
        return found

    monkeypatch.setattr(query_module, "_files", overtaken)
    where = f"WHERE category = 'widget' AND night = '{NIGHT}'"
    assert rows(results, f"SELECT count(*) AS n, max(score) AS s FROM scores {where}") == [{"n": 5, "s": 0.4}]
    assert query_module._files is listed, "there was no compaction"


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("SELECT foo FROM scores", 'column "foo" not found'),
        ("SELEC 1", "syntax error"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("DROP VIEW scores", "one SELECT"),
        ("COPY (SELECT 1) TO '/tmp/x'", "one SELECT"),
        ("SELECT * FROM nights", "nights does not exist"),
        ("SELECT score + member FROM scores WHERE $limit", "fit the tables"),
        ("SELECT * FROM scores LIMIT $limit", "limit"),
        ("SELECT error('no') FROM scores", "query failed"),
    ],
)
def test_sql_that_does_not_work_is_told_in_one_line(tmp_path: Path, sql: str, told: str) -> None:
    results = Location.parse(tmp_path)
    write(results)
    with pytest.raises(UserError, match=told) as refused:
        run_query(results, sql)
    assert "\n" not in str(refused.value)


def test_results_without_any_table_have_views_without_rows(tmp_path: Path) -> None:
    for view in ("scores", "newest", "regions", "maps", "failures", "runs", "archives", "calibration"):
        assert rows(Location.parse(tmp_path), f"SELECT * FROM {view}") == []


@pytest.mark.parametrize(
    "change",
    [
        *[{"counts": []}, {"archives": [{}]}, {"started": "today"}],
        *[{"normal_scores": None}, {"normal_scores": {"widget": ["high"]}}, {"normal_scores": {"bolt": [1.0]}}],
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    write_run(Location.parse(tmp_path), "x", record(NIGHT) | change)
    with pytest.raises(UserError, match=r"runs/x\.json"):
        rows(Location.parse(tmp_path), "SELECT * FROM runs")


def test_a_models_normal_scores_are_ranked_once_however_many_runs_it_scored(tmp_path: Path) -> None:
    older, newer = ({"widget": f"widget-{version}"} for version in ("1", "2"))
    for i, change in enumerate(
        [{"models": older}, {"models": older}, {"models": newer, "normal_scores": {"widget": [7.0]}}, {"models": older}]
    ):
        write_run(Location.parse(tmp_path), f"{NIGHT}-{i}", record(NIGHT) | change)
    write(Location.parse(tmp_path))
    found = rows(Location.parse(tmp_path), "SELECT * FROM calibration ORDER BY model_version, rank")
    expected = [("widget", "widget-1", rank, score) for rank, score in enumerate(sorted(CALIBRATION.tolist()))]
    assert [tuple(row.values()) for row in found] == [*expected, ("widget", "widget-2", 0, 7.0)]


def test_nights_and_categories_restrict_every_view(results: Location) -> None:
    (results / "runs" / f"{OLD}-other.json").write_bytes(b"never read")
    for view, counts in {"runs": 1, "archives": 2, "calibration": 40, "failures": 2}.items():
        found = rows(results, f"SELECT count(*) AS n FROM {view}", nights=[NIGHT], categories=["widget"])
        assert found == [{"n": counts}], view
    assert rows(results, "SELECT * FROM archives", nights=[NIGHT], categories=["bolt"]) == []
    for options in ({"nights": ["2025-03-99"]}, {"categories": ["wigdet"]}):
        with pytest.raises(UserError, match="no results of"):
            rows(results, "SELECT * FROM scores", **options)


def test_times_are_utc_wherever_the_question_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Location.parse(tmp_path))
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        (row,) = rows(Location.parse(tmp_path), "SELECT DISTINCT scored_at::DATE::VARCHAR AS day FROM scores")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert row == {"day": NIGHT}


def test_threads_read_where_each_of_them_seeks(tmp_path: Path) -> None:
    file = Location.parse(tmp_path / "x")
    file.write_bytes(bytes(range(200)))
    shared = SharedFile(file)
    both = threading.Barrier(2)

    def read(start: int) -> bytes:
        shared.seek(start)
        both.wait(10)
        return shared.read(5)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(read, (10, 100))) == [bytes(range(10, 15)), bytes(range(100, 105))]
    shared.close()


# --- ready-made questions -------------------------------------------------------------------------


def test_the_summary_counts_images_and_failures_of_every_night(results: Location) -> None:
    write(results, category="empty", scores=[], maps_nhw=None, failures=[failure_row(1)])
    found = ask(results, "nightly-summary")
    assert [(row["night"], row["category"], row["images"], row["anomalous"], row["failures"]) for row in found] == [
        (OLD, "bolt", 3, 0, 0),
        (OLD, "widget", 5, 1, 1),
        (NIGHT, "bolt", 3, 0, 0),
        (NIGHT, "empty", 0, 0, 1),
        (NIGHT, "widget", 5, 1, 1),
    ]


def test_the_worst_come_first(results: Location) -> None:
    write(results, shard="z", scores=[score_row(9)], maps_nhw=None, failures=[])
    found = ask(results, "worst", limit=2)
    assert [row["member"] for row in found] == ["part/9.png", "part/4.png"]
    assert found[0]["severity"] == pytest.approx(0.9 / 0.35, abs=1e-3)


def test_defect_sizes_are_parts_of_the_photograph(results: Location) -> None:
    (row,) = ask(results, "defect-sizes")
    assert (row["category"], row["regions"]) == ("widget", 2)  # one of each night
    assert row["largest"] == pytest.approx(100 * 5 / (640 * 480), abs=1e-4)


def test_failures_are_grouped_by_reason(results: Location) -> None:
    found = ask(results, "failures")
    assert [(row["night"], row["error"], row["images"]) for row in found] == [
        (OLD, "truncated", 1),
        (NIGHT, "truncated", 1),
    ]


def test_a_photograph_that_failed_twice_or_was_scored_after_all_is_not_counted_twice(tmp_path: Path) -> None:
    results = Location.parse(tmp_path)
    scored_after_all = dataclasses.replace(failure_row(1), image_id=score_row(0).image_id)
    for shard in ("a", "b"):
        write(results, shard=shard, failures=[failure_row(0), scored_after_all])
    (row,) = ask(results, "nightly-summary")
    assert (row["images"], row["failures"]) == (3, 1)
    assert [row["images"] for row in ask(results, "failures")] == [1]


def test_the_slowest_archives_come_first(results: Location) -> None:
    found = ask(results, "slowest-archives", limit=1)
    assert [(row["archive"], row["seconds"], row["images_per_second"]) for row in found] == [
        ("s3://line/tar", 8.0, 0.5)
    ]


@pytest.mark.parametrize(
    ("shift", "count", "verdict"), [(0.0, 200, "steady"), (0.05, 200, "DRIFT"), (0.3, 20, "too few images")]
)
def test_drift_is_the_kolmogorov_smirnov_test_against_calibration(
    tmp_path: Path, shift: float, count: int, verdict: str
) -> None:
    results = Location.parse(tmp_path)
    scores = np.random.default_rng(1).normal(0.2 + shift, 0.05, count)
    write(results, scores=[score_row(i, score=float(s)) for i, s in enumerate(scores)], maps_nhw=None)
    write_run(results, "run", record(NIGHT))
    (row,) = ask(results, "drift")
    expected = stats.ks_2samp(scores, CALIBRATION)
    assert row["distance"] == pytest.approx(expected.statistic, abs=1e-3)
    assert row["p"] == pytest.approx(expected.pvalue, rel=0.3, abs=1e-12)
    assert (row["images"], row["normal_images"], row["verdict"]) == (count, 40, verdict)


def test_drift_says_where_it_cannot_judge(tmp_path: Path) -> None:
    results = Location.parse(tmp_path)
    write(results)
    (row,) = ask(results, "drift")
    assert (row["verdict"], row["distance"]) == ("no calibration", None)
    write(results, scores=[score_row(i, score=float(s)) for i, s in enumerate(CALIBRATION)], maps_nhw=None)
    write_run(results, "run", record(NIGHT))
    (row,) = ask(results, "drift", distance=0.0, min_images=1)
    assert (row["distance"], row["p"], row["verdict"]) == (0, 1, "steady")


def test_other_rates_have_the_thresholds_that_calibrating_would_set(tmp_path: Path) -> None:
    results = Location.parse(tmp_path)
    scores = np.random.default_rng(1).normal(0.3, 0.1, 60)
    write(results, scores=[score_row(i, score=float(s)) for i, s in enumerate(scores)], maps_nhw=None)
    write_run(results, "run", record(NIGHT))
    expected = {rate: rank_bound(CALIBRATION, rate) for rate in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)}
    found = ask(results, "rates")
    assert {row["rate"]: row["threshold"] for row in found} == {
        rate: pytest.approx(bound.value, abs=1e-3) for rate, bound in expected.items() if bound is not None
    }
    assert len(found) == 3, "forty photographs tell no rate below one in forty"
    for row in found:
        bound = rank_bound(CALIBRATION, row["rate"])
        assert bound is not None
        assert (row["images"], row["anomalous"], row["normal_images"]) == (60, int((scores > bound.value).sum()), 40)
    few = ask(results, "rates", member="part/1%.png")
    assert [row["images"] for row in few] == [11, 11, 11]


# --- the job --------------------------------------------------------------------------------------


def test_formats_hold_the_same_rows(results: Location, tmp_path: Path) -> None:
    sql = "SELECT member, score, regions FROM scores WHERE night = $night ORDER BY category, member"
    for format in ("table", "csv", "json", "parquet"):
        output = str(tmp_path / format)
        options = Options(sql, str(results), param=(f"night={NIGHT}",), format=format, output=output)
        assert query(options) == 0
    table = pq.read_table(tmp_path / "parquet")
    assert len(table) == 8
    lines = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    assert lines == table.to_pylist()
    csv = (tmp_path / "csv").read_text().splitlines()
    assert csv[0] == "member,score,regions"
    assert len(csv) == len((tmp_path / "table").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (Options(results="x"), "one thing"),
        (Options("SELECT 1", "x", name="worst"), "one thing"),
        (Options(results="x", name="best"), "choose one of nightly-summary"),
        (Options(results="x", name="worst", param=("top=3",)), "known: limit"),
        (Options(results="x", name="worst", param=("limit=few",)), "a value like 20"),
        (Options(results="x", name="worst", param=("limit",)), "NAME=VALUE"),
        (Options("SELECT 1"), "--results"),
        (Options("SELECT 1", "x", format="parquet"), "--output"),
        (Options("SELECT 1", "/nowhere/at/all"), "does not exist"),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, options: Options, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=told):
        query(options)


def test_an_answer_may_be_any_nesting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Location.parse(tmp_path))
    assert query(Options("SELECT regions, scored_at, NULL AS nothing FROM scores", str(tmp_path))) == 0
    assert '"area": 5' in capsys.readouterr().out


def test_names_are_shown_as_they_are_and_columns_in_their_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["cam[/front]/a.png", "cam[front]/b.png", "x:warning:.png"]
    write(Location.parse(tmp_path), scores=[score_row(i, member=name) for i, name in enumerate(names)])
    assert query(Options('SELECT member, 1 AS n, 2 AS n, night AS "[b]" FROM scores ORDER BY 1', str(tmp_path))) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["member", "n", "n", "[b]"], *([name, "1", "2", NIGHT] for name in names)]


def test_values_of_parameters_are_text_unless_the_question_casts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Location.parse(tmp_path)
    write(results, category="0042")
    write(results)
    sql = "SELECT count(*) AS n FROM scores WHERE category = $c AND score > $s"
    assert query(Options(sql, str(results), param=("c=0042", "s=0.05"), format="csv")) == 0
    assert capsys.readouterr().out == "n\n2\n"

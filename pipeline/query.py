"""SQL over the results tables: DuckDB views that read only the partitions, columns and tables that a query asks for.

Arrow's readers fetch what DuckDB pushes down, over the same storage layer and credentials as everything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.errors import UserError
from pipeline.map_tables import maps_schema
from pipeline.night_files import NightFiles, Table, look, partitions
from pipeline.results import FAILURES_SCHEMA, SCORES_SCHEMA
from pipeline.storage import Location

LISTING_THREADS = 16

SCHEMAS: dict[Table, pa.Schema] = {
    "scores": SCORES_SCHEMA,
    # DuckDB knows no half floats; what is stored as bytes has its range beside it.
    "maps": pa.schema(
        [(field.name, pa.list_(pa.float32()) if field.name == "map" else field.type) for field in maps_schema("uint8")]
    ),
    "failures": FAILURES_SCHEMA,
}

RUNS_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("run", "night")],
        *[(name, pa.timestamp("s", tz="UTC")) for name in ("started", "finished")],
        *[(name, pa.float64()) for name in ("seconds", "images_per_second")],
        *[(name, pa.int64()) for name in ("images", "scored", "failed", "anomalous", "skipped_shards", "lost_shards")],
        ("exit_status", pa.int64()),
        ("record", pa.string()),
    ]
)
ARCHIVES_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("run", "night", "category", "archive", "kind")],
        *[(name, pa.int64()) for name in ("scored", "failed", "anomalous", "bytes")],
        ("seconds", pa.float64()),
    ]
)
CALIBRATION_SCHEMA = pa.schema(
    [("category", pa.string()), ("model_version", pa.string()), ("normal_score", pa.float64())]
)

DERIVED = {
    "maps": """
        SELECT category, night, image_id, height, width,
               CASE WHEN lo IS NULL THEN map ELSE list_transform(map, lambda v: lo + v / 255 * (hi - lo)) END AS map
        FROM stored_maps
    """,
    "newest": """
        SELECT * FROM scores
        QUALIFY row_number() OVER (PARTITION BY category, night, image_id ORDER BY scored_at DESC, model_version DESC) = 1
    """,
    "regions": """
        SELECT category, night, archive, member, image_id, model_version, scored_at,
               width AS image_width, height AS image_height, unnest(regions, recursive := true)
        FROM scores
    """,
}
"""Views made of others: maps in one unit, each photograph's latest row of a night, a row for every region of every row."""

RECORDS = {"runs": RUNS_SCHEMA, "archives": ARCHIVES_SCHEMA, "calibration": CALIBRATION_SCHEMA}
"""Views made of runs/*.json."""

SOURCES: dict[str, Table] = {
    "scores": "scores",
    "newest": "scores",
    "regions": "scores",
    "maps": "maps",
    "failures": "failures",
}
"""Which table each other view reads."""


def connect(
    results: Location, *, sql: str, categories: Sequence[str] = (), nights: Sequence[str] = ()
) -> duckdb.DuckDBPyConnection:
    """A database in memory with the views that the SQL names, over finished shards only.

    categories, nights: what of scores, maps, failures and what is made of them is looked at at all; everything when empty.
    Raises UserError for SQL that does not fit the views, before anything is read, and for damaged files.
    """
    check_sql(sql)
    named = {view for view in (*SOURCES, *RECORDS) if re.search(rf"\b{view}\b", sql, re.IGNORECASE)}
    connection = duckdb.connect()
    if named & SOURCES.keys():
        tables = list(dict.fromkeys(SOURCES[view] for view in named & SOURCES.keys()))
        _register(connection, _datasets(results, tables, categories, nights))
    if named & RECORDS.keys():
        for view, rows in _run_tables(results).items():
            connection.register(view, rows)
    return connection


def _register(connection: duckdb.DuckDBPyConnection, tables: Mapping[Table, Any]) -> None:
    """Make the tables known, and the views that are made of them."""
    for table, rows in tables.items():
        connection.register("stored_maps" if table == "maps" else table, rows)
    for view, text in DERIVED.items():
        if SOURCES[view] in tables:
            connection.execute(f"CREATE VIEW {view} AS {text}")


def check_sql(sql: str) -> None:
    """Raises UserError unless the SQL is one statement that fits the views; nothing is read."""
    with duckdb.connect() as empty:
        _register(empty, {table: _with_partition(schema).empty_table() for table, schema in SCHEMAS.items()})
        for view, schema in RECORDS.items():
            empty.register(view, schema.empty_table())
        try:
            statements = empty.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise UserError("the query is not one SELECT")
            empty.execute("PREPARE query AS " + statements[0].query)
        except duckdb.Error as error:
            raise UserError(f"the query does not fit the tables: {_first_lines(error)}") from error


def run_query(
    results: Location,
    sql: str,
    *,
    parameters: dict[str, Any] | None = None,
    categories: Sequence[str] = (),
    nights: Sequence[str] = (),
) -> pa.Table:
    """What the SQL gives, with `parameters` for its $names. Raises UserError as `connect`, and where it fails in the middle."""
    with connect(results, sql=sql, categories=categories, nights=nights) as connection:
        try:
            return connection.sql(sql, params=parameters or {}).to_arrow_table()
        except duckdb.Error as error:
            raise UserError(f"the query failed: {_first_lines(error)}") from error


def _datasets(
    results: Location, tables: Sequence[Table], categories: Sequence[str], nights: Sequence[str]
) -> dict[Table, ds.Dataset]:
    """The finished shards of each table as fragments that know their category and night."""
    parts = [
        part
        for part in partitions(results, None, None)
        if (not categories or part[0] in categories) and (not nights or part[1] in nights)
    ]
    others: list[Table] = [table for table in tables if table != "scores"]
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        found = list(threads.map(lambda part: look(results, part[0], part[1], others), parts))
    filesystem, root = results.arrow_filesystem()
    format = ds.ParquetFileFormat()
    datasets = {}
    for table in tables:
        fragments = [
            format.make_fragment(
                f"{root}/{file.relative_to(results)}",
                filesystem,
                partition_expression=(ds.field("category") == night.category) & (ds.field("night") == night.night),
            )
            for night in found
            for file in _whole_files(night, table)
        ]
        datasets[table] = ds.FileSystemDataset(fragments, _with_partition(SCHEMAS[table]), format, filesystem)
    return datasets


def _whole_files(night: NightFiles, table: Table) -> list[Location]:
    """The files that hold the table's finished shards. Raises UserError where one also holds rows that do not count."""
    files = dict.fromkeys(piece.file for piece in night.pieces(table))
    holders = night.holders()
    for commit in night.commits:
        for piece in commit.pieces(night.folder(table), table):
            if piece.file in files and holders[piece.shard] is not commit:
                raise UserError(
                    f"a compaction of {night.category}, {night.night} was interrupted: "
                    f"finish it with jobs/compact.py --results {night.results} --nights {night.night}"
                )
    return list(files)


def _run_tables(results: Location) -> dict[str, pa.Table]:
    """What runs/*.json say, as tables: a row for a run, for each of its archives, for each normal score of its models."""
    files = [file for file in (results / "runs").files() if file.name.endswith(".json")]
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        records = dict(
            zip((file.name.removesuffix(".json") for file in files), threads.map(_record, files), strict=True)
        )
    runs, archives = [], []
    calibration: set[tuple[str, str, int, float]] = set()
    for run, record in records.items():
        text = json.dumps(record, ensure_ascii=False)
        known = {"run": run, "record": text} | record["counts"] | record
        runs.append({name: known.get(name) for name in RUNS_SCHEMA.names})
        for archive in record["archives"]:
            own = archive | {"run": run, "night": record["night"], "archive": archive["location"]}
            archives.append({name: own.get(name) for name in ARCHIVES_SCHEMA.names})
        for category, scores in record.get("normal_scores", {}).items():
            calibration.update((category, record["models"][category], rank, score) for rank, score in enumerate(scores))
    return {
        "runs": _typed(runs, RUNS_SCHEMA),
        "archives": _typed(archives, ARCHIVES_SCHEMA),
        "calibration": _typed(
            [
                {"category": category, "model_version": version, "normal_score": score}
                for category, version, _, score in sorted(calibration)
            ],
            CALIBRATION_SCHEMA,
        ),
    }


def _record(file: Location) -> dict[str, Any]:
    try:
        record: dict[str, Any] = file.read_json()
        return record | {"archives": record["archives"], "counts": record["counts"], "models": record["models"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a readable run record ({error!r}): remove it") from error


def _typed(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; times may be ISO 8601 text."""
    times = {field.name for field in schema if pa.types.is_timestamp(field.type)}
    loose = pa.schema([(field.name, pa.string() if field.name in times else field.type) for field in schema])
    return pa.Table.from_pylist(rows, schema=loose).cast(schema)


def _with_partition(schema: pa.Schema) -> pa.Schema:
    return pa.schema([*schema, ("category", pa.string()), ("night", pa.string())])


def _first_lines(error: duckdb.Error) -> str:
    """DuckDB's message in one line: without its drawing of the place, which only makes sense in a fixed-width terminal."""
    return " ".join(str(error).split("\n\n")[0].split())

"""SQL over the results tables: DuckDB views that read only the partitions, columns and tables that a query asks for.

One file more may be opened: the first of a table tells its columns (of maps every file does, since they have two formats).

DuckDB reads the Parquet files through our own storage layer, hence with the same credentials and retries as everything
else. (Arrow's datasets under DuckDB deadlock now and then where the file system is written in Python.)
"""

from __future__ import annotations

import json
import os
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from pipeline.errors import UserError
from pipeline.map_tables import maps_schema
from pipeline.night_files import NightFiles, Table, look, partitions
from pipeline.results import FAILURES_SCHEMA, SCORES_SCHEMA
from pipeline.storage import Location

LISTING_THREADS = 16
TRIES = 5
"""Each but the first for a compaction that moved rows in the middle of the query."""

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


def run_query(
    results: Location,
    sql: str,
    *,
    parameters: dict[str, Any] | None = None,
    categories: Sequence[str] = (),
    nights: Sequence[str] = (),
) -> pa.Table:
    """What one SELECT over the views gives, with `parameters` for its $names; rows of finished shards only.

    categories, nights: what of scores, maps, failures and what is made of them is looked at at all; everything when empty.
    Raises UserError for SQL that does not fit the views, before anything is read, for SQL that fails over what it finds,
    and for damaged files.
    """
    check_sql(sql)
    named = {view for view in (*SOURCES, *RECORDS) if re.search(rf"\b{view}\b", sql, re.IGNORECASE)}
    tables = list(dict.fromkeys(SOURCES[view] for view in SOURCES if view in named))
    for tries_left in reversed(range(TRIES)):
        files = _files(results, tables, categories, nights) if tables else {}
        with duckdb.connect() as connection:
            connection.execute("SET enable_progress_bar = false")  # it would be drawn among the rows
            connection.register_filesystem(ResultFiles(results))
            for view, rows in (_run_tables(results) if named & RECORDS.keys() else {}).items():
                connection.register(view, rows)
            try:
                _register(connection, files)
                return connection.sql(sql, params=parameters or {}).to_arrow_table()
            except duckdb.Error as error:
                if not (tries_left and _any_gone(results, files)):
                    raise UserError(f"the query failed: {_first_lines(error)}") from error
    raise AssertionError("unreachable")


def _register(connection: duckdb.DuckDBPyConnection, tables: Mapping[Table, Sequence[str]]) -> None:
    """Make the tables known, given the paths below RESULTS of the files that hold them, and the views made of them."""
    for table, files in tables.items():
        connection.register(f"no_{table}", _with_partition(SCHEMAS[table]).empty_table())
        rows = f"SELECT * FROM no_{table}"
        if files:
            listed = ", ".join(f"'{ResultFiles.protocol}://{path}'" for path in files)
            options = "hive_partitioning = true, hive_types = {'category': VARCHAR, 'night': VARCHAR}"
            # Maps may be of two formats; their columns are known only when the end of each file was read.
            options += ", union_by_name = true" if table == "maps" else ""
            rows += f" UNION ALL BY NAME SELECT * FROM read_parquet([{listed}], {options})"
        connection.execute(f"CREATE VIEW {'stored_maps' if table == 'maps' else table} AS {rows}")
    for view, text in DERIVED.items():
        if SOURCES[view] in tables:
            connection.execute(f"CREATE VIEW {view} AS {text}")


class ResultFiles(AbstractFileSystem):
    """Files below RESULTS as DuckDB opens them: those it is told of are there, and it knows which ranges it needs."""

    protocol = "results"
    cachable = False

    def __init__(self, results: Location) -> None:
        super().__init__()
        self.results = results

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: nothing is searched."""
        return [path]

    def exists(self, path: str, **_: Any) -> bool:
        """Listed a moment ago; if it has gone, opening it says so."""
        return True

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name and size (bytes)."""
        return {"name": path, "size": self._file(path).size(), "type": "file"}

    def modified(self, path: str) -> datetime:
        """When it was written."""
        return self._file(path).modified()

    def open(self, path: str, mode: str = "rb", **_: Any) -> SharedFile:
        """For reading. Raises FileNotFoundError."""
        return SharedFile(self._file(path).open(read_ahead=False))

    def _file(self, path: str) -> Location:
        return self.results / path.removeprefix(f"{self.protocol}://")


class SharedFile:
    """An open file with a position for every thread: DuckDB's threads seek and read in the same one at the same time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._reading = threading.Lock()
        self._own = threading.local()
        # DuckDB forgets files without closing them, and there may be thousands.
        weakref.finalize(self, file.close)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Where this thread reads next; returns that."""
        start = 0
        if whence == os.SEEK_CUR:
            start = self.tell()
        elif whence == os.SEEK_END:
            with self._reading:
                start = self._file.seek(0, os.SEEK_END)
        self._own.position = start + offset
        return self.tell()

    def tell(self) -> int:
        """Where this thread reads next."""
        position: int = getattr(self._own, "position", 0)
        return position

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes from there; all when negative."""
        with self._reading:
            self._file.seek(self.tell())
            data = self._file.read(size)
        self._own.position = self.tell() + len(data)
        return data

    def close(self) -> None:
        """Close the file for all threads."""
        self._file.close()


def check_sql(sql: str) -> None:
    """Raises UserError unless the SQL is one statement that fits the views; nothing is read."""
    with duckdb.connect() as empty:
        _register(empty, dict.fromkeys(SCHEMAS, ()))
        for view, schema in RECORDS.items():
            empty.register(view, schema.empty_table())
        try:
            statements = empty.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise UserError("the query is not one SELECT")
            empty.execute("PREPARE query AS " + statements[0].query)
        except duckdb.Error as error:
            raise UserError(f"the query does not fit the tables: {_first_lines(error)}") from error


def _files(
    results: Location, tables: Sequence[Table], categories: Sequence[str], nights: Sequence[str]
) -> dict[Table, list[str]]:
    """Paths below RESULTS of the files with the finished shards of each table."""
    parts = [
        part
        for part in partitions(results, None, None)
        if (not categories or part[0] in categories) and (not nights or part[1] in nights)
    ]
    others: list[Table] = [table for table in tables if table != "scores"]
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        found = list(threads.map(lambda part: look(results, part[0], part[1], others), parts))
    return {
        table: [file.relative_to(results) for night in found for file in _whole_files(night, table)] for table in tables
    }


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


def _any_gone(results: Location, files: Mapping[Table, Sequence[str]]) -> bool:
    """Whether a file that a query was to read is there no more."""
    paths = [path for paths in files.values() for path in paths]
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        return not all(threads.map(lambda path: (results / path).exists(), paths))


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

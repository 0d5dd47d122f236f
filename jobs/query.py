"""Ask the results tables: SQL over the views scores, newest, regions, failures, maps, runs, archives and calibration."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import duckdb
import pyarrow as pa
import tyro
from rich.table import Table
from rich.text import Text

from pipeline.command import OK, console, run
from pipeline.errors import UserError
from pipeline.named_queries import QUERIES, NamedQuery, Value
from pipeline.query import run_query
from pipeline.storage import Location
from pipeline.storage_checks import require_exists
from pipeline.storage_errors import STORAGE_ERRORS

Format = Literal["table", "csv", "json", "parquet"]


@dataclass(frozen=True)
class Options:
    """Options of query."""

    sql: Annotated[str, tyro.conf.Positional] = ""
    """One SELECT in DuckDB's dialect, or leave it out and give --name."""
    results: str = ""
    """Where score_archives wrote the tables: a folder or s3:// URI."""
    name: str = ""
    """A ready-made question instead of SQL; --list shows them."""
    param: tuple[str, ...] = ()
    """Values for the $names of the query, as NAME=VALUE; see --list."""
    categories: tuple[str, ...] = ()
    """Look at these categories only; all when omitted. Files of others are not even listed."""
    nights: tuple[str, ...] = ()
    """Look at these nights only, YYYY-MM-DD; all when omitted."""
    format: Format = "table"
    """table (for people), csv, json (a row a line) or parquet."""
    output: str = ""
    """Write to this file or s3:// URI instead of the terminal; parquet needs it."""
    list: bool = False
    """Show the ready-made questions and stop."""


def query(options: Options) -> int:
    """Answer; returns the exit status."""
    if options.list:
        console.print(questions())
        return OK
    asked = question(options)
    if not options.results:
        raise UserError("where are the results? Give --results")
    if options.format == "parquet" and not options.output:
        raise UserError("--format parquet: name a file with --output")
    results = Location.parse(options.results)
    require_exists(results, "--results")
    try:
        answer = run_query(
            results,
            asked.sql,
            parameters=parameters(asked, options.param),
            categories=options.categories,
            nights=options.nights,
        )
        show(answer, options)
    except STORAGE_ERRORS as error:
        raise UserError(f"the storage failed: {' '.join(str(error).split())}") from error
    return OK


def show(answer: pa.Table, options: Options) -> None:
    """Print or write the rows as asked."""
    if options.output:
        output = Location.parse(options.output)
        output.write_bytes(printed(answer) if options.format == "table" else encoded(answer, options.format))
        console.print(f"{len(answer)} rows to {output}", markup=False)
    elif options.format == "table":
        console.print(shown(answer))
    else:
        sys.stdout.write(encoded(answer, options.format).decode())


def question(options: Options) -> NamedQuery:
    """The one asked, by name or as SQL. Raises UserError where it is none or two."""
    if bool(options.sql) == bool(options.name):
        raise UserError(
            "ask one thing: SQL, before all options, or a ready-made question with --name (--list shows them)"
        )
    if options.sql:
        return NamedQuery("", options.sql)
    if options.name not in QUERIES:
        raise UserError(f"--name {options.name}: choose one of {', '.join(QUERIES)}")
    return QUERIES[options.name]


def parameters(asked: NamedQuery, given: tuple[str, ...]) -> dict[str, Value]:
    """Defaults of a query, replaced by what was given as NAME=VALUE. Raises UserError for what does not fit."""
    values = dict(asked.parameters)
    for item in given:
        name, separator, text = item.partition("=")
        if not separator:
            raise UserError(f"--param {item}: write NAME=VALUE")
        if not asked.question:  # SQL of the user's own, which may cast it
            values[name] = text
            continue
        if name not in values:
            known = ", ".join(values) or "it has none"
            raise UserError(f"--param {item}: the question has no parameter {name} (known: {known})")
        try:
            values[name] = type(values[name])(text)
        except ValueError as error:
            raise UserError(f"--param {item}: expected a value like {values[name]}") from error
    return values


def questions() -> Table:
    """All ready-made questions."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("--name", "answers", "--param, and what it is when not given"):
        table.add_column(heading)
    for name, each in QUERIES.items():
        table.add_row(name, each.question, " ".join(f"{key}={value}" for key, value in each.parameters.items()))
    return table


def shown(answer: pa.Table) -> Table:
    """The rows for a terminal; nested values as JSON."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for field in answer.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        table.add_column(Text(field.name), justify="right" if numeric else "left", overflow="fold")
    for row in zip(*(column.to_pylist() for column in answer.columns), strict=True):
        table.add_row(*(Text(_text(value)) for value in row))
    return table


def printed(answer: pa.Table) -> bytes:
    """What a terminal shows, as UTF-8."""
    with console.capture() as capture:
        console.print(shown(answer))
    return capture.get().encode()


def encoded(answer: pa.Table, format: Format) -> bytes:
    """The rows as CSV with a header, one JSON object a line, or Parquet."""
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        file = Path(folder) / "answer"
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("answer", answer)
        options = {"csv": "FORMAT csv, HEADER", "json": "FORMAT json", "parquet": "FORMAT parquet"}[format]
        connection.execute(f"COPY answer TO '{file}' ({options})")
        return file.read_bytes()


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=str, ensure_ascii=False)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(query, Options, __doc__ or "")

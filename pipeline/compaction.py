"""Compaction of a night: its many small files become few of a good size for queries, with the same rows.

The order is maps, failures, scores, and last the scores part whose metadata lists all shards inside: that commits. Then
the small files are removed, scores first. Killed anywhere before the commit, nothing has happened for readers here, and
the next compaction writes the same names again; killed after it, the next one finishes the removal. At no moment does a
reader of this package see a row twice or miss one, and `finished_shards` knows the same shards before and after.

Any other reader that globs ``*.parquet`` sees every row, but some of them twice: maps and failures from the writing of
their new file until the small ones are removed at the end, scores for the seconds between the commit and the removal,
which is why theirs go first. After a kill that lasts until the next compaction of the night, or, where shards were added
in between, until the next one a day later. It may drop rows that are equal, or read while no compaction runs. Where it
lists the files before the removal and opens them after it, it fails with "no such file"; only a listing in several pages
that goes on during commit and removal can miss rows without a word.

Run one compaction of a night at a time. Two at once lose nothing, since the files of each are complete in themselves,
but both do the work and one may stop with an error.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.night_files import Commit, NightFiles, Table, is_compacted, look, partitions, shard_name, stem
from pipeline.night_reading import rows_of
from pipeline.results import MAPS_PER_ROW_GROUP, SCORES_SCHEMA
from pipeline.storage import Location

TARGET_BYTES = 128 * 2**20
"""A file is closed at the first end of a shard beyond this size."""

ABANDONED = timedelta(days=1)
"""Compacted files that no commit lists may be another compaction's work, until they are as old as this."""

_WRITTEN: tuple[Table, ...] = ("maps", "failures", "scores")
_REMOVED: tuple[Table, ...] = ("scores", "failures", "maps")
_REMOVE_THREADS = 16
_ROWS_PER_ROW_GROUP = {"maps": MAPS_PER_ROW_GROUP, "failures": 2**16, "scores": 2**16}


@dataclass(frozen=True)
class Compaction:
    """What a compaction of one category's night did, or would do."""

    shards: int
    """Shards that are merged; 0 where the night is compact already."""
    merged: int
    """Files that held their rows, of all three tables."""
    written: int
    """Files that hold them now; 0 in a plan."""
    leftovers: int
    """Files without use that an interrupted compaction left, removed too."""


def old_nights(
    results: Location, *, categories: Sequence[str] = (), nights: Sequence[str] = (), before: date | None = None
) -> list[tuple[str, str]]:
    """(category, night) of the nights named, or of those before a date; of all categories where none is named.

    A night that is no date, such as the labelled runs of `evaluate`, has to be named. Raises UserError for a name
    without scores.
    """
    found = partitions(results, None, None)
    for what, names, known in (
        ("category", categories, {category for category, _ in found}),
        ("night", nights, {night for _, night in found}),
    ):
        if unknown := sorted(set(names) - known):
            raise UserError(f"{results} has no scores of {what} {', '.join(unknown)}: check the name")
    return [
        (category, night)
        for category, night in found
        if (not categories or category in categories)
        and (night in nights if nights else before is not None and _is_before(night, before))
    ]


def plan_compaction(results: Location, category: str, night: str) -> Compaction:
    """What :func:`compact_night` would do now. Reads lists and footers only."""
    files = look(results, category, night, ("maps", "failures"))
    return _plan(files, _leftovers(files))


def compact_night(results: Location, category: str, night: str, *, target_bytes: int = TARGET_BYTES) -> Compaction:
    """Merge the night's small files and those of earlier compactions, and remove what a killed one left.

    A shard stays whole in one file of a table, so that files exceed the target by up to a shard; maps of different
    formats or sizes go to different files. In memory are one file as read, one of each kind as written (twice while
    it is put away) and a row group. Raises UserError for a damaged file or one that went away meanwhile, and errors of
    the storage as they are: the night stays readable, and the next call goes on.
    """
    files = look(results, category, night, ("maps", "failures"))
    plan = _plan(files, _leftovers(files))
    written = 0
    if plan.shards:
        try:
            written = _write(files, target_bytes)
        except FileNotFoundError as error:
            raise UserError(f"files of {category}, {night} went away meanwhile ({error}): compact it again") from error
        files = look(results, category, night, ("maps", "failures"))
    leftovers = _leftovers(files)
    for table in _REMOVED:
        # One table after the other: a row seen twice does most harm among the scores.
        with ThreadPoolExecutor(_REMOVE_THREADS) as threads:
            list(threads.map(Location.remove, leftovers[table]))
    return Compaction(plan.shards, plan.merged, written, plan.leftovers)


def _plan(files: NightFiles, leftovers: dict[Table, list[Location]]) -> Compaction:
    count = sum(len(found) for found in leftovers.values())
    if len(files.small) + len(_in_use(files)) < 2:
        return Compaction(0, 0, 0, count)
    merged = {piece.file for table in _WRITTEN for piece in files.pieces(table)}
    return Compaction(len(files.shards), len(merged), 0, count)


def _in_use(files: NightFiles) -> list[Commit]:
    """Commits that count for a shard."""
    stems = {commit.stem for commit in files.holders().values()}
    return [commit for commit in files.commits if commit.stem in stems]


def _leftovers(files: NightFiles) -> dict[Table, list[Location]]:
    """Files whose rows lie in a commit's files too, and files of a compaction that was given up."""
    holders = files.holders()
    in_use = {commit.stem: commit for commit in _in_use(files)}
    superseded = {commit.stem for commit in files.commits} - set(in_use)

    def is_left(table: Table, name: str) -> bool:
        if not is_compacted(name):
            return shard_name(name) in holders
        if commit := in_use.get(stem(name)):
            return name not in commit.files[table]
        return stem(name) in superseded or _is_abandoned(files.folder(table) / name)

    return {
        table: [files.folder(table) / name for name in sorted(files.listed[table]) if is_left(table, name)]
        for table in _REMOVED
    }


def _is_abandoned(file: Location) -> bool:
    try:
        return datetime.now(UTC) - file.modified() > ABANDONED
    except FileNotFoundError:
        return False


def _write(files: NightFiles, target_bytes: int) -> int:
    """Write all finished shards of the night into new files and commit them; returns how many files."""
    shards = files.shards
    positions = {shard: position for position, shard in enumerate(shards)}
    # From the inputs alone: what is killed before its commit is written again under the same names.
    inputs = "\0".join([str(target_bytes), *(commit.stem for commit in files.commits), *shards])
    digest = hashlib.sha256(inputs.encode(errors="surrogatepass")).hexdigest()[:12]
    generation = 1 + max((commit.generation for commit in files.commits), default=0)
    commit = Commit(f"compacted@{generation:04d}-{digest}", tuple(shards), {table: {} for table in _WRITTEN})
    for table in _WRITTEN:
        folder = files.folder(table)
        open_files: dict[Any, _OpenFile] = {}

        def put(file: _OpenFile, table: Table = table, folder: Location = folder) -> None:
            name = f"{commit.stem}-{len(commit.files[table]):05d}.parquet"
            commit.files[table][name] = file.contents
            _put(folder / name, file.finish())

        for shard, rows in rows_of(files.pieces(table)):
            kind = _kind_of_map(rows) if table == "maps" else ()
            file = open_files.get(kind)
            if file and file.size >= target_bytes and not file.ends_with(positions[shard]):
                put(open_files.pop(kind))
                file = None
            if file is None:
                file = open_files[kind] = _OpenFile(rows.schema, _ROWS_PER_ROW_GROUP[table])
            file.add(positions[shard], rows)
        last = open_files.pop((), None) or _OpenFile(SCORES_SCHEMA, 1) if table == "scores" else None
        for file in open_files.values():
            put(file)
        if last:
            name = f"{commit.stem}-commit.parquet"
            commit.files[table][name] = last.contents
            _put(folder / name, last.finish(commit.metadata()))
    return sum(len(listed) for listed in commit.files.values())


def _kind_of_map(rows: pa.Table) -> tuple[Any, ...]:
    """What maps of one file share: readers make one array of a row group."""
    return rows.schema.field("map").type.value_type, rows["height"][0].as_py(), rows["width"][0].as_py()


class _OpenFile:
    """A Parquet file in the making: rows of shards, one after the other, in row groups of one size."""

    def __init__(self, schema: pa.Schema, rows_per_group: int) -> None:
        self.contents: list[tuple[int, int]] = []
        """(position of a shard, its rows), in the order of the rows."""
        self._rows_per_group = rows_per_group
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(self._buffer, schema, compression="zstd")
        self._waiting = schema.empty_table()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._buffer.tell()

    def ends_with(self, shard: int) -> bool:
        return bool(self.contents) and self.contents[-1][0] == shard

    def add(self, shard: int, rows: pa.Table) -> None:
        """Append rows of a shard, which may come in several parts."""
        before = self.contents.pop()[1] if self.ends_with(shard) else 0
        self.contents.append((shard, before + len(rows)))
        self._waiting = pa.concat_tables([self._waiting, rows])
        while len(self._waiting) >= self._rows_per_group:
            self._writer.write_table(self._waiting.slice(0, self._rows_per_group))
            self._waiting = self._waiting.slice(self._rows_per_group)

    def finish(self, metadata: dict[bytes, bytes] | None = None) -> bytes:
        """The whole file; nothing can be added any more."""
        if len(self._waiting):
            self._writer.write_table(self._waiting)
        self._writer.add_key_value_metadata(metadata or {})
        self._writer.close()
        return self._buffer.getvalue()


def _put(file: Location, data: bytes) -> None:
    """Write a file and make sure that the storage has it: what it was made of will be removed."""
    file.write_bytes(data)
    if file.size() != len(data):
        raise OSError(f"{file} has {file.size()} bytes after {len(data)} were written")


def _is_before(night: str, day: date) -> bool:
    try:
        return date.fromisoformat(night) < day
    except ValueError:
        return False

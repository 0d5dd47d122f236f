"""The loose images of a folder: one listing tells their names, sizes and fingerprints."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.archive_members import Entry, file_kind, image_root, is_hidden, judged, refused
from pipeline.storage import FileInfo, Location
from pipeline.storage_errors import STORAGE_ERRORS

READ_THREADS = 16


def list_folder(location: Location, names: Sequence[str] | None) -> list[Entry]:
    """The entries of the folder's files: those listed, or all loose ones."""
    seen: set[str] = set()
    gone = refused("unreadable", "gone since the folder was listed, or a link to nothing")
    return [
        judged(path, info.size if info else 0, seen, place=path, obstacle=None if info else gone)
        for path, info in folder_files(location, names)
    ]


def folder_files(location: Location, names: Sequence[str] | None) -> list[tuple[str, FileInfo | None]]:
    """Paths of the files of a folder archive (those listed, or all loose ones); None for what is not there.

    The archives and ``category=C`` folders in a folder are archives of their own.
    """
    if names is None:
        return [
            (path, info)
            for path, info in location.listing().items()
            if not (is_hidden(path) or file_kind(path) or image_root(location, path) != location)
        ]
    if not names:
        return []
    # The files may be few in a large folder: what they have in common is listed.
    common = posixpath.commonpath([posixpath.dirname(name) for name in names])
    folder = location / common if common else location
    listed = {posixpath.join(common, path): info for path, info in folder.listing().items()}
    return [(name, listed.get(posixpath.normpath(name))) for name in names]


def folder_reader(location: Location, entries: Sequence[Entry]) -> Callable[[Entry], bytes]:
    """Reads the entries' files, many at a time, and returns what gives the bytes of each.

    That raises EOFError for a file that is gone or, on a local disk, not ours to read. Other errors of the
    storage are raised at once.
    """
    wanted = [entry for entry in entries if not entry.failure]
    contents = _contents([location / entry.place for entry in wanted])
    by_name = {entry.name: content for entry, content in zip(wanted, contents, strict=True)}
    for content in contents:
        # On object storage a refusal speaks of the credentials, hence of all files, and not of this one.
        alone = (FileNotFoundError, PermissionError) if location.is_local else FileNotFoundError
        if isinstance(content, BaseException) and not isinstance(content, alone):
            raise content

    def read(entry: Entry) -> bytes:
        match by_name[entry.name]:
            case bytes() as data:
                return data
            case PermissionError():
                raise EOFError("no permission to read it")
            case _:
                raise EOFError("gone since the folder was listed")

    return read


def _contents(files: Sequence[Location]) -> list[bytes | Exception]:
    """The content of each file, or the error that reading it raised; many at a time, for small files far away."""

    def content(file: Location) -> bytes | Exception:
        try:
            return file.read_bytes()
        except STORAGE_ERRORS as error:
            return error

    with ThreadPoolExecutor(READ_THREADS) as threads:
        return list(threads.map(content, files))

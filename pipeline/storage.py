"""Files and folders on a local disk, S3 or any other fsspec storage, named by one URI.

S3 takes its endpoint, region, credentials and profile from the usual AWS variables (``AWS_ENDPOINT_URL``,
``AWS_DEFAULT_REGION``, ``AWS_ACCESS_KEY_ID``, ...). ``AWS_NO_SIGN_REQUEST=1`` reads public buckets unsigned.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.fs

from pipeline.errors import UserError
from pipeline.storage_errors import STORAGE_ERRORS, explain, missing_bucket

# Reading ahead by s3fs's default of 50 MiB wastes traffic in a zip and memory in an actor.
READ_BLOCK_BYTES = 8 * 2**20

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True, order=True)
class Location:
    """One file or folder. Holds nothing but its URI, so it hashes, pickles and travels to any worker.

    Missing files raise FileNotFoundError on reading; errors of the storage pass through as it raises them
    (see :func:`require_exists` and :func:`require_writable` for what a user should read).
    """

    uri: str
    """An absolute local path without scheme, or ``scheme://...``; no trailing slash: see :meth:`parse`."""

    @classmethod
    def parse(cls, uri: str | os.PathLike[str] | Location) -> Location:
        """The location of a path (relative and ``~`` too), a ``file://``, ``s3://`` or other fsspec URI.

        Raises UserError for an empty path, an unknown scheme or a URI without bucket.
        """
        if isinstance(uri, Location):
            return uri
        text = os.fspath(uri)
        if not text.strip():
            raise UserError("an empty path was given: name a folder or a URI such as s3://bucket/folder")
        if re.match(r"(s3a?|file|gs):/?[^/]", text):
            raise UserError(f"{text} is not a complete URI: write two slashes after the colon")
        match = _SCHEME.fullmatch(text)
        if match is None:
            return cls(_absolute(text))
        scheme, rest = match[1].lower(), match[2].rstrip("/")
        if scheme == "file":
            return cls(_absolute(_file_uri_path(text)))
        if scheme == "s3a":
            scheme = "s3"
        if scheme not in fsspec.available_protocols():
            raise UserError(f"{text} names an unknown storage: use a local path, s3:// or another fsspec URI")
        if scheme == "s3" and not rest.strip("/"):
            raise UserError(f"{text} names no bucket: write s3://bucket/folder")
        return cls(f"{scheme}://{rest}")

    def __truediv__(self, name: str) -> Location:
        """The child ``name``, which may have several parts. Raises UserError where it leaves the folder."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or not parts:
            raise UserError(f"'{name}' is no name inside {self.uri}: use a path that stays in the folder")
        return Location(f"{self.uri.rstrip('/')}/{'/'.join(parts)}")

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        return _SCHEME.match(self.uri) is None

    @property
    def name(self) -> str:
        """The last part of the path; the bucket where there is only a bucket."""
        return self.uri.rpartition("/")[2]

    @property
    def parent(self) -> Location:
        """The folder around; a bucket and the root folder are their own parents."""
        folder = self.uri.rpartition("/")[0]
        if self.is_local:
            return Location(folder or "/")
        return self if folder.endswith(":/") else Location(folder)

    def relative_to(self, ancestor: Location) -> str:
        """The path from ``ancestor``, with ``/`` between parts. Raises ValueError where it is no ancestor."""
        prefix = ancestor.uri.rstrip("/") + "/"
        if not self.uri.startswith(prefix):
            raise ValueError(f"{self.uri} is not inside {ancestor.uri}")
        return self.uri.removeprefix(prefix)

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether this is a folder; on object storage, whether anything lies under it."""
        return self._kind() == "directory"

    def size(self) -> int:
        """Size of the file, bytes."""
        if self.is_local:
            return Path(self.uri).stat().st_size
        filesystem, path = _filesystem(self.uri)
        return int(filesystem.info(path)["size"])

    def modified(self) -> datetime:
        """When the file was last written, by the storage's clock; with its time zone."""
        if self.is_local:
            return datetime.fromtimestamp(Path(self.uri).stat().st_mtime, UTC)
        filesystem, path = _filesystem(self.uri)
        when: datetime = filesystem.modified(path)
        return when if when.tzinfo else when.replace(tzinfo=UTC)

    def fingerprint(self) -> str:
        """A text that changes when the content may have: the ETag on S3, size and mtime (ns) elsewhere."""
        if self.is_local:
            status = Path(self.uri).stat()
            return f"{status.st_size}-{status.st_mtime_ns}"
        filesystem, path = _filesystem(self.uri)
        etag = filesystem.info(path).get("ETag")
        return str(etag).strip('"') if etag else str(filesystem.ukey(path))

    def open(self) -> BinaryIO:
        """The file opened for reading: seekable; on object storage read in ranges, never as a whole."""
        if self.is_local:
            return Path(self.uri).open("rb")
        filesystem, path = _filesystem(self.uri)
        opened: BinaryIO = filesystem.open(path, "rb", block_size=READ_BLOCK_BYTES)
        return opened

    def read_bytes(self) -> bytes:
        if self.is_local:
            return Path(self.uri).read_bytes()
        filesystem, path = _filesystem(self.uri)
        return bytes(filesystem.cat_file(path))

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        """Puts the file there in one step: a reader sees the old or the new file, never a part.

        Makes the folders above it. A process killed in the middle can leave a ``.<hex>.tmp`` on a local disk.
        """
        if self.is_local:
            _replace_file(Path(self.uri), data)
        else:
            filesystem, path = _filesystem(self.uri)
            filesystem.pipe_file(path, data)

    def write_json(self, value: Any) -> None:
        """Like :meth:`write_bytes`: indented, keys sorted, so that two versions compare line by line."""
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self.write_bytes(f"{text}\n".encode())

    def files(self, *, recursive: bool = False) -> list[Location]:
        """The files of the folder (and of those below), sorted by URI; [] where there is no such folder.

        Hidden names count. On object storage the recursive list is one listing, whatever the depth.
        """
        if self.is_local:
            return sorted(Location(path) for path in _local_files(self.uri, recursive=recursive))
        if not recursive:
            return self._listed("file")
        filesystem, path = _filesystem(self.uri)
        return self._children(path, filesystem.find(path, detail=False))

    def folders(self) -> list[Location]:
        """The direct sub-folders, sorted by URI; [] where there is no such folder."""
        if self.is_local:
            path = Path(self.uri)
            children = path.iterdir() if path.is_dir() else ()
            return sorted(self / child.name for child in children if child.is_dir())
        return self._listed("directory")

    def remove(self) -> None:
        """Removes the file; no error where there is none."""
        if self.is_local:
            Path(self.uri).unlink(missing_ok=True)
            return
        filesystem, path = _filesystem(self.uri)
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)

    def remove_tree(self) -> None:
        """Removes the folder and all that it holds; no error where there is none."""
        if self.is_local:
            shutil.rmtree(self.uri, ignore_errors=True)
            return
        filesystem, path = _filesystem(self.uri)
        with suppress(FileNotFoundError):
            filesystem.rm(path, recursive=True)

    def arrow_filesystem(self) -> tuple[pa.fs.FileSystem, str]:
        """This folder as libraries that speak Arrow want it: a file system and the path on it."""
        if self.is_local:
            return pa.fs.LocalFileSystem(), self.uri
        filesystem, path = _filesystem(self.uri)
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem)), path

    def _kind(self) -> str | None:
        """One of "file", "directory", or None where nothing is there."""
        if self.is_local:
            local = Path(self.uri)
            return "directory" if local.is_dir() else "file" if local.exists() else None
        filesystem, path = _filesystem(self.uri)
        try:
            return str(filesystem.info(path)["type"])
        except FileNotFoundError:
            return None

    def _listed(self, kind: str) -> list[Location]:
        """What lies directly in a folder that is not local, of the ``kind`` "file" or "directory"."""
        filesystem, path = _filesystem(self.uri)
        try:
            entries = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return self._children(path, [entry["name"] for entry in entries if entry["type"] == kind])

    def _children(self, path: str, names: list[str]) -> list[Location]:
        """Locations of the storage's ``names`` under its ``path``, sorted by URI.

        A listing of a file names the file itself, and consoles make empty ``folder/`` objects: no children.
        """
        prefix = path.rstrip("/") + "/"
        inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        base = self.uri.rstrip("/")
        return sorted(Location(f"{base}/{name}") for name in inside if name and not name.endswith("/"))


def require_exists(location: Location, what: str) -> None:
    """Raises UserError, naming ``what`` (say "dataset") and the URI, unless a file or folder is there."""
    try:
        if location.exists():
            return
        bucket = Location("/".join(location.uri.split("/", 3)[:3]))
        bucket_missing = location.uri.startswith("s3://") and not bucket.exists()
    except STORAGE_ERRORS as error:
        raise UserError(f"{what} {location} cannot be read: {explain(location.uri, error, _s3_endpoint())}") from error
    advice = missing_bucket(location.uri, _s3_endpoint()) if bucket_missing else "check the path"
    raise UserError(f"{what} {location} does not exist: {advice}")


def require_writable(location: Location) -> None:
    """Writes and removes a probe file in the folder, made where absent. Raises UserError if it cannot."""
    probe = location / f".probe-{uuid4().hex}"
    try:
        if location.is_file():
            raise UserError(f"{location} is a file: name a folder to write to")
        probe.write_bytes(b"")
        probe.remove()
    except STORAGE_ERRORS as error:
        raise UserError(f"cannot write to {location}: {explain(location.uri, error, _s3_endpoint())}") from error


def _s3_endpoint() -> str | None:
    """The S3 endpoint of the environment; None leaves it to botocore (its config file, else AWS)."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI that is not local, and the path that it uses for it.

    fsspec keeps one instance per process, thread and options. Naming the endpoint in the options makes a
    change of the environment count; listings are not cached, since other nodes write what we read.
    """
    if not uri.startswith("s3://"):
        filesystem, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        return filesystem, path
    # One request per read: parts fetched side by side may come from two versions of a file.
    options: dict[str, Any] = {"use_listings_cache": False, "max_concurrency": 1}
    if endpoint := _s3_endpoint():
        options["endpoint_url"] = endpoint
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes", "on"):
        options["anon"] = True
    # Not url_to_fs: it takes "::" in a key for a chain of file systems.
    return fsspec.filesystem("s3", **options), uri.removeprefix("s3://")


def _absolute(path: str) -> str:
    # Not resolve(): a symbolic link keeps the name that the user gave.
    return os.path.normpath(Path(path).expanduser().absolute())


def _file_uri_path(uri: str) -> str:
    host, slash, path = uri.split("://", 1)[1].partition("/")
    if not slash or host not in ("", "localhost"):
        raise UserError(f"{uri} names a host: write file:///absolute/path, or the path alone")
    return unquote(f"/{path}")


def _replace_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid4().hex}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _local_files(folder: str, *, recursive: bool, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of the files in a local folder. Follows links to folders, save to one of those ``above``."""
    if not Path(folder).is_dir():
        return
    status = Path(folder).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.path
            elif recursive:
                yield from _local_files(entry.path, recursive=True, above=above | {identity})

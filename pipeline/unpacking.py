"""A tar's own bytes out of gzip or zstd, found by content, up to the first damage and within a limit."""

from __future__ import annotations

import gzip
import tarfile
from typing import BinaryIO, Protocol, cast

import pyarrow as pa

from pipeline.archive_members import MAX_RATIO, BombError

FREE_BYTES = 256 * 2**20
"""Unpacked bytes from which MAX_RATIO counts: padding of a few KiB may unpack for days."""

_ZSTD_BYTES = 2**16


class Readable(Protocol):
    """The one method that reading a tar as a stream needs."""

    def read(self, size: int = -1, /) -> bytes: ...


def unpacked(file: BinaryIO) -> Readable:
    """The file, or what is in it where it is packed, whatever its name says.

    What comes before damage is given; then reading raises an error that ``is_damage`` knows. BombError where
    more comes out than photographs could be packed to. Errors of ``file`` itself pass through.
    """
    start = file.read(4)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return _Limited(_EagerGzip(fileobj=file), file)
    # A frame, or one that may be skipped: parallel packers start with those.
    if start == b"\x28\xb5\x2f\xfd" or (start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        return _Limited(_EagerZstd(file), file)
    return file


class _Limited:
    """Raises BombError where what ``file`` holds unpacks to more than the limit."""

    def __init__(self, stream: Readable, file: BinaryIO) -> None:
        self._stream, self._file, self._given = stream, file, 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._given += len(data)
        if self._given > FREE_BYTES + MAX_RATIO * self._file.tell():
            raise BombError(f"{self._file.tell()} bytes unpack to more than {self._given}")
        return data


class _EagerGzip(gzip.GzipFile):
    """Gives what is unpacked so far, where GzipFile would drop it upon damage further on.

    Not tarfile's own gzip: that ignores checksums, and all but the first part of files made by cat or bgzip.
    """

    def read(self, size: int | None = -1) -> bytes:
        return self.read1(-1 if size is None else size)


class _EagerZstd:
    """Unpacks every frame, and gives all that comes before damage."""

    def __init__(self, file: BinaryIO) -> None:
        self._source, self._given = _Source(file), 0
        self._stream = _zstd_stream(self._source)
        self._damage: Exception | None = None

    def read(self, size: int = -1, /) -> bytes:
        """Some bytes, not always ``size``; b"" at the end."""
        if self._damage:
            raise self._damage
        try:
            data: bytes = self._stream.read(_ZSTD_BYTES)
        except OSError as error:  # Arrow's own error for damage as well
            if self._source.failed:
                raise
            self._damage = tarfile.ReadError(f"zstd: {error}")
            data = self._rest()
            if not data:
                raise self._damage from error
        self._given += len(data)
        return data

    def _rest(self) -> bytes:
        """What was unpacked of the read that ended in damage: Arrow drops it, so unpack again, then byte by byte."""
        self._source.rewind()
        stream, position = _zstd_stream(self._source), 0
        while position < self._given:
            position += len(stream.read(min(_ZSTD_BYTES, self._given - position)))
        rest = bytearray()
        try:
            while len(rest) < _ZSTD_BYTES and (byte := stream.read(1)):
                rest += byte
        except OSError:
            if self._source.failed:
                raise
        return bytes(rest)


def _zstd_stream(source: _Source) -> pa.CompressedInputStream:
    return pa.CompressedInputStream(pa.PythonFile(cast(BinaryIO, source), "r"), "zstd")


class _Source:
    """A file as Arrow reads it, which remembers whether reading the file itself failed."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.failed = file, False

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except BaseException:
            self.failed = True
            raise

    def rewind(self) -> None:
        self._file.seek(0)

    def close(self) -> None:
        """The file belongs to whoever opened it."""

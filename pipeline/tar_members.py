"""The members of a tar, packed or not, streamed from its first byte to its last."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from pipeline.archive_members import (
    MAX_RATIO,
    RATIO_FREE_BYTES,
    Entry,
    Failure,
    damaged,
    empty,
    is_damage,
    is_hidden,
    judged,
    refused,
)
from pipeline.storage import Location
from pipeline.unpacking import Readable, unpacked

# Headers with a long name or attributes of the next one: tarfile reads what follows them whole.
_EXTENSIONS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_MAX_EXTENSION_BYTES = 2**20
# What is streamed past on the word of a header: tarfile goes on counting after the end of the file.
_MAX_STORED_BYTES = 2**40

_TYPES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
}


def stream_tar(location: Location) -> Iterator[tuple[Entry, Callable[[Entry], bytes]]]:
    """All members but folders, dot-files and macOS's shadows of files, each with a way to read it.

    Reading works until the next member is asked for, and raises an error that ``is_damage`` knows where the
    bytes are not there. The last entry tells of damage, of a bomb or of an archive without files.
    """
    count = 0
    with location.open() as file:
        seen: set[str] = set()
        try:
            stream = cast(BinaryIO, unpacked(file))
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo, bufsize=2**20) as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                    stored = tar.offset - member.offset_data
                    if member.size < 0 or stored > _MAX_STORED_BYTES:
                        raise tarfile.ReadError(f"a member of {member.size} bytes")
                    if not member.isdir() and not is_hidden(member.name):
                        count += 1
                        yield (
                            judged(
                                member.name,
                                member.size,
                                seen,
                                obstacle=_obstacle(member),
                                suspicion=_suspicion(member, stored),
                            ),
                            _reader(tar, member),
                        )
                _require_zeros(cast(Readable, tar.fileobj))
        except Exception as error:
            if not is_damage(error):
                raise
            yield damaged(error), _no_bytes
        else:
            if not count:
                yield empty(), _no_bytes


class _StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged or missing header an error: tarfile takes both for the proper end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)  # raises what tells tarfile of the proper end
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no header where the next member should start: {error}") from error
        if header.size < 0 or (header.type in _EXTENSIONS and header.size > _MAX_EXTENSION_BYTES):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _obstacle(member: tarfile.TarInfo) -> Failure | None:
    if member.isfile():
        return None
    return refused("unsupported_member", _TYPES.get(member.type, f"tar type {member.type!r}, no regular file"))


def _suspicion(member: tarfile.TarInfo, stored: int) -> Failure | None:
    """Against a sparse file that is all holes: a few hundred bytes would unpack to gigabytes."""
    if not member.issparse() or member.size <= RATIO_FREE_BYTES or member.size <= MAX_RATIO * stored:
        return None
    return refused("sparse_bomb", f"{stored} bytes that unpack to {member.size}")


def _reader(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[Entry], bytes]:
    def read(entry: Entry) -> bytes:
        content = tar.extractfile(member)
        assert content is not None, "only regular files are read"
        return content.read()

    return read


def _no_bytes(entry: Entry) -> bytes:
    raise EOFError("there is nothing to read")


def _require_zeros(rest: Readable) -> None:
    """Raises ReadError unless only padding follows: zeros in the middle of a tar look like its end."""
    while block := rest.read(2**20):
        if block.count(0) != len(block):
            raise tarfile.ReadError("there is more after the end mark")

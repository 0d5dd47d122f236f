"""The members of a zip: its directory lists them all, and each can be read by its range of bytes alone."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, cast

from pipeline.archive_members import (
    MAX_MEMBER_BYTES,
    MAX_RATIO,
    RATIO_FREE_BYTES,
    Entry,
    Failure,
    archive_failure,
    damaged,
    empty,
    is_damage,
    is_hidden,
    judged,
    refused,
)
from pipeline.storage import Location

MAX_DIRECTORY_BYTES = 128 * 2**20
"""A directory, about 100 bytes for each member, is held in memory as a whole."""

_END_BYTES = 2**17  # hold the end record of a zip and its longest comment
_END_RECORD = b"PK\x05\x06"
_DIRECTORY_RECORD = b"PK\x01\x02"
_MEMBER_RECORD = b"PK\x03\x04"

# Bits of a member's flags.
_ENCRYPTED = 0x1 | 0x40
_PATCH = 0x20
_UTF8_NAME = 0x800


class ZipPlace(NamedTuple):
    """Where a member lies, and what it has to be."""

    name: bytes
    """As written in the directory."""
    offset: int
    """Of its header in the file."""
    method: int
    packed: int
    """Bytes in the file."""
    size: int
    crc: int


def list_zip(location: Location) -> list[Entry]:
    """All members but folders, dot-files and macOS's shadows of files, in the order of the directory.

    The last entry may tell of an archive that is damaged, not all there, or empty.
    """
    with location.open() as file:
        length = file.seek(0, io.SEEK_END)
        # zipfile says "not a zip file" where the storage fails on the end of the file: let it fail here.
        file.seek(max(0, length - _END_BYTES))
        end = file.read()
        try:
            with zipfile.ZipFile(cast(BinaryIO, _Directory(file))) as archive:
                infos = archive.infolist()
                overlapping = _overlapping(infos, archive.start_dir, length)
            missing = list(_missing(end, file, infos))
        except Exception as error:
            if not is_damage(error):
                raise
            return [damaged(error)]
    seen: set[str] = set()
    entries = [
        judged(
            info.filename,
            info.file_size,
            seen,
            place=_place(info),
            obstacle=_obstacle(info),
            suspicion=_suspicion(info, info.header_offset in overlapping),
        )
        for info in infos
        if not info.filename.endswith("/") and not is_hidden(info.filename)
    ]
    return entries + (missing or ([] if entries else [empty()]))


def read_zip_member(file: BinaryIO, place: ZipPlace) -> bytes:
    """The member's bytes, unpacked and checked. Raises an error that ``is_damage`` knows where that fails."""
    file.seek(place.offset)
    header = _exactly(file, 30)
    if not header.startswith(_MEMBER_RECORD):
        raise zipfile.BadZipFile("no member where the directory says it is")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    if _exactly(file, name_length) != place.name:
        raise zipfile.BadZipFile("the directory has another name for it")
    _exactly(file, extra_length)
    data = _exactly(file, place.packed)
    if place.method == zipfile.ZIP_DEFLATED:
        # One byte more, to see whether there is more.
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.size + 1)
    if len(data) != place.size:
        relation = "more than" if len(data) > place.size else f"{len(data)} of"
        raise zipfile.BadZipFile(f"{relation} {place.size} bytes")
    if zlib.crc32(data) != place.crc:
        raise zipfile.BadZipFile("wrong checksum")
    return data


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size) if size else b""
    if len(data) != size:
        raise EOFError("the archive ends in the middle of it")
    return data


class _Directory:
    """The file as zipfile reads the directory from it: not without limit, and with names that it can decode."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1, /) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes, the limit is {MAX_DIRECTORY_BYTES}")
        data = self._read(size)
        return _with_legible_names(data) if data.startswith(_DIRECTORY_RECORD) else data


def _with_legible_names(directory: bytes) -> bytes:
    """Without the mark "this name is UTF-8" where it is not: zipfile refuses a whole archive for one such name."""
    records, position = bytearray(directory), 0
    while records.startswith(_DIRECTORY_RECORD, position) and position + 46 <= len(records):
        flags, name_length, extra_length, comment_length = struct.unpack_from("<H18x3H", records, position + 8)
        try:
            records[position + 46 : position + 46 + name_length].decode()
        except UnicodeDecodeError:
            struct.pack_into("<H", records, position + 8, flags & ~_UTF8_NAME)
        position += 46 + name_length + extra_length + comment_length
    return bytes(records)


def _missing(end: bytes, file: BinaryIO, infos: Sequence[zipfile.ZipInfo]) -> Iterator[Entry]:
    """What says that the archive has, or had, other members than the directory lists."""
    disk, _, _, total = struct.unpack_from("<4H", end, end.rindex(_END_RECORD) + 4)
    if disk not in (0, 0xFFFF):
        yield archive_failure("unsupported_archive", f"the last of {disk + 1} parts of a zip: join them first")
    elif total not in (0xFFFF, len(infos) % 2**16):  # all ones: told elsewhere; some packers count no further
        yield archive_failure("archive_damaged", f"the directory lists {len(infos)} members, not {total}")
    elif min((info.header_offset for info in infos), default=0) > 0:
        file.seek(0)
        if file.read(4) == _MEMBER_RECORD:
            yield archive_failure("archive_damaged", "there are members before those that the directory lists")


def _overlapping(infos: Sequence[zipfile.ZipInfo], directory: int, length: int) -> set[int]:
    """Offsets of members that run into the next one, where the members claim more bytes than there are.

    A small file can claim any amount by naming the same bytes again and again. One wrong offset does not,
    and must not speak against the member that it points into.
    """
    if sum(info.compress_size for info in infos) <= length:
        return set()
    offsets = sorted({info.header_offset for info in infos} | {directory})
    return {
        info.header_offset
        for info in infos
        for following in [bisect_right(offsets, info.header_offset)]
        if info.header_offset + 30 + info.compress_size > (offsets[following] if following < len(offsets) else length)
    }


def _place(info: zipfile.ZipInfo) -> ZipPlace:
    name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8_NAME else "cp437")
    return ZipPlace(name, info.header_offset, info.compress_type, info.compress_size, info.file_size, info.CRC)


def _obstacle(info: zipfile.ZipInfo) -> Failure | None:
    if info.header_offset < 0:
        return refused("unsupported_member", "it should start before the archive")
    if info.flag_bits & _ENCRYPTED:
        return refused("unsupported_member", "encrypted")
    if info.flag_bits & _PATCH or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = f"compression method {info.compress_type}"
        return refused("unsupported_member", f"{method}: only stored and deflate are read")
    if info.create_system == 3 and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # Unix
        return refused("unsupported_member", "a link or a device, no regular file")
    return None


def _suspicion(info: zipfile.ZipInfo, overlaps: bool) -> Failure | None:
    if overlaps:
        return refused("overlapping_member", "its bytes are another member's as well")
    if info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        return refused("zip_bomb", f"{info.compress_size} bytes that unpack to {info.file_size}")
    if info.compress_size > MAX_MEMBER_BYTES:
        return refused("member_too_large", f"{info.compress_size} bytes packed, the limit is {MAX_MEMBER_BYTES}")
    return None

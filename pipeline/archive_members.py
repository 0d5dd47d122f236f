"""The members of one tar, zip or folder, in order: each with what forbids reading it, or a way to read it.

Whatever the bytes are, the readers here end, hold one member at a time, and lose nothing without a word: what
comes before damage is given, then an entry that tells of the damage. Errors of the storage (network,
permissions) are another matter and are raised as they are.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

from pipeline.images import is_image_name
from pipeline.storage import Location

MAX_MEMBER_BYTES = 512 * 2**20
"""A larger member is a failure and is not read."""

Kind = Literal["tar", "zip", "folder"]

# Tar headers with a long name or attributes of the next one: tarfile reads what follows them whole.
_TAR_EXTENSIONS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_MAX_TAR_EXTENSION_BYTES = 2**20
# What is streamed past on the word of a header: tarfile goes on counting after the end of the file.
_MAX_TAR_MEMBER_BYTES = 2**40

_ZIP_END_BYTES = 2**17  # hold the end record of a zip and its longest comment

# What the readers raise on bytes that are not what they should be. Any other error is the storage's.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError),
    *(ValueError, IndexError, OverflowError, RecursionError, NotImplementedError),
)


@dataclass(frozen=True)
class Failure:
    """Why a member, or the rest of an archive, gives no image."""

    stage: str
    """``archive`` (the rest of it cannot be read), ``member``, or a later stage such as ``decode``."""
    error: str
    """A stable code, such as ``archive_damaged`` or ``empty_file``."""
    detail: str
    """One line for people."""


@dataclass(frozen=True)
class Entry:
    """A member before it is read: valid until the next one is asked for."""

    name: str
    """Its path in the archive, valid UTF-8; empty where the failure is the archive's own."""
    size: int
    """Bytes that ``read`` will give; 0 where there is a failure."""
    read: Callable[[], bytes]
    """Raises an error that :func:`is_damage` knows where the bytes are not there."""
    failure: Failure | None = None


def entries(location: Location, kind: Kind, names: Sequence[str] | None = None) -> Iterator[Entry]:
    """All members but folders, dot-files and macOS's shadows of files, in the archive's own order.

    ``names`` lists the files of a folder, where not all of its loose images are meant.
    """
    match kind:
        case "tar":
            return _tar_entries(location)
        case "zip":
            return _zip_entries(location)
        case "folder":
            return _folder_entries(location, names)


def is_damage(error: BaseException) -> bool:
    """Whether the archive's content is at fault, and not the storage that it is read from."""
    return isinstance(error, _DAMAGE)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def file_kind(name: str) -> Kind | None:
    """What sort of archive a file is by its name; None where it is none."""
    if name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return "tar"
    return "zip" if name.lower().endswith(".zip") else None


def category_in(part: str) -> str | None:
    """The ``C`` of a path part ``category=C``."""
    return part.removeprefix("category=") or None if part.startswith("category=") else None


def image_root(folder: Location, path: str) -> Location:
    """Whose loose image ``path`` is: the innermost ``category=C`` folder's, else that of ``folder``."""
    parts = path.split("/")[:-1]
    while parts and not category_in(parts[-1]):
        parts.pop()
    return folder / "/".join(parts) if parts else folder


def is_hidden(path: str) -> bool:
    """Whether a part of the path is a dot-file, a dot-folder or macOS's ``__MACOSX``."""
    return any(part == "__MACOSX" or (part[:1] == "." and part not in (".", "..")) for part in _parts(path))


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
        if header.size < 0 or (header.type in _TAR_EXTENSIONS and header.size > _MAX_TAR_EXTENSION_BYTES):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


class _EagerGzip(gzip.GzipFile):
    """Gives what is unpacked so far, where GzipFile would drop it upon damage further on.

    Not tarfile's own gzip: that ignores checksums, and all but the first part of files made by cat or bgzip.
    """

    def read(self, size: int | None = -1) -> bytes:
        return self.read1(-1 if size is None else size)


def _tar_entries(location: Location) -> Iterator[Entry]:
    with location.open() as file:
        seen: set[str] = set()
        try:
            stream = _unzipped(file)
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo, bufsize=2**20) as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                    if member.size < 0 or tar.offset - member.offset_data > _MAX_TAR_MEMBER_BYTES:
                        raise tarfile.ReadError(f"a member of {member.size} bytes")
                    if not member.isdir() and not is_hidden(member.name):
                        obstacle = None if member.isfile() else f"tar type {member.type!r}, no regular file"
                        yield _entry(member.name, member.size, _tar_reader(tar, member), seen, obstacle)
                _require_zeros(cast(BinaryIO, tar.fileobj))
        except Exception as error:
            if not is_damage(error):
                raise
            yield _damaged(error)


def _unzipped(file: BinaryIO) -> BinaryIO:
    """The file, or what is in it where it is gzipped, whatever its name says."""
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, _EagerGzip(fileobj=file)) if is_gzip else file


def _tar_reader(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        content = tar.extractfile(member)
        assert content is not None, "only regular files are read"
        return content.read()

    return read


def _require_zeros(rest: BinaryIO) -> None:
    """Raises ReadError unless only padding follows: zeros in the middle of a tar look like its end."""
    while block := rest.read(2**20):
        if any(block):
            raise tarfile.ReadError("there is more after the end mark")


def _zip_entries(location: Location) -> Iterator[Entry]:
    with location.open() as file:
        # zipfile says "not a zip file" where the storage fails on the end of the file: let it fail here.
        file.seek(max(0, file.seek(0, io.SEEK_END) - _ZIP_END_BYTES))
        file.read()
        seen: set[str] = set()
        try:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.filename.endswith("/") and not is_hidden(info.filename):
                        read = _zip_reader(archive, info)
                        yield _entry(info.filename, info.file_size, read, seen, _zip_obstacle(info))
        except Exception as error:
            if not is_damage(error):
                raise
            yield _damaged(error)


def _zip_obstacle(info: zipfile.ZipInfo) -> str | None:
    if info.header_offset < 0:
        return "it should start before the archive"
    if info.flag_bits & 0x1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compression method {info.compress_type}: only stored and deflate are read"
    if info.create_system == 3 and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # Unix
        return "no regular file"
    return None


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        with archive.open(info) as content:
            data = content.read()
        if len(data) != info.file_size:
            raise EOFError(f"{len(data)} of {info.file_size} bytes")
        return data

    return read


def member_names(location: Location, names: Sequence[str] | None) -> Iterator[str]:
    """The files of a folder archive: those listed, or all loose ones.

    The archives and ``category=C`` folders in a folder are archives of their own.
    """
    if names is not None:
        yield from names
        return
    for file in location.files(recursive=True):
        path = file.relative_to(location)
        if not (is_hidden(path) or file_kind(path) or image_root(location, path) != location):
            yield path


def _folder_entries(location: Location, names: Sequence[str] | None) -> Iterator[Entry]:
    for path in member_names(location, names):
        file = location / path
        try:
            size = file.size()
        except FileNotFoundError:
            yield _failed(path, "unreadable", "gone since the folder was listed, or a link to nothing")
        else:
            yield _entry(path, size, _file_reader(file), set(), None)


def _file_reader(file: Location) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return file.read_bytes()
        except FileNotFoundError:
            raise EOFError("gone since the folder was listed") from None
        except PermissionError:
            if not file.is_local:
                raise  # the credentials, hence all files, and not this one
            raise EOFError("no permission to read it") from None

    return read


def _entry(name: str, size: int, read: Callable[[], bytes], seen: set[str], obstacle: str | None) -> Entry:
    """The entry of a member, or of why it is not read: ``obstacle``, or what its name and size say."""
    duplicate = name in seen
    seen.add(name)
    if duplicate:
        return _failed(name, "duplicate_name", "an earlier member has the same name")
    if _is_unsafe(name):
        return _failed(name, "unsafe_path", "an absolute path, or one that leads out of the archive")
    if obstacle:
        return _failed(name, "unsupported_member", obstacle)
    if not is_image_name(name):
        return _failed(name, "not_an_image_name", "the name does not end as an image's does")
    if size > MAX_MEMBER_BYTES:
        return _failed(name, "member_too_large", f"{size} bytes, the limit is {MAX_MEMBER_BYTES}")
    if size == 0:
        return _failed(name, "empty_file", "the file has no bytes")
    return Entry(_printable(name), size, read)


def _failed(name: str, error: str, detail: str) -> Entry:
    return Entry(_printable(name), 0, bytes, Failure("member", error, detail))


def _damaged(error: Exception) -> Entry:
    return Entry("", 0, bytes, Failure("archive", "archive_damaged", one_line(error)))


def _is_unsafe(path: str) -> bool:
    parts = _parts(path)
    return not parts[0] or parts[0].endswith(":") or ".." in parts


def _parts(path: str) -> list[str]:
    """The parts of a path in an archive, which Windows may have written with backslashes."""
    return re.split(r"[/\\]", path)


def _printable(name: str) -> str:
    r"""The name as valid UTF-8: bytes that were not are written as ``\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

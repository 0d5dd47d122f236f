"""The members of an archive before they are read: their names, sizes, and what forbids reading them.

What the readers of tars, zips and folders have in common. Whatever the bytes are, those readers end, hold one
member at a time, and lose nothing without a word: what comes before damage is given, then an entry that tells
of the damage. Errors of the storage (network, permissions) are another matter and are raised as they are.
"""

from __future__ import annotations

import gzip
import re
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.images import is_image_name
from pipeline.storage import Location

MAX_MEMBER_BYTES = 512 * 2**20
"""A larger member is a failure and is not read."""

MAX_RATIO = 1000
"""Unpacked to packed bytes above which a member, or a whole tar, is a bomb and no photographs."""

RATIO_FREE_BYTES = 2**20
"""A member up to this size may be packed as tightly as its packer could."""

Kind = Literal["tar", "zip", "folder"]

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")

# What the readers raise on bytes that are not what they should be. Any other error is the storage's.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError),
    *(ValueError, IndexError, OverflowError, RecursionError, NotImplementedError),
)


class BombError(ValueError):
    """More comes out of a packed archive than photographs could be packed to."""


ARCHIVE_ERRORS = ("archive_damaged", "archive_bomb", "empty_archive", "unsupported_archive")
"""Codes that speak of an archive, and may hide any number of images."""


@dataclass(frozen=True)
class Failure:
    """Why a member, or the rest of an archive, gives no image."""

    stage: str
    """``archive`` (the rest of it cannot be read), ``member``, or a later stage such as ``decode``."""
    error: str
    """A stable code. ``archive``: archive_damaged, archive_bomb, empty_archive, unsupported_archive.

    ``member``: not_an_image_name, nested_archive, empty_file, duplicate_name, unsafe_path, unsupported_member (links,
    devices, encryption, rare packing), member_too_large, zip_bomb, sparse_bomb, overlapping_member, member_damaged,
    unreadable. ``decode``: those of :class:`pipeline.images.ImageError`.
    """
    detail: str
    """One line for people."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A member before it is read."""

    name: str
    """Its path in the archive, valid UTF-8; empty where the failure is the archive's own."""
    size: int
    """Bytes that it counts for where shards are cut: what reading gives, 0 for most failures."""
    failure: Failure | None = None
    """Why it is not to be read."""
    place: Any = None
    """Where the reader of its kind of archive finds it; plain values."""


def judged(
    name: str,
    size: int,
    seen: set[str],
    *,
    place: Any = None,
    obstacle: Failure | None = None,
    suspicion: Failure | None = None,
) -> Entry:
    """The entry of a member, with what its name, its size and the names before it (``seen``) say against it.

    ``obstacle`` is what its own kind of archive says. So does ``suspicion``, but the member keeps its size:
    where shards are cut must not depend on how careful we are.
    """
    printable = _printable(name)
    duplicate = printable in seen
    seen.add(printable)
    if duplicate:
        failure = refused("duplicate_name", "an earlier member has the same name")
    elif _is_unsafe(name):
        failure = refused("unsafe_path", "an absolute path, or one that leads out of the archive")
    elif obstacle:
        failure = obstacle
    elif file_kind(name):
        failure = refused("nested_archive", "an archive in an archive: unpack the outer one")
    elif not is_image_name(name):
        failure = refused("not_an_image_name", "the name does not end as an image's does")
    elif size > MAX_MEMBER_BYTES:
        failure = refused("member_too_large", f"{size} bytes, the limit is {MAX_MEMBER_BYTES}")
    elif size == 0:
        failure = refused("empty_file", "the file has no bytes")
    else:
        return Entry(printable, size, suspicion, place)
    return Entry(printable, 0, failure)


def refused(error: str, detail: str) -> Failure:
    return Failure("member", error, detail)


def archive_failure(error: str, detail: str) -> Entry:
    """The entry that tells of the archive itself."""
    return Entry("", 0, Failure("archive", error, detail))


def damaged(error: Exception) -> Entry:
    """The entry that tells why the rest of an archive cannot be read."""
    return archive_failure("archive_bomb" if isinstance(error, BombError) else "archive_damaged", one_line(error))


def empty() -> Entry:
    """The entry of an archive without files: whoever packed it meant to send something."""
    return archive_failure("empty_archive", "there are no files in it")


def is_damage(error: BaseException) -> bool:
    """Whether the archive's content is at fault, and not the storage that it is read from."""
    return isinstance(error, _DAMAGE)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def file_kind(name: str) -> Kind | None:
    """What sort of archive a file is by its name; None where it is none."""
    if name.lower().endswith(_TAR_SUFFIXES):
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


def _is_unsafe(path: str) -> bool:
    parts = _parts(path)
    return not parts[0] or parts[0].endswith(":") or ".." in parts


def _parts(path: str) -> list[str]:
    """The parts of a path in an archive, which Windows may have written with backslashes."""
    return re.split(r"[/\\]", path)


def _printable(name: str) -> str:
    r"""The name as valid UTF-8: bytes that were not are written as ``\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

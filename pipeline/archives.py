"""Archives (tar, tar.gz, tar.zst, zip, folders of images) to shards of encoded images, complete and in order.

Every file in an archive comes out once, as bytes or as a failure that says why not. Left out without a word
are only folders, dot-files and macOS's shadows of files (``._x``, ``__MACOSX``).

Reading has two steps, so that one large zip or folder feeds many workers: :func:`read_units` says what the
tasks are, and :func:`read_shards` does one of them. A tar can be read from its start only, and is one task.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pipeline.archive_members import (
    Entry,
    Failure,
    Kind,
    category_in,
    file_kind,
    image_root,
    is_damage,
    is_hidden,
    one_line,
)
from pipeline.errors import UserError
from pipeline.folder_members import folder_files, folder_reader, list_folder
from pipeline.images import is_image_name
from pipeline.storage import Location
from pipeline.storage_checks import require_exists
from pipeline.tar_members import stream_tar
from pipeline.zip_members import list_zip, read_zip_member

__all__ = ["Archive", "Failure", "Member", "Shard", "Unit", "find_archives", "image_id", "read_shards", "read_units"]

SHARD_IMAGES = 256
SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Archive:
    """One tar, zip or folder of loose images, all of one category."""

    location: Location
    kind: Kind
    category: str
    members: tuple[str, ...] | None = None
    """For a folder: the files that belong to it, as paths below it; None for all loose images."""
    fingerprint: str = ""
    """Changes when the content may have; see :meth:`fingerprinted`."""

    def fingerprinted(self) -> Archive:
        """The same with its content's fingerprint: of the file, or of the names and contents of a folder's files."""
        if self.kind != "folder":
            return replace(self, fingerprint=self.location.fingerprint())
        marks = [
            f"{(self.location / path).uri} {info.fingerprint if info else 'absent'}"
            for path, info in folder_files(self.location, self.members)
        ]
        return replace(self, fingerprint=_digest("\n".join(marks)))

    def size(self) -> int:
        """Bytes of the file, or of a folder's files that are there."""
        if self.kind != "folder":
            return self.location.size()
        return sum(info.size for _, info in folder_files(self.location, self.members) if info)

    @property
    def name(self) -> str:
        """Short, stable, safe in file names, and different for different URIs."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", self.location.name)[:100].strip("._") or "archive"
        content = "\0".join([self.location.uri, *(self.members or ())])
        return f"{readable}-{_digest(content)[:8]}"


@dataclass(frozen=True)
class Member:
    """A file of an archive: either ``data``, its encoded bytes, or ``failure``."""

    name: str
    """Its path in the archive, valid UTF-8; empty where the failure is the archive's own."""
    data: bytes | None
    failure: Failure | None


@dataclass(frozen=True)
class Shard:
    """Consecutive members of one archive: the unit of work, retry and commit."""

    archive: Archive
    index: int
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        return shard_name(self.archive, self.index)


@dataclass(frozen=True)
class Unit:
    """What one task reads of an archive: a shard of a zip or a folder, or the whole of a tar."""

    index: int
    """Of the shard; 0 for a tar."""
    entries: tuple[Entry, ...] | None
    """The members of the shard, none of them read; None where only reading shows what there is."""


def image_id(archive_uri: str, member: str) -> str:
    """32 hex digits that name one member of one archive, the same on every run."""
    return _digest(f"{archive_uri}\0{member}")[:32]


def find_archives(uris: Sequence[str], *, category: str | None) -> list[Archive]:
    """The archives that the URIs name, each once, sorted by URI.

    A URI names a tar (tar.gz, tgz, tar.zst and tzst too) or zip file, or a folder with such files or loose
    images at any depth. Loose images form one archive for the folder given and one for each ``category=C`` folder below it.
    The category is the one given, else the innermost ``category=C`` part of the path, else the name of the
    folder that the archive lies in or, for loose images, of the folder given.
    Raises UserError where a URI does not exist or is no archive, and where no URI holds anything to read.
    """
    files: dict[Location, Kind] = {}
    roots: set[Location] = set()
    for location in map(Location.parse, uris):
        require_exists(location, "archive")
        if location.is_dir():
            for file in location.files(recursive=True):
                path = file.relative_to(location)
                if is_hidden(path):
                    continue
                if kind := file_kind(path):
                    files[file] = kind
                elif is_image_name(path):
                    roots.add(image_root(location, path))
        elif kind := file_kind(location.name):
            files[location] = kind
        else:
            raise UserError(
                f"{location} is no archive: give a .tar, .tar.gz, .tgz, .tar.zst, .tzst or .zip file, or a folder"
            )
    if not files and not roots:
        raise UserError(f"no archives and no images in {', '.join(uris) or 'no URI'}: check the path")
    archives = [Archive(file, kind, _category(file.parent, category)) for file, kind in files.items()]
    for root in roots:
        # Where a folder and one above it were given, the upper one has the images of both.
        if not any(_holds(upper, root) for upper in roots):
            archives.append(Archive(root, "folder", _category(root, category)))
    return sorted(archives, key=lambda archive: archive.location)


def read_units(archive: Archive, *, shard_images: int = SHARD_IMAGES, shard_bytes: int = SHARD_BYTES) -> list[Unit]:
    """All tasks that reading the archive consists of, in order.

    What is wrong with a member, other than its bytes, is decided here, where all names are known. Takes the
    memory of the names and sizes of a zip or folder. Errors of the storage are raised as they are.
    """
    match archive.kind:
        case "tar":
            return [Unit(0, None)]
        case "zip":
            listed = list_zip(archive.location)
        case "folder":
            listed = list_folder(archive.location, archive.members)
    return [Unit(index, tuple(entries)) for index, entries in groupby(listed, _Cutter(shard_images, shard_bytes))]


def read_shards(
    archive: Archive,
    unit: Unit,
    *,
    shard_images: int = SHARD_IMAGES,
    shard_bytes: int = SHARD_BYTES,
    skip: Container[str] = (),
) -> Iterator[Shard]:
    """The unit's members in order, in shards of up to ``shard_images`` members and ``shard_bytes``.

    Where the cuts fall depends on nothing but the archive's content and these limits, which must be those of
    :func:`read_units`. Shards whose names are in ``skip`` are passed without keeping their bytes. One shard is
    in memory at a time; a member larger than ``shard_bytes`` has its own. A damaged archive gives what comes
    before the damage, then a member without name, ``archive_damaged``. Errors of the storage (network,
    permissions) are raised as they are: they say nothing about the archive, and a retry may help.
    """
    if unit.entries is None:
        yield from _stream(archive, shard_images, shard_bytes, skip)
    elif shard_name(archive, unit.index) not in skip:
        yield Shard(archive, unit.index, _read_all(archive, unit.entries))


def shard_name(archive: Archive, index: int) -> str:
    """What the archive's shard of this number is called in every run."""
    return f"{archive.name}-{index:05d}"


def _stream(archive: Archive, shard_images: int, shard_bytes: int, skip: Container[str]) -> Iterator[Shard]:
    shard_of = _Cutter(shard_images, shard_bytes)
    for index, members in groupby(stream_tar(archive.location), lambda member: shard_of(member[0])):
        if shard_name(archive, index) not in skip:
            # One after the other: what is not read when the next is asked for is gone.
            yield Shard(archive, index, tuple(_read(entry, read) for entry, read in members))


class _Cutter:
    """Numbers the shard of one entry after the other."""

    def __init__(self, shard_images: int, shard_bytes: int) -> None:
        self._limits = shard_images, shard_bytes
        self._index, self._count, self._size = 0, 0, 0

    def __call__(self, entry: Entry) -> int:
        images, size = self._limits
        if self._count and (self._count >= images or self._size + entry.size > size):
            self._index, self._count, self._size = self._index + 1, 0, 0
        self._count, self._size = self._count + 1, self._size + entry.size
        return self._index


def _read_all(archive: Archive, entries: Sequence[Entry]) -> tuple[Member, ...]:
    if archive.kind == "folder":
        read = folder_reader(archive.location, entries)
        return tuple(_read(entry, read) for entry in entries)
    with archive.location.open() as file:
        return tuple(_read(entry, lambda entry: read_zip_member(file, entry.place)) for entry in entries)


def _read(entry: Entry, read: Callable[[Entry], bytes]) -> Member:
    if entry.failure:
        return Member(entry.name, None, entry.failure)
    try:
        return Member(entry.name, read(entry), None)
    except Exception as error:
        if not is_damage(error):
            raise
        return Member(entry.name, None, Failure("member", "member_damaged", one_line(error)))


def _holds(upper: Location, root: Location) -> bool:
    """Whether ``root`` is a folder in ``upper`` whose loose images are those of ``upper``."""
    if root == upper or not root.uri.startswith(upper.uri.rstrip("/") + "/"):
        return False
    path = f"{root.relative_to(upper)}/image"
    return image_root(upper, path) == upper and not is_hidden(path)


def _category(folder: Location, given: str | None) -> str:
    """The category of what lies in ``folder``."""
    marked = [category for part in folder.uri.split("/") if (category := category_in(part))]
    category = given or (marked[-1] if marked else folder.name)
    if not category:
        raise UserError(f"{folder} tells no category: name it with --category")
    return category


def _digest(text: str) -> str:
    # Local paths may hold bytes that are no UTF-8; Python keeps them as surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

"""Archives (tar, tar.gz, zip, folders of images) to shards of encoded images, streamed and complete.

Every file in an archive comes out once, as bytes or as a failure that says why not. Left out without a word
are only folders, dot-files and macOS's shadows of files (``._x``, ``__MACOSX``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.archive_members import (
    Entry,
    Failure,
    Kind,
    category_in,
    entries,
    file_kind,
    image_root,
    is_damage,
    is_hidden,
    member_names,
    one_line,
)
from pipeline.errors import UserError
from pipeline.images import is_image_name
from pipeline.storage import Location, require_exists

__all__ = ["Archive", "Failure", "Member", "Shard", "find_archives", "image_id", "read_shards"]


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
        with ThreadPoolExecutor(16) as threads:
            files = [self.location / name for name in member_names(self.location, self.members)]
            marks = threads.map(lambda file: f"{file.uri} {file.fingerprint()}", files)
            return replace(self, fingerprint=_digest("\n".join(marks)))

    def size(self) -> int:
        """Bytes on storage: of the file, or of a folder's files together. What is gone counts nothing."""
        if self.kind != "folder":
            return self.location.size()

        def of_file(name: str) -> int:
            try:
                return (self.location / name).size()
            except FileNotFoundError:
                return 0

        with ThreadPoolExecutor(16) as threads:
            return sum(threads.map(of_file, member_names(self.location, self.members)))

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
        return _shard_name(self.archive, self.index)


def image_id(archive_uri: str, member: str) -> str:
    """32 hex digits that name one member of one archive, the same on every run."""
    return _digest(f"{archive_uri}\0{member}")[:32]


def find_archives(uris: Sequence[str], *, category: str | None) -> list[Archive]:
    """The archives that the URIs name, each once, sorted by URI.

    A URI names a tar, tar.gz, tgz or zip file, or a folder with such files or loose images at any depth.
    Loose images form one archive for the folder given and one for each ``category=C`` folder below it.
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
            raise UserError(f"{location} is no archive: give a .tar, .tar.gz, .tgz or .zip file, or a folder")
    if not files and not roots:
        raise UserError(f"no archives and no images in {', '.join(uris) or 'no URI'}: check the path")
    archives = [Archive(file, kind, _category(file.parent, category)) for file, kind in files.items()]
    for root in roots:
        # Where a folder and one above it were given, the upper one has the images of both.
        if not any(_holds(upper, root) for upper in roots):
            archives.append(Archive(root, "folder", _category(root, category)))
    return sorted(archives, key=lambda archive: archive.location)


def read_shards(
    archive: Archive,
    *,
    shard_images: int = 256,
    shard_bytes: int = 128 * 2**20,
    skip: Container[str] = (),
) -> Iterator[Shard]:
    """The archive's members in order, in shards of up to ``shard_images`` members and ``shard_bytes``.

    Where the cuts fall depends on nothing but the archive's content and these limits. Shards whose names are
    in ``skip`` are passed without keeping their bytes. One shard is in memory at a time; a member larger than
    ``shard_bytes`` has its own. A damaged archive gives what comes before the damage, then a member without
    name, ``archive_damaged``. Errors of the storage (network, permissions) are raised as they are: they say
    nothing about the archive, and a retry may help.
    """
    index, count, size = 0, 0, 0
    members: list[Member] = []
    for entry in entries(archive.location, archive.kind, archive.members):
        if count and (count >= shard_images or size + entry.size > shard_bytes):
            if members:
                yield Shard(archive, index, tuple(members))
            index, count, size, members = index + 1, 0, 0, []
        if _shard_name(archive, index) not in skip:
            members.append(_read(entry))
        count, size = count + 1, size + entry.size
    if members:
        yield Shard(archive, index, tuple(members))


def _read(entry: Entry) -> Member:
    if entry.failure:
        return Member(entry.name, None, entry.failure)
    try:
        return Member(entry.name, entry.read(), None)
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


def _shard_name(archive: Archive, index: int) -> str:
    return f"{archive.name}-{index:05d}"


def _digest(text: str) -> str:
    # Local paths may hold bytes that are no UTF-8; Python keeps them as surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

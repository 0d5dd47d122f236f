"""Files on a local disk: replaced in one step, made or changed only if nobody else did, and listed."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from pipeline.stored import Stored, content_version

# What file systems without hard links answer (FAT, many network and FUSE mounts).
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def read_stored(path: Path) -> Stored:
    """Raises FileNotFoundError. The age is by this computer's clock."""
    with path.open("rb") as file:
        data, written_s = file.read(), os.fstat(file.fileno()).st_mtime
    return Stored(data, content_version(data), time.time() - written_s)


def replace(path: Path, data: bytes) -> None:
    """Puts the file there in one step, and the folders above it. A killed process can leave a ``.<hex>.tmp``."""
    with _written_beside(path, data) as temporary:
        temporary.replace(path)


def create(path: Path, data: bytes) -> bool:
    """Puts the file there in one step unless there is one. Returns whether it did.

    Where the file system has no hard links, a reader may see the file before its content.
    """
    with _written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_exclusively(path, data)
    return True


def replace_if(path: Path, version: str, data: bytes) -> bool:
    """Replaces the file in one step if it is of that version. Returns whether it did."""
    with _held(path, version) as unchanged:
        if unchanged:
            replace(path, data)
    return unchanged


def remove_if(path: Path, version: str) -> bool:
    """Removes the file if it is of that version. Returns whether it did."""
    with _held(path, version) as unchanged:
        if unchanged:
            path.unlink()
    return unchanged


def walk(folder: str, *, recursive: bool, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
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
                yield from walk(entry.path, recursive=True, above=above | {identity})


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A hidden file with the data in the folder of ``path``, removed at the end if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid4().hex}.tmp"
    try:
        temporary.write_bytes(data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create_exclusively(path: Path, data: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


@contextmanager
def _held(path: Path, version: str) -> Iterator[bool]:
    """Whether the file is of that version; others who ask here wait until the block ends.

    All who change it give the path a new inode or remove it, so who waited for the lock of an old inode sees so.
    """
    try:
        file = path.open("r+b")  # open for writing, as locks of NFS demand
    except FileNotFoundError:
        yield False
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            same_file = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            same_file = False
        yield same_file and content_version(file.read()) == version

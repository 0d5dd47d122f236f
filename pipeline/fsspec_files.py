"""Files on storages other than S3 and local disks, written if nobody else did: by looking first, the best there is.

fsspec has no conditional writes. Two writers who look at the same moment may both believe that they were alone.
"""

from __future__ import annotations

from typing import Any

from pipeline.stored import Stored, content_version


def read_stored(filesystem: Any, path: str) -> Stored:
    data = bytes(filesystem.cat_file(path))
    return Stored(data, content_version(data), None)


def create(filesystem: Any, path: str, data: bytes) -> bool:
    try:
        filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def replace_if(filesystem: Any, path: str, version: str, data: bytes) -> bool:
    unchanged = _has_version(filesystem, path, version)
    if unchanged:
        filesystem.pipe_file(path, data)
    return unchanged


def remove_if(filesystem: Any, path: str, version: str) -> bool:
    unchanged = _has_version(filesystem, path, version)
    if unchanged:
        filesystem.rm_file(path)
    return unchanged


def _has_version(filesystem: Any, path: str, version: str) -> bool:
    try:
        return read_stored(filesystem, path).version == version
    except FileNotFoundError:
        return False

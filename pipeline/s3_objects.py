"""Reading S3 objects over connections that break, and writing them only if nobody else did.

What fails before an answer arrives is repeated by botocore (:mod:`pipeline.s3_options`). What fails after that
is dealt with here: a body that stops, stalls or is shorter than what was asked for is continued where it broke
off, and an object that changes meanwhile is an error, so that no read mixes two versions.
"""

from __future__ import annotations

import errno
import random
import time
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
)
from fsspec.asyn import sync
from fsspec.spec import AbstractBufferedFile

from pipeline.stored import Stored

MAX_BREAKS = 5
"""So many broken bodies in a row, none of which brought PROGRESS_BYTES, and reading fails."""
PROGRESS_BYTES = 2**16

_CHUNK_BYTES = 2**16  # aiohttp reads ahead by twice as much, and drops that when the connection breaks
_LONGEST_PAUSE_S = 5.0

# What aiohttp, aiobotocore and fsspec raise over a body that stopped or stalled.
_BREAKS = (aiohttp.ClientError, BotoCoreError, OSError)

# NoSuchKey: there is nothing to replace. Conflict: another writer is busy with the same object.
_REFUSALS = ("PreconditionFailed", "412", "NoSuchKey", "ConditionalRequestConflict", "409")


# What servers say that know no conditional writes.
_UNKNOWN = ("NotImplemented", "501")


class ObjectChangedError(OSError):
    """The object was replaced while it was read: what was read so far belongs to an older version."""


def read_stored(
    filesystem: Any, path: str, *, start: int = 0, end: int | None = None, etag: str | None = None
) -> Stored:
    """The bytes from ``start`` up to ``end`` (None: its end) of the object, of its version ``etag`` if given.

    Raises FileNotFoundError, ObjectChangedError, and OSError where the server keeps failing.
    """
    chunks: list[bytes] = []
    position, breaks = start, 0
    while True:
        response, arrived, broken = sync(filesystem.loop, _fetch, filesystem, path, position, end, etag)
        etag = response.get("ETag") or ""
        end = position + response["ContentLength"] if end is None else end
        if isinstance(broken, FlexibleChecksumError):
            chunks, arrived, position = [], [], start
        chunks += arrived
        position += (gained := sum(map(len, arrived)))
        if position == end:
            return Stored(b"".join(chunks), etag, _age_s(response))
        breaks = 1 if gained >= PROGRESS_BYTES else breaks + 1
        if breaks > MAX_BREAKS:
            raise OSError(errno.EIO, f"the connection broke {breaks} times in a row", path) from broken
        time.sleep(random.uniform(0, min(0.1 * 2**breaks, _LONGEST_PAUSE_S)))


class ObjectReader(AbstractBufferedFile):
    """One version of an S3 object, opened for reading in ranges with fsspec's read-ahead.

    Reading raises ObjectChangedError once the object was replaced, FileNotFoundError once it was removed.
    """

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        if start >= end:
            return b""
        return read_stored(self.fs, self.path, start=start, end=end, etag=self.details.get("ETag")).data


def create(filesystem: Any, path: str, data: bytes) -> bool:
    """Puts the object there unless there is one. Returns whether the object now holds ``data``."""
    if filesystem.exists(path):  # a server that does not know If-None-Match may ignore it
        return _holds(filesystem, path, data)
    return _put_if(filesystem, path, data, IfNoneMatch="*")


def replace_if(filesystem: Any, path: str, version: str, data: bytes) -> bool:
    """Replaces the object if its ETag is ``version``. Returns whether the object now holds ``data``."""
    return _put_if(filesystem, path, data, IfMatch=version)


def remove_if(filesystem: Any, path: str, version: str) -> bool:
    """Removes the object if its ETag is ``version``. Returns whether it did."""
    bucket, key, _ = filesystem.split_path(path)
    try:
        filesystem.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=version)
    except OSError as error:
        if _code(error) in _UNKNOWN:
            return _looked_first(filesystem, path, {"IfMatch": version}, "delete_object")
        if _code(error) in _REFUSALS:
            return False
        raise
    return True


async def _fetch(
    filesystem: Any, path: str, start: int, end: int | None, etag: str | None
) -> tuple[dict[str, Any], list[bytes], Exception | None]:
    """The server's answer, what arrived of its body, and what broke it. Raises what :func:`_get` does.

    One coroutine: aiohttp drops what it holds unread when the connection breaks, so reading must not begin late.
    """
    response = await _get(filesystem, path, start, end, etag)
    arrived: list[bytes] = []
    try:
        if end is None or response["ContentLength"] <= end - start:  # a server that ignores ranges sends more
            while chunk := await response["Body"].read(_CHUNK_BYTES):
                arrived.append(chunk)
    except _BREAKS as error:
        return response, arrived, error
    finally:
        response["Body"].close()
    return response, arrived, None


async def _get(filesystem: Any, path: str, start: int, end: int | None, etag: str | None) -> dict[str, Any]:
    """The server's answer to a request for that range of that version. Raises ObjectChangedError."""
    bucket, key, _ = filesystem.split_path(path)
    request = {"Bucket": bucket, "Key": key}
    if end is not None:
        request["Range"] = f"bytes={start}-{end - 1}"
    if etag:
        request["IfMatch"] = etag
    try:
        response: dict[str, Any] = await filesystem._call_s3("get_object", **request)
    except OSError as error:
        if _code(error) not in ("PreconditionFailed", "412"):
            raise
    else:
        if not etag or response.get("ETag", etag) == etag:  # a server may not know If-Match
            return response
        response["Body"].close()
    raise ObjectChangedError(errno.EBUSY, "the object changed while it was read: start again", path)


def _put_if(filesystem: Any, path: str, data: bytes, **condition: str) -> bool:
    bucket, key, _ = filesystem.split_path(path)
    try:
        filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
    except OSError as error:
        if _code(error) in _UNKNOWN:
            return _looked_first(filesystem, path, condition, "put_object", Body=data)
        if _code(error) not in _REFUSALS:
            raise
        return _holds(filesystem, path, data)
    return True


def _looked_first(filesystem: Any, path: str, condition: dict[str, str], operation: str, **request: Any) -> bool:
    """What there is for a server without conditional writes: two who look at the same moment may both go on."""
    try:
        etag = read_stored(filesystem, path).version
    except FileNotFoundError:
        etag = None
    if etag != condition.get("IfMatch"):
        return False
    bucket, key, _ = filesystem.split_path(path)
    filesystem.call_s3(operation, Bucket=bucket, Key=key, **request)
    return True


def _holds(filesystem: Any, path: str, data: bytes) -> bool:
    """Whether a refused write took effect all the same: its answer was lost, and its repetition refused."""
    try:
        return read_stored(filesystem, path).data == data
    except FileNotFoundError:
        return False


def _code(error: OSError) -> str | None:
    """The S3 error code behind what s3fs raised."""
    cause = error.__cause__
    return str(cause.response.get("Error", {}).get("Code")) if isinstance(cause, ClientError) else None


def _age_s(response: dict[str, Any]) -> float | None:
    date = response["ResponseMetadata"]["HTTPHeaders"].get("date")
    written: datetime | None = response.get("LastModified")
    return (parsedate_to_datetime(date) - written).total_seconds() if date and written else None

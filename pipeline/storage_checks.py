"""Whether a run can read and write where it was told to: asked before any work, answered in one line."""

from __future__ import annotations

from uuid import uuid4

from pipeline.errors import UserError
from pipeline.s3_options import s3_endpoint
from pipeline.storage import Location
from pipeline.storage_errors import STORAGE_ERRORS, explain, missing_bucket


def require_exists(location: Location, what: str) -> None:
    """Raises UserError, naming ``what`` (say "dataset") and the URI, unless a file or folder is there."""
    try:
        if location.exists():
            return
        bucket = Location("/".join(location.uri.split("/", 3)[:3]))
        bucket_missing = location.is_s3 and not bucket.exists()
    except STORAGE_ERRORS as error:
        raise UserError(f"{what} {location} cannot be read: {explain(location.uri, error, s3_endpoint())}") from error
    advice = missing_bucket(location.uri, s3_endpoint()) if bucket_missing else "check the path"
    raise UserError(f"{what} {location} does not exist: {advice}")


def require_writable(location: Location) -> None:
    """Writes and removes a probe file in the folder, made where absent. Raises UserError if it cannot."""
    probe = location / f".probe-{uuid4().hex}"
    try:
        if location.is_file():
            raise UserError(f"{location} is a file: name a folder to write to")
        probe.write_bytes(b"")
        probe.remove()
    except STORAGE_ERRORS as error:
        raise UserError(f"cannot write to {location}: {explain(location.uri, error, s3_endpoint())}") from error

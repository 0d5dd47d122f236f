"""A small file read together with the mark of its version, for writers who must not undo one another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Stored:
    """A file as it was at one moment."""

    data: bytes
    version: str
    """Changes when the content does: the ETag on S3, :func:`content_version` elsewhere."""
    age_s: float | None
    """Seconds since it was written, on S3 by the server's own clock within 1 s; None where that is not known."""


def content_version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""The S3 client's settings: endpoint and credentials of the user, and how long to bear with a failing server.

botocore repeats a request that is answered 500, 502, 503, 504 or SlowDown, that is cut off or that times out,
after growing random pauses. Refusals (403, 404, 412) are never repeated. Bodies are another matter: botocore
has answered by then, see :mod:`pipeline.s3_objects`.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import botocore.session  # type: ignore[import-untyped]
import fsspec

ATTEMPTS = 5
"""Tries of one request, with about 8 s of pauses in all; AWS_MAX_ATTEMPTS or the profile's max_attempts wins."""
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 20
"""Without one byte for so long, a connection counts as broken."""

# s3fs repeats what botocore gave up on (SlowDown, time-outs) or does not know (an answer cut or garbled).
_ROUNDS = 2

_RETRY_VARIABLES = (
    *("AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"),
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
)


def s3_endpoint() -> str | None:
    """The S3 endpoint of the environment; None leaves it to botocore (its config file, else AWS)."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def s3_filesystem() -> Any:
    """The s3fs file system for the environment as it is now.

    fsspec keeps one instance per process, thread and options. Naming the endpoint in the options makes a
    change of the environment count; listings are not cached, since other nodes write what we read.
    """
    mode, attempts = _retries(*(os.environ.get(name) for name in _RETRY_VARIABLES))
    options: dict[str, Any] = {
        "use_listings_cache": False,
        "max_concurrency": 1,  # a large upload holds one part in flight
        "config_kwargs": {
            "retries": {"mode": mode, "total_max_attempts": attempts},
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
        },
    }
    if endpoint := s3_endpoint():
        options["endpoint_url"] = endpoint
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes", "on"):
        options["anon"] = True
    filesystem = fsspec.filesystem("s3", **options)
    filesystem.retries = _ROUNDS
    return filesystem


@lru_cache
def _retries(*_environment: str | None) -> tuple[str, int]:
    """Mode and number of tries: the user's, from environment or profile, else ours. Cached: it reads files."""
    session = botocore.session.Session()
    mode = os.environ.get("AWS_RETRY_MODE") or session.get_scoped_config().get("retry_mode")
    return mode or "standard", session.get_config_variable("max_attempts") or ATTEMPTS

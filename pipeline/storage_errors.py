"""What an error of the storage means for the user who named the URI, and what mends it."""

from __future__ import annotations

from urllib.parse import urlsplit

from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as S3ConnectionError
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

STORAGE_ERRORS = (OSError, BotoCoreError, ClientError, ResponseParserError, ValueError, ImportError)
"""All that a storage raises over a wrong path, setting, package or credential."""


def explain(uri: str, error: Exception, endpoint: str | None) -> str:
    """What went wrong and the remedy, in one line, for one of STORAGE_ERRORS raised by using ``uri``.

    An S3 error's own text is left out: it may hold a key or a signature. ``endpoint`` is the S3 server's URL.
    """
    if uri.startswith("s3://"):
        return _explain_s3(uri, error, endpoint)
    if isinstance(error, ImportError):
        return f"a package is missing ({error})"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return f"{reason}; check the path and its permissions"


def missing_bucket(uri: str, endpoint: str | None) -> str:
    return f"there is no bucket {urlsplit(uri).netloc}{_at(endpoint)}; create it or check its name"


def _explain_s3(uri: str, error: Exception, endpoint: str | None) -> str:
    match error:
        case NoCredentialsError() | PartialCredentialsError():
            return (
                "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
                "or AWS_NO_SIGN_REQUEST=1 for a public bucket"
            )
        case S3ConnectionError() | HTTPClientError():
            return f"no answer from the S3 server{_at(endpoint)}; check AWS_ENDPOINT_URL and the network"
        case PermissionError():
            return "access refused; check the AWS credentials and that they may list, read and write here"
        case FileNotFoundError():
            return missing_bucket(uri, endpoint)
        case ValueError():
            return "AWS settings not valid; check AWS_ENDPOINT_URL (as http://host:9000) and AWS_DEFAULT_REGION"
    # s3fs turns an answer of the server into an OSError and keeps the answer as its cause.
    answer = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    code = answer.response.get("Error", {}).get("Code") if isinstance(answer, ClientError) else None
    return (
        f"the S3 server answered {code or type(error).__name__}; check the bucket's name and region "
        "(AWS_DEFAULT_REGION) and the credentials"
    )


def _at(endpoint: str | None) -> str:
    # Only host and port: the URL may carry a password.
    return f" at {urlsplit(endpoint).netloc.rpartition('@')[2]}" if endpoint else ""

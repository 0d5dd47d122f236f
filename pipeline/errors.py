"""The exceptions that jobs turn into a line for the user and an exit status."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: exit status 2. The message is one line: what is wrong, then the remedy."""


class StalledError(Exception):
    """Nothing went on any more: exit status 75, for another try may do better. The message is one line."""


def one_line(error: BaseException) -> str:
    """What is wrong, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__

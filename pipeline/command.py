"""What every command line shares: options from a dataclass, one-line errors, exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import tyro
from rich.console import Console

from pipeline.errors import StalledError, UserError

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
"""Where jobs print progress and results."""

Options = TypeVar("Options")

OK, PARTIAL_FAILURE, USER_MISTAKE, TRY_AGAIN, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit statuses. TRY_AGAIN, as sysexits.h has it: the storage or the lock was lost, or nothing went on, and the same command
may do better."""


def run(job: Callable[[Options], int], options: type[Options], description: str) -> NoReturn:
    """Parse the command line into `options`, call the job, exit with its status; a UserError is one line and status 2,
    a StalledError one and 75."""
    parsed = tyro.cli(options, description=description)
    try:
        sys.exit(job(parsed))
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(USER_MISTAKE)
    except StalledError as error:
        console.print(f"stopped: {error}; run the same command again", style="red", markup=False)
        sys.exit(TRY_AGAIN)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: run the same command again to continue", markup=False)
        sys.exit(INTERRUPTED)

"""Streams that stop coming."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from pipeline.stall import StalledError, steadily


def test_everything_comes_in_order_and_then_it_ends() -> None:
    assert list(steadily(range(1000), stall_minutes=1)) == [*range(1000)]
    assert list(steadily([None], float("inf"))) == [None]
    assert list(steadily([], float("inf"))) == []


def test_what_stops_coming_is_an_error_once_what_came_is_given() -> None:
    never = threading.Event()

    def stream() -> Iterator[int]:
        yield from range(3)
        never.wait()

    rows = steadily(stream(), stall_minutes=0.001)
    assert [*itertools.islice(rows, 3)] == [0, 1, 2]
    with pytest.raises(StalledError, match=r"^nothing was done for 0\.001 minutes$"):
        next(rows)
    never.set()


def test_slow_users_are_no_stall() -> None:
    taken = threading.Event()
    rows = steadily(iter(range(3)), stall_minutes=0.0005)
    for _ in rows:
        taken.wait(0.1)


def test_what_the_stream_raises_is_raised() -> None:
    def stream() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    rows = steadily(stream(), stall_minutes=1)
    assert next(rows) == 1
    with pytest.raises(ValueError, match="broken"):
        next(rows)

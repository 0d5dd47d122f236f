"""One run per night: a lock on the results that a second run meets, and that dies with its holder.

    RESULTS/locks/night=D.json      who holds it, since when, until when

The lock is made only where there is none and replaced only by who knows its version, each in one step of the
storage. So of many runs at once one gets it: on a local disk (and NFS with locks), and on S3 servers that know
If-None-Match and If-Match on PUT (AWS, MinIO, Ceph, SeaweedFS). On other storages it is best effort: runs that
start in the same instant may both get it, and one of them finds it lost at its next renewal.

The holder renews it every sixth of its life. A killed run's lock is free once its life has passed since the last
renewal; on S3 that is judged by the server's clock alone, elsewhere the computers' clocks must agree.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote
from uuid import uuid4

from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.storage_errors import STORAGE_ERRORS
from pipeline.stored import Stored

_RENEWALS_PER_LIFE = 6
_LONGEST_POLL_S = 5.0
_ADVICE = "try again when it has ended; the lock of a killed run expires by itself"
_CLOCK_STEP_S = 1.0  # S3 tells times in whole seconds


class LockLostError(Exception):
    """Another run took the night over, or the storage was out of reach for the whole life of the lock."""


@dataclass(frozen=True)
class Holder:
    """What the lock's file says; times with their zone."""

    token: str
    host: str
    pid: int
    since: datetime
    expires: datetime
    expiry_s: float

    def encoded(self) -> bytes:
        return json.dumps(asdict(self), indent=2, default=datetime.isoformat).encode()

    @classmethod
    def decoded(cls, data: bytes) -> Holder:
        """Raises ValueError or TypeError for what is no such file."""
        fields = json.loads(data)
        times = {name: datetime.fromisoformat(fields[name]) for name in ("since", "expires")}
        return cls(**{**fields, **times})


class NightLock:
    """A lock that is held, and renewed in a thread of its own: see :func:`hold_night`."""

    def __init__(self, file: Location, night: str, holder: Holder, asked_s: float) -> None:
        """``asked_s``: the monotonic time just before the storage was asked for the lock."""
        self.night = night
        self.holder = holder
        self._file = file
        self._deadline_s = asked_s + holder.expiry_s
        self._taken = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lock of night {night}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the lock may belong to another run by now. Once true it stays so: stop the run."""
        if time.monotonic() > self._deadline_s:
            self._taken = True
        return self._taken

    def check(self) -> None:
        """Raises LockLostError if the lock is lost."""
        if self.lost:
            raise LockLostError(
                f"the lock of night {self.night} is lost: another run took it over, or the storage was out of "
                f"reach for {self.holder.expiry_s:g} s; see {self._file}"
            )

    def release(self) -> None:
        """Stops renewing and removes the lock if it is still ours; where the storage fails, it expires."""
        self._stop.set()
        self._thread.join(timeout=max(0.0, self._deadline_s - time.monotonic()))
        if self._thread.is_alive() or self.lost:
            return
        with suppress(*STORAGE_ERRORS):
            stored = self._file.read_stored()
            if self._is_ours(stored):
                self._file.remove_if(stored.version)

    def _keep(self) -> None:
        while not self._stop.wait(self.holder.expiry_s / _RENEWALS_PER_LIFE) and not self.lost:
            # A storage that fails may be back for the next renewal; the deadline tells if it is not.
            with suppress(*STORAGE_ERRORS):
                self._renew()

    def _renew(self) -> None:
        asked_s = time.monotonic()
        try:
            stored = self._file.read_stored()
        except FileNotFoundError:
            self._taken = True
            return
        if not self._is_ours(stored):
            self._taken = True
        elif self._file.replace_if(stored.version, _renewed(self.holder).encoded()) and not self.lost:
            self._deadline_s = asked_s + self.holder.expiry_s

    def _is_ours(self, stored: Stored) -> bool:
        holder = _holder(stored)
        return holder is not None and holder.token == self.holder.token


@contextmanager
def hold_night(
    results: Location, night: str, *, wait: bool, expiry_s: float = 60.0, tell: Callable[[str], None] = lambda _: None
) -> Iterator[NightLock]:
    """Holds the lock of the night: ask ``lost`` or call ``check()`` between steps of the work.

    Another run's lock raises UserError, or with ``wait`` is waited for, however long; ``tell`` is then called once.
    ``expiry_s``: after so many seconds without renewal others may take over. Raises LockLostError at the end of
    work that did not notice.
    """
    file = results / "locks" / f"night={quote(night, safe='')}.json"
    lock = _acquire(file, night, wait=wait, expiry_s=expiry_s, tell=tell)
    try:
        yield lock
        lock.check()
    finally:
        lock.release()


def _acquire(file: Location, night: str, *, wait: bool, expiry_s: float, tell: Callable[[str], None]) -> NightLock:
    now = datetime.now(UTC)
    ours = Holder(uuid4().hex, socket.gethostname(), os.getpid(), now, now, expiry_s)
    told = False
    while True:
        asked_s = time.monotonic()
        ours = _renewed(ours)
        if file.create_bytes(ours.encoded()):
            return NightLock(file, night, ours, asked_s)
        try:
            stored = file.read_stored()
        except FileNotFoundError:  # released just now
            continue
        if _is_free(stored, expiry_s):
            if file.replace_if(stored.version, ours.encoded()):
                return NightLock(file, night, ours, asked_s)
        elif wait:
            if not told:
                tell(f"waiting: night {night} is {_description(_holder(stored), file)}")
                told = True
            time.sleep(random.uniform(0.5, 1.0) * min(expiry_s / _RENEWALS_PER_LIFE, _LONGEST_POLL_S))
        else:
            raise UserError(f"night {night} is {_description(_holder(stored), file)}: {_ADVICE}")


def _is_free(stored: Stored, expiry_s: float) -> bool:
    """Whether the lock was not renewed for its whole life; ``expiry_s`` is for a file that tells no life."""
    holder = _holder(stored)
    if stored.age_s is not None:
        return stored.age_s > (holder.expiry_s if holder else expiry_s) + _CLOCK_STEP_S
    return holder is not None and datetime.now(UTC) > holder.expires


def _renewed(holder: Holder) -> Holder:
    expires = datetime.now(UTC) + timedelta(seconds=holder.expiry_s)
    return Holder(**{**asdict(holder), "expires": expires})


def _holder(stored: Stored) -> Holder | None:
    """None for a file that is none of ours, or that is not written to its end yet."""
    try:
        return Holder.decoded(stored.data)
    except (ValueError, TypeError, KeyError):
        return None


def _description(holder: Holder | None, file: Location) -> str:
    if holder is None:
        return f"locked by {file}, which is no lock of this version: to be removed by hand if no run is under way"
    return (
        f"in work by another run (host {holder.host}, process {holder.pid}, since {holder.since:%Y-%m-%d %H:%M:%S}, "
        f"lock expires {holder.expires:%Y-%m-%d %H:%M:%S} UTC unless renewed)"
    )

"""A storage that fails, stalls and cuts off costs time but no byte; what cannot be mended is told at once."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from aiobotocore.endpoint import AioEndpoint
from botocore.exceptions import BotoCoreError

from pipeline import s3_objects, s3_options
from pipeline.archives import Archive, read_shards, read_units
from pipeline.errors import UserError
from pipeline.s3_objects import ObjectChangedError
from pipeline.storage import Location
from pipeline.storage_checks import require_exists, require_writable
from pipeline.tar_members import stream_tar
from tests.fault_proxy import BODY_FAULTS, Fault, FaultProxy, fault_proxy
from tests.s3_server import BUCKET

ALL_FAULTS: tuple[Fault, ...] = ("slow_down", "error", "reset", "lost_reply", "cut", "short", "stall")
STALL_S = 8.0


@pytest.fixture
def proxy(s3: Location, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The user reaches the bucket through a proxy that breaks what the test says; pauses between tries are short."""
    monkeypatch.setattr(s3_options, "READ_TIMEOUT_S", 2)
    monkeypatch.setattr(s3_objects, "_LONGEST_PAUSE_S", 0.05)
    sleep = AioEndpoint._sleep

    async def shortly(self: AioEndpoint, seconds: float) -> None:
        await sleep(self, min(seconds, 0.05))

    monkeypatch.setattr(AioEndpoint, "_sleep", shortly)
    with fault_proxy(server, stall_s=STALL_S) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def _put(server: str, key: str, data: bytes) -> None:
    """Writes past the proxy, as another computer does."""
    boto3.Session().client("s3", endpoint_url=server).put_object(Bucket=BUCKET, Key=key, Body=data)


def _noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# --- what passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [fault for fault in ALL_FAULTS if fault != "short"])
def test_every_operation_survives_every_fault(s3: Location, proxy: FaultProxy, fault: Fault) -> None:
    file, data = s3 / "night/a.bin", _noise(300_000)

    def broken(method: str) -> None:
        proxy.break_next(method, fault, fault)

    if fault not in BODY_FAULTS:
        broken("PUT")
    file.write_bytes(data)
    broken("GET")
    assert file.read_bytes() == data
    broken("GET")
    assert (s3 / "night").files() == [file]
    broken("GET")
    with file.open() as stream:
        stream.seek(100_000)
        assert stream.read(1000) == data[100_000:101_000]
        assert stream.seek(0) == 0
        assert stream.read() == data
    if fault not in BODY_FAULTS:
        broken("HEAD")
        assert file.size() == len(data)
        broken("DELETE")
    file.remove()
    assert not file.exists()
    assert proxy.injected[fault] == 6 if fault in BODY_FAULTS else 12


def _read(archive: Archive) -> dict[str, bytes | None]:
    shards = (shard for unit in read_units(archive) for shard in read_shards(archive, unit))
    return {member.name: member.data for shard in shards for member in shard.members}


@pytest.mark.parametrize("kinds", [ALL_FAULTS, ("cut", "short")])
def test_a_streamed_tar_arrives_byte_for_byte(
    s3: Location, proxy: FaultProxy, server: str, monkeypatch: pytest.MonkeyPatch, kinds: tuple[Fault, ...]
) -> None:
    monkeypatch.setattr("pipeline.storage.READ_BLOCK_BYTES", 200_000)
    members = {f"{number:03d}.png": _noise(100_000, number) for number in range(60)}
    _put(server, "night.tar", _tar(members))
    proxy.break_some(0.3, kinds, seed=7)
    assert _read(Archive(s3 / "night.tar", "tar", "cloth")) == members
    assert proxy.injected.total() >= 5
    assert {"cut", "short"} <= set(proxy.injected)


def test_members_of_a_zip_arrive_byte_for_byte(
    s3: Location, proxy: FaultProxy, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.READ_BLOCK_BYTES", 50_000)
    members = {f"{number:03d}.png": _noise(60_000, number) for number in range(30)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    _put(server, "night.zip", buffer.getvalue())
    proxy.break_some(0.3, ("slow_down", "error", "reset", "cut", "short"), seed=3)
    assert _read(Archive(s3 / "night.zip", "zip", "cloth")) == members
    assert proxy.injected.total() >= 5


@pytest.mark.slow
def test_a_tar_of_100_mb_arrives_byte_for_byte(
    s3: Location, proxy: FaultProxy, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_options, "READ_TIMEOUT_S", 30)  # nothing stalls here, but the computer may be busy
    data = _noise(100 * 10**6)
    _put(server, "night.tar", data)
    proxy.break_some(0.4, [fault for fault in ALL_FAULTS if fault != "stall"], seed=1)
    digest = hashlib.sha256()
    with (s3 / "night.tar").open() as stream:
        while block := stream.read(10_240):  # as tarfile asks
            digest.update(block)
    assert digest.digest() == hashlib.sha256(data).digest()
    assert proxy.injected.total() >= 4


def test_a_broken_body_is_continued_and_not_begun_anew(s3: Location, proxy: FaultProxy, server: str) -> None:
    """Each answer brings half of what is missing: more breaks than are borne without progress."""
    data = _noise(16_000_000)
    _put(server, "weights", data)
    cuts = s3_objects.MAX_BREAKS + 2
    proxy.break_next("GET", *["cut"] * cuts)
    assert (s3 / "weights").read_bytes() == data
    assert proxy.injected["cut"] == cuts


def test_an_answer_with_another_range_than_asked_for_is_not_taken(s3: Location, proxy: FaultProxy) -> None:
    data = _noise(300_000)
    (s3 / "a.bin").write_bytes(data)
    with (s3 / "a.bin").open() as stream:
        stream.seek(100_000)
        proxy.break_next("GET", "whole", "short", "whole")
        assert stream.read() == data[100_000:]
    assert proxy.injected == {"whole": 2, "short": 1}


def test_an_object_replaced_while_it_is_read_is_an_error(
    s3: Location, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.READ_BLOCK_BYTES", 10_000)
    _put(server, "night.tar", b"1" * 100_000)
    with (s3 / "night.tar").open() as stream:
        assert stream.read(1000) == b"1" * 1000
        _put(server, "night.tar", b"2" * 100_000)
        with pytest.raises(ObjectChangedError, match="changed while it was read"):
            stream.read(50_000)


def test_an_object_replaced_while_a_cut_body_is_continued_is_an_error(
    s3: Location, proxy: FaultProxy, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(server, "weights", b"1" * 100_000)
    monkeypatch.setattr(s3_objects.time, "sleep", lambda _: _put(server, "weights", b"2" * 100_000))
    proxy.break_next("GET", "cut")
    with pytest.raises(ObjectChangedError):
        (s3 / "weights").read_bytes()


def test_a_tar_replaced_while_it_is_read_is_no_damaged_archive(
    s3: Location, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.READ_BLOCK_BYTES", 10_000)
    old, new = ({f"{n}.png": _noise(2_000_000, seed + n) for n in range(3)} for seed in (0, 10))
    _put(server, "night.tar", _tar(old))
    reading = stream_tar(s3 / "night.tar")
    entry, read = next(reading)
    assert read(entry) == old["0.png"]
    _put(server, "night.tar", _tar(new))
    with pytest.raises(ObjectChangedError):
        list(reading)


# --- what does not pass ---------------------------------------------------------------------------


def test_a_missing_file_is_told_by_one_request(s3: Location, proxy: FaultProxy) -> None:
    with pytest.raises(FileNotFoundError):
        (s3 / "missing").read_bytes()
    assert sum(proxy.requests.values()) == 1


@pytest.mark.parametrize("fault", ["slow_down", "error", "reset", "cut", "stall"])
def test_a_server_that_never_recovers_is_an_error_after_a_bounded_number_of_tries(
    s3: Location, proxy: FaultProxy, server: str, fault: Fault
) -> None:
    _put(server, "a", _noise(10_000))
    proxy.break_some(1.0, [fault], seed=0)
    with pytest.raises((OSError, BotoCoreError)):
        (s3 / "a").read_bytes()
    assert s3_options.ATTEMPTS <= sum(proxy.requests.values()) <= 2 * s3_options.ATTEMPTS


@pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
def test_the_users_own_number_of_tries_and_mode_win(
    s3: Location, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_RETRY_MODE", mode)
    proxy.break_some(1.0, ["error"], seed=0)
    with pytest.raises(OSError, match="injected"):
        (s3 / "a").read_bytes()
    assert sum(proxy.requests.values()) == 2


def test_the_profiles_number_of_tries_wins(
    s3: Location, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\nmax_attempts = 3\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    proxy.break_some(1.0, ["error"], seed=0)
    with pytest.raises(OSError, match="injected"):
        (s3 / "a").read_bytes()
    assert sum(proxy.requests.values()) == 3


# --- writing only if nobody else did --------------------------------------------------------------


@pytest.mark.parametrize("on", ["local", "s3", "seaweed_s3"])
def test_files_are_made_replaced_and_removed_only_if_nobody_else_did(
    on: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = Location.parse(tmp_path) if on == "local" else request.getfixturevalue(on)
    file = base / "locks/a b.json"
    assert not file.replace_if("0", b"none") and not file.remove_if("0")
    assert file.create_bytes(b"first")
    assert not file.create_bytes(b"second")
    first = file.read_stored()
    assert first.data == b"first"
    assert first.age_s is not None and -1.5 < first.age_s < 30
    assert file.replace_if(first.version, b"third")
    assert not file.replace_if(first.version, b"fourth")
    assert not file.remove_if(first.version)
    assert file.read_bytes() == b"third"
    assert file.remove_if(file.read_stored().version)
    assert base.files(recursive=True) == []


def test_a_disk_without_hard_links_makes_files_exclusively_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", refuse)
    file = Location.parse(tmp_path / "lock")
    assert file.create_bytes(b"first")
    assert not file.create_bytes(b"second")
    assert file.read_bytes() == b"first"


def test_other_storages_look_first() -> None:
    file = Location.parse("memory://locks/a")
    assert file.create_bytes(b"first")
    assert not file.create_bytes(b"second")
    version = file.read_stored().version
    assert file.replace_if(version, b"third")
    assert not file.replace_if(version, b"fourth") and not file.remove_if(version)
    assert file.remove_if(file.read_stored().version)
    assert not file.exists()


@pytest.mark.parametrize("fault", ["reset", "lost_reply", "error"])
def test_a_write_whose_answer_was_lost_is_known_as_ours(s3: Location, proxy: FaultProxy, fault: Fault) -> None:
    """The repeated request is refused, because the first one took effect."""
    proxy.break_next("PUT", fault)
    assert (s3 / "lock").create_bytes(b"ours")
    proxy.break_next("PUT", fault)
    assert not (s3 / "lock").create_bytes(b"theirs")
    proxy.break_next("PUT", fault)
    assert (s3 / "lock").replace_if((s3 / "lock").read_stored().version, b"ours again")
    assert proxy.injected[fault] == 3


# --- what a user reads ----------------------------------------------------------------------------


def _mistakes(location: Location) -> list[str]:
    """What the user reads from each check that fails: one line, without secrets, after a handful of requests."""
    messages = []
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as network:
        network.setenv("AWS_ENDPOINT_URL", proxy.url)
        for check in (lambda: require_exists(location, "archives"), lambda: require_writable(location)):
            proxy.requests.clear()
            try:
                check()
            except UserError as error:
                messages.append(str(error))
            assert 1 <= proxy.requests.total() <= 4
    assert all("\n" not in message and "secret" not in message and str(location) in message for message in messages)
    return messages


def test_the_owner_of_a_real_server_reads_and_writes(seaweed_s3: Location) -> None:
    assert _mistakes(seaweed_s3) == []
    (seaweed_s3 / "night/a.bin").write_bytes(b"pixels")
    assert (seaweed_s3 / "night").files() == [seaweed_s3 / "night/a.bin"]
    with (seaweed_s3 / "night/a.bin").open() as stream:
        assert stream.read() == b"pixels"


def test_wrong_key_and_wrong_secret(seaweed_s3: Location, seaweed, seaweed_user) -> None:
    key, _ = seaweed.key("owner")
    for wrong in (("NOBODY", "owner-secret"), (key, "other-secret")):
        seaweed_user(*wrong)
        messages = _mistakes(seaweed_s3)
        assert len(messages) == 2
        assert all("check the AWS credentials" in message for message in messages)


def test_missing_bucket_of_a_real_server(seaweed_s3: Location) -> None:
    messages = _mistakes(Location.parse("s3://no-such-bucket/night"))
    assert len(messages) == 2
    assert all("there is no bucket no-such-bucket" in message for message in messages)


def test_credentials_that_may_only_read(seaweed_s3: Location, seaweed, seaweed_user) -> None:
    (seaweed_s3 / "night/a.bin").write_bytes(b"pixels")
    seaweed_user(*seaweed.key("reader"))
    (message,) = _mistakes(seaweed_s3 / "night")
    assert message.startswith("cannot write to")
    assert "check the AWS credentials and that they may list, read and write here" in message
    assert (seaweed_s3 / "night/a.bin").read_bytes() == b"pixels"


def test_a_real_server_behind_a_faulty_network(seaweed_s3: Location, seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed requests are signed anew with each try."""
    monkeypatch.setattr("pipeline.storage.READ_BLOCK_BYTES", 100_000)
    data = _noise(2_000_000)
    with fault_proxy(seaweed.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.break_next("PUT", "slow_down", "lost_reply")
        (seaweed_s3 / "a.bin").write_bytes(data)
        proxy.break_next("GET", "cut", "reset", "short")
        with (seaweed_s3 / "a.bin").open() as stream:
            assert stream.read(1_000_000) + stream.read() == data
        assert proxy.injected == {"slow_down": 1, "lost_reply": 1, "cut": 1, "reset": 1, "short": 1}


def test_a_server_without_conditional_writes_is_looked_at_first(seaweed_s3: Location, seaweed, monkeypatch) -> None:
    with fault_proxy(seaweed.url) as proxy:
        proxy.knows_conditions = False
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        file = seaweed_s3 / "lock"
        assert file.create_bytes(b"a")
        assert not file.create_bytes(b"b")
        version = file.read_stored().version
        assert file.replace_if(version, b"c")
        assert not file.replace_if(version, b"d")
        assert not file.remove_if(version)
        assert file.read_bytes() == b"c"
        assert file.remove_if(file.read_stored().version)
        assert not file.exists()

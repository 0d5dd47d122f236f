"""Finding archives and streaming them: complete, deterministic, and never stopped by what is in them."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import os
import pickle
import random
import re
import struct
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from pipeline import archive_members, unpacking
from pipeline.archives import Archive, Member, Shard, find_archives, image_id, read_units
from pipeline.archives import read_shards as read_unit
from pipeline.errors import UserError
from pipeline.images import ImageError, decode, encode_png
from pipeline.storage import Location

Files = Sequence[tuple[str, bytes]]
Write = Callable[[Path, Files], Path]


def png(seed: int, side: int = 24) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def some_images(count: int) -> Files:
    return [(f"good/{index:03d}.png", png(index)) for index in range(count)]


def tar_bytes(files: Files, mode: str = "w", tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tar_format) as tar:  # type: ignore[call-overload]
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(folder: Path, files: Files) -> Path:
    path = folder / "night.tar"
    path.write_bytes(tar_bytes(files))
    return path


def write_tar_gz(folder: Path, files: Files) -> Path:
    path = folder / "night.tar.gz"
    path.write_bytes(tar_bytes(files, "w:gz"))
    return path


def write_zip(folder: Path, files: Files) -> Path:
    path = folder / "night.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return path


def write_folder(folder: Path, files: Files) -> Path:
    for name, data in files:
        path = folder / "loose" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "loose"


def write_tar_zst(folder: Path, files: Files) -> Path:
    path = folder / "night.tar.zst"
    path.write_bytes(zstd(tar_bytes(files)))
    return path


def zstd(data: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


every_kind = pytest.mark.parametrize("write", [write_tar, write_tar_gz, write_tar_zst, write_zip, write_folder])
every_file_kind = pytest.mark.parametrize("write", [write_tar, write_tar_gz, write_tar_zst, write_zip])


def found(path: Path) -> Archive:
    (archive,) = find_archives([str(path)], category="bottle")
    return archive


def read_shards(archive: Archive, *, skip: Container[str] = (), **limits: int) -> Iterator[Shard]:
    """The whole archive, one unit after the other."""
    for unit in read_units(archive, **limits):
        yield from read_unit(archive, unit, skip=skip, **limits)


def list_members(archive: Archive) -> list[Member]:
    return [member for shard in read_shards(archive, shard_images=3) for member in shard.members]


def members_of(path: Path) -> list[Member]:
    return list_members(found(path))


def codes(members: list[Member]) -> dict[str, str]:
    return {member.name: member.failure.error for member in members if member.failure}


def images(members: list[Member]) -> list[tuple[str, bytes]]:
    return [(member.name, member.data) for member in members if member.data is not None]


def assert_ends_in_damage(members: list[Member]) -> None:
    last = members[-1]
    assert last.name == ""
    assert last.data is None
    assert last.failure is not None
    assert (last.failure.stage, last.failure.error) == ("archive", "archive_damaged")
    assert last.failure.detail
    assert "\n" not in last.failure.detail


# --- Finding


def test_finds_archives_and_loose_images_in_a_tree(tmp_path: Path) -> None:
    for folder in ("category=bottle", "category=grid/deep", "cable", "photos", ".cache", "__MACOSX"):
        (tmp_path / folder).mkdir(parents=True)
    write_tar(tmp_path / "category=bottle", some_images(1))
    write_zip(tmp_path / "category=grid/deep", some_images(1))
    write_tar_gz(tmp_path / "cable", some_images(1))
    write_tar(tmp_path / ".cache", some_images(1))
    (tmp_path / "cable/._night.tar.gz").write_bytes(b"x")
    for name in (
        "photos/a.png",
        "b.JPG",
        "category=bottle/c.png",
        "category=grid/deep/d.png",
        "__MACOSX/e.png",
    ):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "cable/manifest.json").write_text("{}")

    archives = find_archives([str(tmp_path)], category=None)

    root = str(tmp_path)
    assert [(a.location.uri.removeprefix(root), a.kind, a.category) for a in archives] == [
        ("", "folder", tmp_path.name),
        ("/cable/night.tar.gz", "tar", "cable"),
        ("/category=bottle", "folder", "bottle"),
        ("/category=bottle/night.tar", "tar", "bottle"),
        ("/category=grid", "folder", "grid"),
        ("/category=grid/deep/night.zip", "zip", "grid"),
    ]
    loose = [name for a in archives if a.kind == "folder" for name, _ in images(list_members(a))]
    assert loose == ["b.JPG", "photos/a.png", "c.png", "deep/d.png"]
    assert {a.category for a in find_archives([str(tmp_path)], category="pill")} == {"pill"}


def test_nothing_is_found_twice(tmp_path: Path) -> None:
    tar = write_tar(tmp_path, some_images(1))
    (tmp_path / "inner").mkdir()
    for name in ("a.png", "inner/b.png"):
        (tmp_path / name).write_bytes(png(0))
    once = find_archives([str(tmp_path)], category=None)
    uris = [str(tmp_path / "inner"), str(tar), f"{tmp_path}/", f"file://{tar}", str(tmp_path)]
    assert find_archives(uris, category=None) == once
    assert [a.kind for a in once] == ["folder", "tar"]


def test_category_is_the_innermost_part_of_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "category=old" / "category=new" / "2024"
    folder.mkdir(parents=True)
    tar = write_tar(folder, some_images(1))
    (archive,) = find_archives([str(tar)], category=None)
    assert archive.category == "new"


def test_suffix_in_capitals_is_an_archive(tmp_path: Path) -> None:
    tar = write_tar(tmp_path, some_images(2))
    upper = tar.rename(tmp_path / "NIGHT.TAR")
    assert len(images(members_of(upper))) == 2


def test_user_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no archive")
    for path in (tmp_path / "absent.tar", tmp_path / "empty", tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=path.name) as caught:
            find_archives([str(path)], category=None)
        assert "\n" not in str(caught.value)


def test_names_are_safe_stable_and_distinct() -> None:
    uris = [
        "/a/night.tar",
        "/b/night.tar",
        "/a/_ ünïcode & co.tar.gz",
        "/a/...tar",
        "/a/" + "x" * 240 + ".zip",
    ]
    names = [Archive(Location.parse(uri), "tar", "bottle").name for uri in uris]
    assert names[0] == "night.tar-74255e6c"
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}-[0-9a-f]{8}", name) for name in names)


def test_image_id_tells_archives_and_members_apart() -> None:
    pairs = [
        ("s3://b/a.tar", "x.png"),
        ("s3://b/a.tar", "y.png"),
        ("s3://b/b.tar", "x.png"),
        ("s3://b/a", ".tarx.png"),
    ]
    ids = [image_id(*pair) for pair in pairs]
    assert len(set(ids)) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    assert ids[0] == image_id("s3://b/a.tar", "x.png") == "c6a3938ca1ae3f84a95c4cbb58bc566a"


# --- Shards


@every_kind
def test_every_file_comes_out_once_in_order(tmp_path: Path, write: Write) -> None:
    files = some_images(10)
    archive = found(write(tmp_path, files))
    shards = list(read_shards(archive, shard_images=4))
    assert [len(shard.members) for shard in shards] == [4, 4, 2]
    assert [shard.name for shard in shards] == [f"{archive.name}-{index:05d}" for index in range(3)]
    assert [(m.name, m.data) for shard in shards for m in shard.members] == list(files)
    assert list(read_shards(archive, shard_images=4)) == shards


@every_kind
def test_shards_close_before_they_exceed_their_bytes(tmp_path: Path, write: Write) -> None:
    big = png(99, side=100)
    files = [("0.png", png(0)), ("1.png", png(1)), ("2.png", big), ("3.png", png(3)), ("4.png", png(4))]
    limit = len(png(0)) + len(png(1))
    shards = list(read_shards(found(write(tmp_path, files)), shard_bytes=limit))
    assert [[m.name for m in shard.members] for shard in shards] == [
        ["0.png", "1.png"],
        ["2.png"],
        ["3.png", "4.png"],
    ]


def test_a_bomb_is_not_read_and_moves_no_cut(tmp_path: Path) -> None:
    files = [("0.png", png(0)), ("1.png", bytes(2**24)), ("2.png", png(2))]
    shards = list(read_shards(found(write_zip(tmp_path, files)), shard_bytes=2**20))
    assert [[m.name for m in shard.members] for shard in shards] == [["0.png"], ["1.png"], ["2.png"]]
    assert codes(list(shards[1].members)) == {"1.png": "zip_bomb"}


@every_kind
def test_finished_shards_are_left_out_and_the_others_stay_as_they_were(tmp_path: Path, write: Write) -> None:
    files = [*some_images(5), ("good/notes.txt", b"text"), ("good/zero.png", b""), ("z.png", png(9))]
    archive = found(write(tmp_path, files))
    shards = list(read_shards(archive, shard_images=3))
    assert len(shards) == 3
    for skipped in range(8):
        finished = {shard.name for shard in shards if skipped >> shard.index & 1}
        rest = [shard for shard in shards if shard.name not in finished]
        assert list(read_shards(archive, shard_images=3, skip=finished)) == rest


def test_skipping_does_not_move_the_damage(tmp_path: Path) -> None:
    for path in (write_tar(tmp_path, some_images(10)), write_tar_gz(tmp_path, some_images(10))):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        archive = found(path)
        shards = list(read_shards(archive, shard_images=2))
        assert_ends_in_damage(list(shards[-1].members))
        for shard in shards:
            rest = [other for other in shards if other != shard]
            assert list(read_shards(archive, shard_images=2, skip={shard.name})) == rest


def test_reads_from_object_storage_as_from_disk(tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    for write in (write_tar, write_tar_gz, write_tar_zst, write_zip, write_folder):
        path = write(tmp_path, some_images(5))
        storage.put(str(path), f"/bucket/category=pill/{path.name}", recursive=True)
    try:
        archives = find_archives(["memory://bucket"], category=None)
        assert [(a.kind, a.category) for a in archives] == [(k, "pill") for k in ("folder", "tar", "tar", "tar", "zip")]
        contents = [[data for _, data in images(list_members(archive))] for archive in archives]
        assert contents == [[data for _, data in some_images(5)]] * 5
    finally:
        storage.rm("/bucket", recursive=True)


# --- What is no image

ODD_FILES: Files = [
    ("a.png", png(0)),
    ("notes.txt", b"text"),
    ("labels/index.csv", b"a,b"),
    ("zero.png", b""),
    (".DS_Store", b"x"),
    ("deep/._a.png", b"x"),
    ("__MACOSX/a.png", b"x"),
    ("deep/b.JPEG", png(1)),
]


@every_kind
def test_no_file_is_lost_without_a_word(tmp_path: Path, write: Write) -> None:
    members = members_of(write(tmp_path, ODD_FILES))
    assert sorted(name for name, _ in images(members)) == ["a.png", "deep/b.JPEG"]
    assert codes(members) == {
        "notes.txt": "not_an_image_name",
        "labels/index.csv": "not_an_image_name",
        "zero.png": "empty_file",
    }
    assert {m.failure.stage for m in members if m.failure} == {"member"}


@every_file_kind
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_paths_that_lead_out_and_names_that_repeat(tmp_path: Path, write: Write) -> None:
    files = [
        ("a.png", png(0)),
        ("a.png", png(1)),
        ("/etc/b.png", png(2)),
        ("x/../../c.png", png(3)),
        ("..\\d.png", png(4)),
        ("C:\\e.png", png(5)),
        ("./f..g.png", png(6)),
    ]
    members = members_of(write(tmp_path, files))
    assert len(members) == len(files)
    assert images(members) == [("a.png", png(0)), ("./f..g.png", png(6))]
    assert Counter(m.failure.error for m in members if m.failure) == {"duplicate_name": 1, "unsafe_path": 4}


def test_tar_links_and_devices_are_failures(tmp_path: Path) -> None:
    path = tmp_path / "night.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [
            ("folder", tarfile.DIRTYPE),
            ("symbolic.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ]:
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    names = ["symbolic.png", "hard.png", "device.png", "pipe.png"]
    assert codes(members_of(path)) == dict.fromkeys(names, "unsupported_member")


def test_zip_links_encryption_and_rare_compression_are_failures(tmp_path: Path) -> None:
    path = tmp_path / "night.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("rare.png", png(0), zipfile.ZIP_LZMA)
        archive.writestr("secret.png", png(1))
        archive.writestr("folder/", b"")
        archive.writestr("plain.png", png(2))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.rindex(b"rare.png"))
    assert data[entry + 46 :].startswith(b"secret.png")
    data[entry + 8] |= 1
    path.write_bytes(data)
    members = members_of(path)
    assert codes(members) == dict.fromkeys(["link.png", "rare.png", "secret.png"], "unsupported_member")
    assert images(members) == [("plain.png", png(2))]


@every_kind
def test_too_large_members_are_not_read(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "MAX_MEMBER_BYTES", len(png(0)) + 100)
    files = [("0.png", png(0)), ("1.png", png(1, side=200)), ("2.png", png(2))]
    members = members_of(write(tmp_path, files))
    assert codes(members) == {"1.png": "member_too_large"}
    assert images(members) == [files[0], files[2]]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_names_long_and_not_utf8(tmp_path: Path, tar_format: int) -> None:
    path = tmp_path / "night.tar"
    long = "folder/" * 40 + "bild-ü.png"
    path.write_bytes(tar_bytes([(long, png(0)), ("bad-\udcff.png", png(1))], tar_format=tar_format))
    members = members_of(path)
    assert [name for name, _ in images(members)] == [long, r"bad-\xff.png"]
    assert all(member.name.encode("utf-8") for member in members)


def test_folder_with_a_link_to_nothing_and_a_pipe(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, some_images(2))
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    members = members_of(folder)
    assert len(images(members)) == 2
    assert codes(members) == {"gone.png": "unreadable", "pipe.png": "empty_file"}


@every_file_kind
@pytest.mark.parametrize("files", [[], [(".DS_Store", b"x")]])
def test_an_archive_without_files_says_so(tmp_path: Path, write: Write, files: Files) -> None:
    assert codes(members_of(write(tmp_path, files))) == {"": "empty_archive"}


# --- Damage


@every_file_kind
@pytest.mark.parametrize("content", [b"", b"x", b"this is no archive\n" * 1000, bytes(100), b"\x1f\x8b\x08"])
def test_unreadable_archive_is_one_shard_with_one_failure(tmp_path: Path, write: Write, content: bytes) -> None:
    path = write(tmp_path, [])
    path.write_bytes(content)
    (shard,) = read_shards(found(path))
    (member,) = shard.members
    assert_ends_in_damage([member])


@pytest.mark.parametrize("write", [write_tar, write_tar_gz, write_tar_zst])
def test_cut_tar_gives_all_before_the_cut_and_says_so(tmp_path: Path, write: Write) -> None:
    files = some_images(8)
    whole = write(tmp_path, files).read_bytes()
    path = write(tmp_path, [])
    # A tar ends in padding that nobody misses.
    end = len(whole.rstrip(b"\0")) if write is write_tar else len(whole)
    complete = []
    for cut in range(0, end, 331):
        path.write_bytes(whole[:cut])
        members = members_of(path)
        assert_ends_in_damage(members)
        assert images(members) == list(files)[: len(images(members))]
        complete.append(len(images(members)))
    assert complete == sorted(complete)
    if write is not write_tar_zst:  # which unpacks 128 KiB or nothing
        assert set(complete) >= set(range(8))
        assert complete[len(complete) // 2] in (3, 4)


def test_cut_between_two_members_is_damage_too(tmp_path: Path) -> None:
    path = write_tar(tmp_path, some_images(3))
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:third])
    members = members_of(path)
    assert len(images(members)) == 2
    assert_ends_in_damage(members)


@pytest.mark.parametrize("filler", [b"\0", b"\xaa"])
def test_hole_in_a_tar_is_no_proper_end(tmp_path: Path, filler: bytes) -> None:
    path = write_tar(tmp_path, some_images(6))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[2].offset
    data[start : start + 4096] = filler * 4096
    path.write_bytes(data)
    members = members_of(path)
    assert images(members) == list(some_images(2))
    assert_ends_in_damage(members)


def test_gzip_in_several_parts_and_gzip_without_its_suffix(tmp_path: Path) -> None:
    tar = tar_bytes(some_images(6))
    half = len(tar) // 2
    path = tmp_path / "night.tar"
    path.write_bytes(gzip.compress(tar[:half]) + gzip.compress(tar[half:]))
    assert images(members_of(path)) == list(some_images(6))


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_all_that_is_unpacked_before_damage_is_given(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    files = some_images(4)
    tar = tar_bytes(files)
    ends = [tar.index(name.encode()) + 512 + len(data) for name, data in files]
    path = tmp_path / "night.tar"
    for count, end in enumerate(ends, start=1):
        for first in (end - 1, end):
            path.write_bytes(pack(tar[:first]) + b"no frame")
            assert images(members_of(path)) == list(files)[: count - (first < end)]
            assert_ends_in_damage(members_of(path))


def test_what_unpacks_without_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "night.tar.zst"
    path.write_bytes(zstd(tar_bytes(some_images(2))) + zstd(bytes(2**25)))
    monkeypatch.setattr(unpacking, "FREE_BYTES", 2**20)
    members = members_of(path)
    assert images(members) == list(some_images(2))
    assert codes(members) == {"": "archive_bomb"}
    monkeypatch.setattr(unpacking, "FREE_BYTES", 2**26)
    assert codes(members_of(path)) == {}


def test_wrong_gzip_checksum_is_reported(tmp_path: Path) -> None:
    path = write_tar_gz(tmp_path, some_images(3))
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    members = members_of(path)
    assert images(members) == list(some_images(3))
    assert_ends_in_damage(members)


def test_a_damaged_zip_member_does_not_harm_the_others(tmp_path: Path) -> None:
    path = write_zip(tmp_path, some_images(3))
    data = bytearray(path.read_bytes())
    position = data.index(b"good/001.png") + 400
    data[position : position + 20] = b"x" * 20
    path.write_bytes(data)
    members = members_of(path)
    assert codes(members) == {"good/001.png": "member_damaged"}
    assert images(members) == [some_images(3)[0], some_images(3)[2]]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, -1, 2**31, 2**62, 2**80])
def test_tar_header_that_lies_about_its_size(tmp_path: Path, kind: bytes, size: int) -> None:
    block = bytearray(tar_bytes([("a.png", png(0))], tar_format=tarfile.GNU_FORMAT))
    block[124:136] = (size % 2**88).to_bytes(12, "big")
    block[124] = 0xFF if size < 0 else 0x80
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    path = tmp_path / "night.tar"
    path.write_bytes(block)
    members = members_of(path)
    assert images(members) == []
    assert_ends_in_damage(members)


@every_file_kind
def test_any_bytes_end_in_members_and_failures(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, some_images(4))
    whole = path.read_bytes()
    sound = dict(some_images(4))
    chance = random.Random(0)
    outcomes = Counter[str]()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 5)):
            data[chance.choice([chance.randrange(len(data)), chance.randrange(512), -chance.randint(1, 300)])] = (
                chance.randrange(256)
            )
        path.write_bytes(data)
        members = members_of(path)
        assert all((member.data is None) != (member.failure is None) for member in members)
        outcomes.update(codes(members).values())
        outcomes["sound"] += sum(sound.get(name) == data for name, data in images(members))
    assert outcomes["sound"] > 20
    assert sum(outcomes.values()) > outcomes["sound"]


class FailingFile(io.BytesIO):
    """A file on a storage whose connection breaks at the byte ``breaks_at``, and works again when asked again."""

    breaks_at = 0

    def read(self, size: int | None = -1) -> bytes:
        end = len(self.getvalue()) if size is None or size < 0 else self.tell() + size
        if self.tell() <= self.breaks_at < end:
            self.breaks_at = -1
            raise ConnectionResetError("the network is gone")
        return super().read(size)


@every_file_kind
@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
def test_errors_of_the_storage_are_raised_and_not_taken_for_damage(
    tmp_path: Path, write: Write, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, [(f"{index}.png", png(index, side=200)) for index in range(12)])

    def open_failing(self: Location) -> BinaryIO:
        file = FailingFile(path.read_bytes())
        file.breaks_at = int(len(file.getvalue()) * part)
        return file

    archive = found(path)
    monkeypatch.setattr(Location, "open", open_failing)
    shards = read_shards(archive, shard_images=2)
    if part == 0.99 and write is not write_zip:
        # Streamed: what lies far before the break is there by now.
        assert images(list(next(shards).members)) == [(f"{n}.png", png(n, side=200)) for n in range(2)]
    with pytest.raises(ConnectionResetError):
        list(shards)
    path.unlink()
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        list(read_shards(archive))


def test_a_unit_reads_no_more_of_a_zip_than_its_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(f"{index}.png", png(index, side=100)) for index in range(12)]
    archive = found(write_zip(tmp_path, files))
    units = read_units(archive, shard_images=3)
    whole = Path(archive.location.uri).read_bytes()
    read: list[tuple[int, int]] = []

    class Noting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            start = self.tell()
            data = super().read(size)
            read.append((start, self.tell()))
            return data

    monkeypatch.setattr(Location, "open", lambda self: Noting(whole))
    ranges = []
    for number in (2, 0, 3, 1):  # in any order, on any worker
        unit = pickle.loads(pickle.dumps(units[number]))
        (shard,) = read_unit(archive, unit, shard_images=3)
        assert images(list(shard.members)) == files[3 * number : 3 * number + 3]
        ranges.append((min(start for start, _ in read), max(end for _, end in read)))
        read.clear()
    assert sorted(ranges) == [ranges[1], ranges[3], ranges[0], ranges[2]]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(ranges)))


def test_listing_a_large_zip_takes_the_memory_of_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "night.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(20_000):
            archive.writestr(f"{index:06d}.png", b"x")
    tracemalloc.start()
    try:
        units = read_units(found(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(unit.entries or ()) for unit in units) == 20_000
    assert peak < 20_000 * 3000


def test_a_folder_on_object_storage_is_one_listing(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = s3 / "night"
    files = [*some_images(3), ("[1]*.png", png(8)), ("category=other/x.png", png(9)), ("x.tar", b"x")]
    for name, data in files:
        (folder / name).write_bytes(data)
    archive = Archive(folder, "folder", "bottle")
    listed = Archive(folder, "folder", "bottle", members=("good/002.png", "good/gone.png"))
    marks = "\n".join(f"{file.uri} {file.fingerprint()}" for file in (folder / name for name, _ in sorted(files[:4])))

    def one_by_one(self: Location) -> None:
        raise AssertionError(f"asked for {self} alone")

    for method in ("size", "fingerprint"):
        monkeypatch.setattr(Location, method, one_by_one)
    # What results of earlier runs are filed under.
    assert archive.fingerprinted().fingerprint == hashlib.sha256(marks.encode()).hexdigest()
    assert images(list_members(archive)) == sorted(files[:4])
    assert listed.fingerprinted().fingerprint not in ("", archive.fingerprinted().fingerprint)
    assert images(list_members(listed)) == [files[2]]
    assert codes(list_members(listed)) == {"good/gone.png": "unreadable"}


def test_a_loose_file_that_goes_away_is_a_failure_and_a_refusal_is_not(
    s3: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in some_images(3):
        (s3 / "night" / name).write_bytes(data)
    archive = Archive(s3 / "night", "folder", "bottle")
    (unit,) = read_units(archive)
    (s3 / "night/good/001.png").remove()
    (shard,) = read_unit(archive, unit)
    assert codes(list(shard.members)) == {"good/001.png": "member_damaged"}
    assert len(images(list(shard.members))) == 2

    def refused(self: Location) -> bytes:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Location, "read_bytes", refused)
    with pytest.raises(PermissionError):
        list(read_unit(archive, unit))


# Where the end record of a zip says how long the directory is, and where it starts.
@pytest.mark.parametrize("field", [12, 16])
def test_zip_whose_offsets_lead_before_its_start(tmp_path: Path, field: int) -> None:
    path = write_zip(tmp_path, some_images(2))
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + field : end + field + 4] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    members = members_of(path)
    assert members
    assert images(members) == []


@pytest.mark.skipif("DEFECTMAP_MVTEC_ROOT" not in os.environ, reason="needs photographs of MVTec AD")
def test_real_photographs_decode() -> None:
    root = os.environ["DEFECTMAP_MVTEC_ROOT"]
    decoded = 0
    for archive in find_archives([root], category=None):
        for shard in read_shards(archive):
            for member in shard.members:
                if member.data is not None:
                    try:
                        decoded += decode(member.data).ndim == 3
                    except ImageError as error:
                        pytest.fail(f"{archive.name} {member.name}: {error}")
    assert decoded


def test_a_folder_may_list_the_files_that_belong_to_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"bytes of " + name.encode())
    archive = Archive(Location.parse(tmp_path), "folder", "brick", members=("c.png", "a.png"))
    (shard,) = read_shards(archive)
    assert [member.name for member in shard.members] == ["c.png", "a.png"]
    assert archive.name != Archive(Location.parse(tmp_path), "folder", "brick").name


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_the_fingerprint_follows_the_content(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"one")
    file = tmp_path / "x.tar"
    file.write_bytes(b"one")
    archive = Archive(Location.parse(folder if kind == "folder" else file), kind, "brick")  # type: ignore[arg-type]
    before = archive.fingerprinted()
    assert before.fingerprint == archive.fingerprinted().fingerprint != ""
    (folder / "a.png").write_bytes(b"other")
    file.write_bytes(b"other")
    after = archive.fingerprinted()
    assert after.fingerprint != before.fingerprint
    assert after.name == before.name

"""Zips that are damaged, odd or hostile, for the corpus of bad inputs."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from tests.made_archives import Files, flipped, in_directory, photograph, tar, with_bytes, zipped

DAMAGED = ("archive", "archive_damaged")
UNSUPPORTED = ("member", "unsupported_member")
DAMAGED_MEMBER = ("member", "member_damaged")


def bad_zips(good: Files) -> Iterator[tuple[Any, ...]]:
    """Name, bytes, number of good images, and stage and code of each failure, of every kind."""
    yield from _odd_members(good)
    yield from _damaged_members(good)
    yield from _damaged_archives(good)


def _odd_members(good: Files) -> Iterator[tuple[Any, ...]]:
    image = photograph(7)
    sound = zipped([*good, ("a.png", image)])
    record = in_directory(sound, "a.png")
    yield "zip_encrypted", with_bytes(sound, record + 8, b"\x01"), 3, UNSUPPORTED
    yield "zip_strongly_encrypted", with_bytes(sound, record + 8, b"\x41"), 3, UNSUPPORTED
    yield "zip_unknown_method", with_bytes(sound, record + 10, struct.pack("<H", 99)), 3, UNSUPPORTED
    yield "zip_lzma", _with(good, zipfile.ZipInfo("a.png"), image, zipfile.ZIP_LZMA), 3, UNSUPPORTED
    link = zipfile.ZipInfo("a.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    yield "zip_symbolic_link", _with(good, link, b"good/0.png"), 3, UNSUPPORTED
    pipe = zipfile.ZipInfo("a.png")
    pipe.create_system, pipe.external_attr = 3, 0o010644 << 16
    yield "zip_named_pipe", _with(good, pipe, b""), 3, UNSUPPORTED
    for kind, name in [("absolute", "/etc/a.png"), ("upwards", "../a.png"), ("windows", "C:\\a.png")]:
        yield f"zip_path_{kind}", zipped([*good, (name, image)]), 3, ("member", "unsafe_path")
    yield "zip_zero_bytes_member", zipped([*good, ("a.png", b"")]), 3, ("member", "empty_file")
    twice = zipped([*good, ("good/X.png", image)]).replace(b"good/X.png", b"good/1.png")
    yield "zip_name_twice", twice, 3, ("member", "duplicate_name")
    # zipfile writes cp437 names as UTF-8: the bytes of a foreign packer are put in afterwards.
    yield "zip_name_in_cp437", zipped([*good, ("gr__e.png", image)]).replace(b"gr__e", b"gr\x94\xe1e"), 4
    broken = zipped([*good, ("gr\u00f6\u00dfe.png", image)]).replace("gr\u00f6\u00df".encode(), b"gr\xf6\xdf\xff\xff")
    yield "zip_name_not_utf8", broken, 4
    yield "zip_name_with_newline", zipped([*good, ("new\nline.png", image)]), 4
    yield "zip_bomb", zipped([*good, ("a.png", bytes(2**24))]), 3, ("member", "zip_bomb")
    yield "zip_overlapping", _overlapping(40), 0, *[("member", "overlapping_member")] * 39, DAMAGED_MEMBER
    too_large = with_bytes(sound, record + 24, struct.pack("<I", 2**30))
    yield "zip_member_too_large", too_large, 3, ("member", "member_too_large")


def _damaged_members(good: Files) -> Iterator[tuple[Any, ...]]:
    image = photograph(7)
    sound = zipped([*good, ("a.png", image)])
    record, member = in_directory(sound, "a.png"), sound.index(b"a.png") - 30
    packed = member + 30 + len("a.png")
    part = image[:-1]
    of_a_part = with_bytes(sound, record + 16, struct.pack("<I", zlib.crc32(part)))
    of_a_part = with_bytes(of_a_part, record + 24, struct.pack("<I", len(part)))
    for kind, content in [
        ("wrong_crc", flipped(sound, record + 16)),
        ("damaged_data", with_bytes(sound, packed + 300, b"x" * 50)),
        ("broken_deflate", with_bytes(sound, packed, b"\xff" * 9)),
        ("more_than_declared", with_bytes(sound, record + 24, struct.pack("<I", len(image) - 1))),
        ("part_declared_as_all", of_a_part),
        ("less_than_declared", with_bytes(sound, record + 24, struct.pack("<I", len(image) + 1))),
        ("wrong_place", with_bytes(sound, record + 42, struct.pack("<I", 7))),
        ("place_of_another", with_bytes(sound, record + 42, struct.pack("<I", 0))),
        ("place_behind_the_end", with_bytes(sound, record + 42, struct.pack("<I", 2**31))),
        ("other_name_inside", with_bytes(sound, member + 30, b"b.png")),
        ("no_header_inside", with_bytes(sound, member, b"none")),
    ]:
        yield f"zip_{kind}", content, 3, DAMAGED_MEMBER


def _damaged_archives(good: Files) -> Iterator[tuple[Any, ...]]:
    sound = zipped(good)
    end, directory = sound.rindex(b"PK\x05\x06"), sound.index(b"PK\x01\x02")
    for kind, content, images in [
        ("of_zero_bytes", b"", 0),
        ("is_html", b"<html><body>404 Not Found</body></html>" * 99, 0),
        ("is_tar", tar(good), 0),
        ("cut_in_the_middle", sound[: len(sound) // 2], 0),
        ("cut_in_the_directory", sound[: directory + 60], 0),
        ("cut_in_the_end_record", sound[:-5], 0),
        ("directory_overwritten", with_bytes(sound, directory, b"none"), 0),
        ("directory_too_long", with_bytes(sound, end + 12, struct.pack("<I", 2**31)), 0),
        ("directory_shorter_than_told", _one_member_unlisted(sound), 2),
        ("behind_another", sound + zipped([("a.png", photograph(7))]), 1),
    ]:
        yield f"zip_{kind}", content, images, DAMAGED
    yield (
        "zip_of_several_parts",
        with_bytes(sound, end + 4, struct.pack("<HH", 2, 2)),
        3,
        ("archive", "unsupported_archive"),
    )
    yield "zip_of_nothing", zipped([]), 0, ("archive", "empty_archive")
    yield "zip_with_a_comment", with_bytes(sound, -2, b"\x09\x00") + b"a comment", 3
    yield "zip_before_garbage", sound + b"garbage" * 9, 3
    yield "zip_behind_a_program", b"MZ" + bytes(1000) + sound, 3


def _with(good: Files, info: zipfile.ZipInfo, data: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO(zipped(good))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(info, data, method)
    return buffer.getvalue()


def _one_member_unlisted(sound: bytes) -> bytes:
    """Without the last record of the directory, whose length is told and whose number of members is not."""
    end = sound.rindex(b"PK\x05\x06")
    record = sound.rindex(b"PK\x01\x02")
    size, offset = struct.unpack_from("<II", sound, end + 12)
    shorter = sound[:record] + sound[end:]
    return with_bytes(shorter, record + 12, struct.pack("<II", size - (end - record), offset))


def _overlapping(count: int) -> bytes:
    """Members nested in each other's packed bytes: all claim the rest of the file."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    kernel = packer.compress(photograph(7)) + packer.flush()
    names = [f"{number:03d}.png".encode() for number in range(count)]
    headers = [struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, 0, 0, len(name), 0) + name for name in names]
    body = b"".join(headers) + kernel
    directory, offset = b"", 0
    for header, name in zip(headers, names, strict=True):
        packed = len(body) - offset - len(header)
        directory += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, packed, 10**6, len(name), 0, 0, 0, 0, 0, offset),
        )
        directory += name
        offset += len(header)
    return body + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)

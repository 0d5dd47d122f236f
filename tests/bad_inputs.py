"""A corpus of bad inputs: every kind is one archive, with what has to be said of it and how many good images it holds.

:func:`bad_inputs` makes them in memory; :func:`write_corpus` puts them into a folder, as careless machines would.
"""

from __future__ import annotations

import gzip
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.bad_zips import bad_zips
from tests.made_archives import (
    Files,
    flipped,
    float_tiff,
    noise,
    photograph,
    png_that_claims,
    saved,
    sparse_tar,
    tar,
    tar_header_signed,
    with_bytes,
    zipped,
    zstd,
    zstd_damaged,
)

GOOD: Files = [(f"good/{index}.png", photograph(index)) for index in range(3)]
"""What sound members most archives hold beside the bad one."""

DAMAGED = ("archive", "archive_damaged")
CUT = ("member", "member_damaged")
EMPTY = ("archive", "empty_archive")


@dataclass(frozen=True)
class Expected:
    """What has to come out of one archive of the corpus."""

    kind: str
    path: str
    """Of the archive in the corpus: a file, or a folder ``category=KIND`` of loose images."""
    good: int
    """Images in it that have to be scored; nothing else may be."""
    failures: tuple[tuple[str, str], ...]
    """Stage and code of every failure, sorted."""


@dataclass(frozen=True)
class BadInput:
    """An archive as bytes, or loose files as names and bytes, and what has to come out."""

    expected: Expected
    content: bytes | Files


def write_corpus(folder: Path) -> list[Expected]:
    """Every kind as an archive in the folder, which is made; what to expect of each."""
    corpus = bad_inputs()
    for bad in corpus:
        path = folder / bad.expected.path
        files = (
            [(path, bad.content)] if isinstance(bad.content, bytes) else [(path / n, data) for n, data in bad.content]
        )
        for file, data in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return [bad.expected for bad in corpus]


def bad_inputs() -> list[BadInput]:
    """All kinds, each with its own name."""
    return [*_members(), *_odd_tars(), *_damaged_tars(), *_packed_tars(), *_zips(), *_folders()]


def _bad(path: str, content: bytes | Files, good: int, *failures: tuple[str, str]) -> BadInput:
    kind = path.removeprefix("category=").partition(".")[0]
    return BadInput(Expected(kind, path, good, tuple(sorted(failures))), content)


def _members() -> Iterator[BadInput]:
    """Files that are bad in any archive; here one of each in a tar."""
    png, jpeg = photograph(9), saved("JPEG", noise(9, 64))
    for kind, name, data, stage, code in [
        ("zero_bytes", "a.png", b"", "member", "empty_file"),
        ("image_named_txt", "a.txt", png, "member", "not_an_image_name"),
        ("image_without_suffix", "a", png, "member", "not_an_image_name"),
        ("nested_tar", "a.tar.gz", gzip.compress(tar(GOOD)), "member", "nested_archive"),
        ("nested_zip", "a.zip", zipped(GOOD), "member", "nested_archive"),
        ("text_named_png", "a.png", b"no image, says the camera\n" * 9, "decode", "not_an_image"),
        ("html_named_jpg", "a.jpg", b"<!DOCTYPE html><title>503</title>", "decode", "not_an_image"),
        ("svg_named_png", "a.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "decode", "not_an_image"),
        (
            "postscript_named_png",
            "a.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "decode",
            "not_an_image",
        ),
        ("zip_named_png", "a.png", zipped(GOOD), "decode", "not_an_image"),
        ("zeros_named_png", "a.png", bytes(5000), "decode", "not_an_image"),
        ("png_cut", "a.png", png[: len(png) // 2], "decode", "truncated"),
        ("png_signature_alone", "a.png", png[:8], "decode", "damaged"),
        ("png_byte_flipped", "a.png", flipped(png, png.index(b"IDAT") + 900), "decode", "damaged"),
        ("jpeg_cut", "a.jpg", jpeg[: len(jpeg) // 2], "decode", "truncated"),
        ("too_many_pixels", "a.png", png_that_claims(10_001, 10_000), "decode", "too_many_pixels"),
        ("pixels_of_a_bomb", "a.png", png_that_claims(100_000, 100_000), "decode", "too_many_pixels"),
        ("float_out_of_range", "a.tif", float_tiff(1e9), "decode", "unsupported_mode"),
        ("float_not_a_number", "a.tif", float_tiff(float("nan")), "decode", "unsupported_mode"),
    ]:
        yield _bad(f"{kind}.tar", tar([*GOOD[:1], (name, data), *GOOD[1:]]), 3, (stage, code))


def _odd_tars() -> Iterator[BadInput]:
    """Tars that are sound, with members that must not be read, or are read although they look odd."""
    image = photograph(7)
    for kind, code in [
        ("symbolic_link", tarfile.SYMTYPE),
        ("hard_link", tarfile.LNKTYPE),
        ("character_device", tarfile.CHRTYPE),
        ("block_device", tarfile.BLKTYPE),
        ("named_pipe", tarfile.FIFOTYPE),
    ]:
        yield _bad(f"tar_{kind}.tar", tar(GOOD, special=[code]), 3, ("member", "unsupported_member"))
    for kind, name in [("absolute", "/etc/a.png"), ("upwards", "x/../../a.png"), ("windows", "C:\\a.png")]:
        yield _bad(f"tar_path_{kind}.tar", tar([*GOOD, (name, image)]), 3, ("member", "unsafe_path"))
    twice = ("member", "duplicate_name")
    yield _bad("tar_name_twice.tar", tar([*GOOD, ("good/1.png", image)]), 3, twice)
    yield _bad("tar_name_twice_as_printed.tar", tar([("\udcff.png", image), ("\\xff.png", image)]), 1, twice)
    odd = ["bild-\udcfc.png", "new\nline.png", "x" * 300 + ".png", "deep/" * 200 + "a.png", "größe.png"]
    yield _bad("tar_odd_names.tar", tar([*GOOD, *((name, image) for name in odd)]), 8)
    latin = tar([*GOOD, ("gr\udcf6\udcdfe.png", image)], format=tarfile.USTAR_FORMAT)
    yield _bad("tar_name_in_latin_1.tar", latin, 4)
    yield _bad("tar_sparse.tar", sparse_tar("a.png", len(image), [(0, image)]) + tar(GOOD), 4)
    holes = sparse_tar("a.png", 2**28, [(0, image)])
    yield _bad("tar_sparse_bomb.tar", holes + tar(GOOD), 3, ("member", "sparse_bomb"))
    yield _bad("tar_of_nothing.tar", tar([]), 0, EMPTY)
    yield _bad("tar_of_zeros.tar", bytes(2**20), 0, EMPTY)
    yield _bad("tar_of_folders.tar", tar([], special=[tarfile.DIRTYPE]), 0, EMPTY)


def _damaged_tars() -> Iterator[BadInput]:
    whole, image = tar(GOOD), photograph(7)
    second, third = whole.index(b"good/1.png"), whole.index(b"good/2.png")
    last = len(whole.rstrip(b"\0"))
    liar = tar_header_signed(with_bytes(tar([("a.png", image)]), 124, b"\x80" + (2**62).to_bytes(11, "big")))
    for kind, content, good in [
        ("zero_bytes_in_all", b"", 0),
        ("is_html", b"<html><body>404 Not Found</body></html>" * 99, 0),
        ("is_zip", zipped(GOOD), 0),
        ("is_noise", np.random.default_rng(0).bytes(4000), 0),
        ("cut_between_members", whole[:third], 2),
        ("cut_in_a_header", whole[: third + 100], 2),
        ("without_end_mark", whole[: last + -last % 512], 3),
        ("wrong_header_checksum", flipped(whole, second + 3), 1),
        ("hole_of_zeros", with_bytes(whole, second, bytes(2048)), 1),
        ("trailing_garbage", whole + b"garbage" * 99, 3),
        ("behind_another", whole + tar([("a.png", image)]), 3),
        ("header_lies_about_size", whole[:third] + liar, 2),
    ]:
        yield _bad(f"tar_{kind}.tar", content, good, DAMAGED)
    yield _bad("tar_cut_in_a_member.tar", whole[: second + 700], 1, CUT, DAMAGED)


def _packed_tars() -> Iterator[BadInput]:
    small = tar(GOOD)
    one, other = small[:3000], small[3000:]
    large = tar([(f"{index}.png", photograph(index, side=128)) for index in range(20)])  # 51 KiB each
    for name, suffix, pack in [("gzip", ".tar.gz", gzip.compress), ("zstd", ".tar.zst", zstd)]:
        packed = pack(large)
        # Of a cut part of 128 KiB, zstd gives nothing.
        end = 20 if name == "gzip" else 18
        yield _bad(f"{name}_cut_in_the_middle{suffix}", packed[: len(packed) * 21 // 40], 10, CUT, DAMAGED)
        at_the_end = (DAMAGED,) if name == "gzip" else (CUT, DAMAGED)
        yield _bad(f"{name}_cut_at_the_end{suffix}", packed[:-2], end, *at_the_end)
        yield _bad(f"{name}_trailing_garbage{suffix}", pack(small) + b"garbage" * 99, 3, DAMAGED)
        yield _bad(f"{name}_second_part_cut{suffix}", pack(one) + pack(other)[:50], 1, DAMAGED)
        yield _bad(f"{name}_second_part_lost{suffix}", pack(one), 1, DAMAGED)
        yield _bad(f"{name}_magic_alone{suffix}", pack(small)[:4], 0, DAMAGED)
        yield _bad(f"{name}_in_two_parts{suffix}", pack(one) + pack(other), 3)
        yield _bad(f"{name}_not_packed_at_all{suffix}", small, 3)
        yield _bad(f"{name}_without_its_suffix.tar", pack(small), 3)
    yield _bad("gzip_wrong_checksum.tgz", flipped(gzip.compress(small), -8), 3, DAMAGED)
    yield _bad("gzip_wrong_length.tgz", flipped(gzip.compress(small), -1), 3, DAMAGED)
    yield _bad("zstd_damaged_frame.tzst", zstd(one) + zstd_damaged(other), 1, DAMAGED)
    skipped = struct.pack("<II", 0x184D2A50, 9) + b"any bytes"
    yield _bad("zstd_frames_to_skip.tzst", skipped + zstd(one) + skipped + zstd(other), 3)
    bomb = zstd(small) + zstd(bytes(2**26)) * 6  # padding without end, in a few KiB
    yield _bad("zstd_bomb.tar.zst", bomb, 3, ("archive", "archive_bomb"))


def _zips() -> Iterator[BadInput]:
    for kind, content, good, *failures in bad_zips(GOOD):
        yield _bad(f"{kind}.zip", content, good, *failures)


def _folders() -> Iterator[BadInput]:
    image = photograph(8)
    for kind, name, data, stage, code in [
        ("loose_zero_bytes", "a.png", b"", "member", "empty_file"),
        ("loose_text_named_png", "a.png", b"text", "decode", "not_an_image"),
        ("loose_cut_png", "a.png", image[:300], "decode", "truncated"),
        ("loose_notes", "notes.txt", b"text", "member", "not_an_image_name"),
    ]:
        yield _bad(f"category={kind}", [*GOOD, (name, data)], 3, (stage, code))
    patterns = [("[1]*.png", image), ("a?b#c%20d.png", image)]
    yield _bad("category=loose_names_like_patterns", [*GOOD, *patterns], 5)

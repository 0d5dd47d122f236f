"""Archives made in memory, sound ones and what tools for packing refuse to make."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

Files = Sequence[tuple[str, bytes]]


def photograph(seed: int, side: int = 24) -> bytes:
    """A sound image of noise, as the bytes of a PNG file: 3 bytes for each pixel, since noise does not pack."""
    return saved("PNG", noise(seed, side))


def noise(seed: int, side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def saved(format: str, image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def float_tiff(value: float) -> bytes:
    return saved("TIFF", Image.fromarray(np.full((9, 9), value, np.float32)))


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that call themselves a large image."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + b"\0\0\0\0IEND\xaeB`\x82"


def tar(files: Files, *, format: int = tarfile.PAX_FORMAT, special: Sequence[bytes] = ()) -> bytes:
    """A tar of the files, then of one member without content for each type in ``special``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
        for kind in special:
            header = tarfile.TarInfo("special.png")
            header.type, header.linkname = kind, "good/0.png"
            archive.addfile(header)
    return buffer.getvalue()


def sparse_tar(name: str, size: int, pieces: Sequence[tuple[int, bytes]]) -> bytes:
    """One file of ``size`` bytes, zeros but for the pieces (up to 4), as GNU tar --sparse writes it."""
    stored = b"".join(data + bytes(-len(data) % 512) for _, data in pieces)
    header = tarfile.TarInfo(name)
    header.size, header.type = len(stored), tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    for number, (offset, data) in enumerate(pieces):
        block[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % (offset, len(data))
    block[483:495] = b"%011o\0" % size
    return tar_header_signed(block) + stored


def tar_header_signed(block: bytes | bytearray) -> bytes:
    """The same with the checksum that its first 512 bytes should have."""
    signed = bytearray(block)
    signed[148:156] = b" " * 8
    signed[148:156] = b"%06o\0 " % sum(signed[:512])
    return bytes(signed)


def zstd(data: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


def zstd_damaged(data: bytes) -> bytes:
    """A frame whose first block is of no known type."""
    packed = bytearray(zstd(data))
    assert packed[4] == 0, "a header of 6 bytes"
    packed[6] |= 0b110
    return bytes(packed)


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return buffer.getvalue()


def in_directory(data: bytes, name: str) -> int:
    """Where the record of a member starts in the directory of a zip."""
    position = data.rindex(name.encode()) - 46
    assert data.startswith(b"PK\x01\x02", position)
    return position


def with_bytes(data: bytes, position: int, changed: bytes) -> bytes:
    """The same with other bytes from the position on, which may count from the end."""
    position %= len(data)
    assert position + len(changed) <= len(data)
    return data[:position] + changed + data[position + len(changed) :]


def flipped(data: bytes, position: int) -> bytes:
    """The same with one byte inverted."""
    return with_bytes(data, position, bytes([data[position] ^ 0xFF]))

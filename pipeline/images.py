"""Image files to uint8 RGB arrays and back: decoding with limits, resizing, rotation.

An image here is a uint8 array (H, W, 3), RGB. A mask is a bool array (H, W), True on the defect.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Width times height above which an image is refused before any of its pixels is decoded."""

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".gif", ".webp", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""What a file's name ends with, in lower case, if it is taken for an image."""

# Only formats that are plain pixels: others start programs (EPS) or hold documents.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "GIF", "WEBP", "JPEG2000", "PPM")
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8")
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "JPEG2000")
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")

# The EXIF orientation tag, and what brings each of its values upright.
_ORIENTATION_TAG = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_WARNINGS_LOCK = threading.Lock()


class ImageError(Exception):
    """A file that does not give an image. Pickles, so it crosses process borders.

    ``error`` is a stable code: ``empty_file``, ``not_an_image``, ``too_many_pixels``, ``truncated``,
    ``damaged``, ``unsupported_mode`` or ``out_of_memory``. ``detail`` is one line for people.
    """

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(error, detail)
        self.error = error
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.error}: {self.detail}"


def is_image_name(name: str) -> bool:
    """Whether the file name ends as an image's does (see IMAGE_SUFFIXES), in either case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image in an encoded file, upright (EXIF orientation applied): uint8 (H, W, 3). Raises ImageError.

    Of several frames the first. Transparent pixels are composited on black. Grey of 16 bits (modes I;16, I)
    is divided by 257, whatever its content, so that exposures stay comparable; values outside 0..65535 are
    refused. Float grey counts as 0..1, else 0..255, else 0..65535: the first range that holds its values.
    ``max_pixels`` limits width times height; Pillow's own limit of 178 956 970 stays in force above it.
    """
    return _to_rgb(_open_upright(data, max_pixels))


def decode_mask(data: bytes) -> np.ndarray:
    """The ground truth in an encoded file: bool (H, W). Raises ImageError as :func:`decode` does.

    Every pixel that is not black is defect: masks are written as 0/255 and as 0/1, in 1, 8 and 16 bits.
    In a lossy format, which rings around edges, more than half of the range is defect.
    """
    image = _open_upright(data, MAX_PIXELS)
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "F":
        return np.not_equal(np.asarray(image), 0)
    threshold = 127 if image.format in _LOSSY_FORMATS else 0
    return np.any(_to_rgb(image) > threshold, axis=2)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """The image squeezed into a square: uint8 (size, size, 3).

    Halved with a box filter while both sides are at least 2 ``size``, then bicubic.
    """
    pillow = Image.fromarray(image)
    width, height = float(pillow.width), float(pillow.height)
    while min(pillow.size) >= 2 * size:
        pillow = pillow.reduce(2)
        width, height = width / 2, height / 2
    # The last column of a halved odd side stands for one column, not two: the box keeps the geometry exact.
    box = (0.0, 0.0, width, height)
    return np.array(pillow.resize((size, size), Image.Resampling.BICUBIC, box=box))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """The mask in a square: bool (size, size), True where at least half of the area is defect."""
    height, width = mask.shape
    # Areas are whole numbers below 2**53, so "half" is exact.
    area = _overlaps(height, size) @ mask.astype(np.float64) @ _overlaps(width, size).T
    return np.greater_equal(2 * area, height * width)


def to_unit_range(images_nhwc_u8: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    scaled = images_nhwc_u8.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    scaled /= 127.5
    scaled -= 1
    return scaled


def encode_png(image: np.ndarray) -> bytes:
    """A uint8 image (H, W, 3), or grey (H, W), as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _open_upright(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame, every pixel decoded, in the file's own mode and upright."""
    if not data:
        raise ImageError("empty_file", "the file has no bytes")
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height}"
            raise ImageError("too_many_pixels", f"{size} pixels, the limit is {max_pixels}")
        image.load()
        if image.format == "PNG":
            # load() ignores the checksums over the pixels' bytes: a half-written file can decode to noise.
            with _quiet():
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    except ImageError:
        raise
    except UnidentifiedImageError:
        if data.startswith(_SIGNATURES):
            raise ImageError("damaged", f"the header cannot be read, {len(data)} bytes in all") from None
        raise ImageError("not_an_image", f"{len(data)} bytes without a known image header") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", _line(error)) from error
    except MemoryError as error:
        raise ImageError("out_of_memory", f"decoding {len(data)} bytes took all memory") from error
    except Exception as error:
        # Pillow's readers raise about any type on bytes that are not what they claim to be.
        cut = isinstance(error, EOFError) or "truncated" in str(error)
        raise ImageError("truncated" if cut else "damaged", _line(error)) from error
    turn = _TO_UPRIGHT.get(_orientation(image))
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.format = image.format
    return upright


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none."""
    try:
        with _quiet():
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        # A broken EXIF block raises about any type, and must not cost a photograph whose pixels are sound.
        return 1
    return orientation if isinstance(orientation, int) else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Pillow's warnings (large image, odd metadata) from the user: our own limits and errors count."""
    # The lock, because catch_warnings changes and restores what all threads share.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT_MODES:
        return _grey_to_rgb(np.asarray(image).astype(np.float64), 65535.0)
    if image.mode == "F":
        grey = np.asarray(image).astype(np.float64)
        return _grey_to_rgb(grey, next((top for top in (1.0, 255.0) if grey.max() <= top), 65535.0))
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.new("RGB", image.size)
            image.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise ImageError("unsupported_mode", f"no way from {image.mode} to RGB") from error


def _grey_to_rgb(grey: np.ndarray, top: float) -> np.ndarray:
    """Grey (H, W) in 0..top to uint8 (H, W, 3)."""
    # Written so that NaN fails too.
    if not (grey.min() >= 0 and grey.max() <= top):
        raise ImageError("unsupported_mode", f"grey values {grey.min():g} to {grey.max():g}, not 0 to {top:g}")
    eight_bits = np.rint(grey * (255.0 / top)).astype(np.uint8)
    return np.repeat(eight_bits[:, :, None], 3, axis=2)


def _overlaps(length: int, size: int) -> np.ndarray:
    """How much of each of ``length`` pixels lies in each of ``size`` equal bins, in 1/size of a pixel.

    Float64 (size, length) of whole numbers; every row sums to ``length``.
    """
    bins = np.arange(size)[:, None] * length
    pixels = np.arange(length)[None, :] * size
    overlap = np.minimum(bins + length, pixels + size) - np.maximum(bins, pixels)
    return np.maximum(overlap, 0).astype(np.float64)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

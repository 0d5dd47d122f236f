"""Decoding, resizing and turning images, with files made here by Pillow."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageSequence

from pipeline.images import (
    MAX_PIXELS,
    ImageError,
    decode,
    decode_mask,
    encode_png,
    is_image_name,
    resize,
    resize_mask,
    to_unit_range,
)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photograph(height: int = 60, width: int = 90) -> np.ndarray:
    """Smooth colours with noise: compresses, but every row differs."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    return np.stack([x * 2 + noise, y * 3 + noise, 120 + noise], axis=-1).astype(np.uint8)


def error_of(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    assert "\n" not in caught.value.detail
    return caught.value.error


GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_comes_back_unchanged(file_format: str) -> None:
    image = photograph()
    decoded = decode(encoded(Image.fromarray(image), file_format))
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_grey_in_every_mode_becomes_three_equal_channels(mode: str) -> None:
    image = Image.fromarray(GREY.astype(np.uint16) * 257 if mode == "I;16" else GREY)
    data = encoded(image if mode == "I;16" else image.convert(mode))
    assert Image.open(io.BytesIO(data)).mode in (mode, "I")
    np.testing.assert_array_equal(decode(data), np.repeat(GREY[:, :, None], 3, axis=2))


def test_one_bit_becomes_black_and_white() -> None:
    bits = np.array([[True, False, True]])
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits)))[0, :, 0], [255, 0, 255])


def test_cmyk_becomes_rgb() -> None:
    decoded = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert decoded.shape == (16, 16, 3)
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() <= 3


def test_sixteen_bits_are_scaled_by_their_range_not_by_their_content() -> None:
    dark = np.array([[0, 257, 2570]], np.uint16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(dark)))[0, :, 0], [0, 1, 10])
    wide = Image.fromarray(np.array([[0, 32768, 65535]], np.int32))
    np.testing.assert_array_equal(decode(encoded(wide, "TIFF"))[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("values", [[0, 0.5, 1], [0, 127.5, 255], [0, 32767.5, 65535]])
def test_float_grey_uses_the_first_range_that_holds_it(values: list[float]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    np.testing.assert_array_equal(decode(data)[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("values", [[0, np.nan], [-1, 1], [0, 1e6]])
def test_grey_outside_any_range_is_refused(values: list[float]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert error_of(data) == "unsupported_mode"


def test_transparency_is_composited_on_black() -> None:
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)
    expected = [[200, 100, 50], [0, 0, 0], [40, 20, 10]]
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(rgba)))[0], expected)


def test_transparent_palette_entry_is_black() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([250, 0, 0, 0, 250, 0])
    decoded = decode(encoded(image, transparency=1))
    np.testing.assert_array_equal(decoded[0], [[250, 0, 0], [0, 0, 0]])


def test_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
    np.testing.assert_array_equal(np.unique(decode(data).reshape(-1, 3), axis=0), [[255, 0, 0]])


# Where the file's top left corner lies in the upright image, as (row, column), for each EXIF orientation.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation_is_applied_once(orientation: int, file_format: str) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(Image.fromarray(stored), file_format, exif=exif))
    assert decoded.shape == ((32, 16, 3) if orientation >= 5 else (16, 32, 3))
    corners = {(row, column): int(decoded[row, column, 0]) for row in (0, -1) for column in (0, -1)}
    assert [corner for corner, value in corners.items() if value > 128] == [CORNERS[orientation]]


def test_broken_exif_does_not_cost_the_photograph() -> None:
    image = Image.fromarray(photograph())
    broken = encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff not a directory")
    np.testing.assert_array_equal(decode(broken), photograph())


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_a_cut_file_is_an_error_and_never_half_an_image(file_format: str, kept: float) -> None:
    data = encoded(Image.fromarray(photograph()), file_format)
    decode(data)
    assert error_of(data[: int(len(data) * kept)]) in ("truncated", "damaged")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_cut_png_or_jpeg_is_called_truncated(file_format: str) -> None:
    data = encoded(Image.fromarray(photograph()), file_format)
    assert error_of(data[: len(data) * 2 // 3]) == "truncated"


def test_a_png_whose_end_was_never_written_is_an_error() -> None:
    # Zeros decode to some pixels or other: only the checksum tells.
    data = encoded(Image.fromarray(photograph(300, 300)))
    for kept in (0.3, 0.5, 0.7):
        half = data[: int(len(data) * kept)].ljust(len(data), b"\0")
        assert error_of(half) in ("truncated", "damaged")


def test_what_is_no_image() -> None:
    assert error_of(b"") == "empty_file"
    assert error_of(b"this is a text, whatever its name says\n" * 20) == "not_an_image"
    assert error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n") == "not_an_image"


@pytest.mark.parametrize("side", [9_900, 12_000, 60_000])
def test_pixel_limit_is_read_from_the_header(side: int) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error_of(bomb) == ("too_many_pixels" if side**2 > MAX_PIXELS else "truncated")


def test_pixel_limit_is_a_parameter() -> None:
    data = encoded(Image.fromarray(photograph(60, 90)))
    assert decode(data, max_pixels=5400).shape == (60, 90, 3)
    assert error_of(data, max_pixels=5399) == "too_many_pixels"


def test_decoding_leaves_global_settings_alone() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    decode(encoded(Image.fromarray(photograph())))
    error_of(b"no image")
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_error_pickles() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "at byte 7")))
    assert (error.error, error.detail, str(error)) == ("truncated", "at byte 7", "truncated: at byte 7")


def test_image_names() -> None:
    assert all(is_image_name(name) for name in ("a.png", "x/B.JPG", "c.v2.tiff", "d.jpeg"))
    assert not any(is_image_name(name) for name in ("a.txt", "png", "a.png.json", "a.png/readme", ".png"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("defect", [1, 255])
def test_mask_is_whatever_is_not_black(mode: str, defect: int) -> None:
    mask = np.array([[False, True, True], [False, False, True]])
    if mode == "1":
        image = Image.fromarray(mask)
    elif mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16) * defect)
    else:
        image = Image.fromarray(mask.astype(np.uint8) * np.uint8(defect)).convert(mode)
    decoded = decode_mask(encoded(image))
    assert decoded.dtype == np.bool_
    np.testing.assert_array_equal(decoded, mask)


def test_mask_in_jpeg_is_not_widened_by_ringing() -> None:
    mask = np.zeros((64, 64), bool)
    mask[19:45, 13:51] = True
    data = encoded(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)), "JPEG", quality=60)
    assert (decode(data)[..., 0] > 0).sum() > mask.sum()
    np.testing.assert_array_equal(decode_mask(data), mask)


def test_resize_by_two_is_the_mean_of_each_box() -> None:
    image = photograph(64, 64)
    means = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    resized = resize(image, 32)
    assert resized.shape == (32, 32, 3)
    assert resized.dtype == np.uint8
    assert np.abs(resized - means).max() <= 0.5


def test_resize_below_two_is_bicubic() -> None:
    image = photograph(100, 100)
    expected = Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(image, 64), np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (513, 301), (20, 700), (7, 5)])
def test_resize_keeps_a_constant_image_and_identity(height: int, width: int) -> None:
    resized = resize(np.full((height, width, 3), 77, np.uint8), 32)
    np.testing.assert_array_equal(resized, np.full((32, 32, 3), 77))
    same = photograph(32, 32)
    np.testing.assert_array_equal(resize(same, 32), same)


def test_resize_of_odd_sides_does_not_shift_the_picture() -> None:
    ramp = np.tile(np.linspace(0, 250, 1001)[None, :, None], (1001, 1, 3)).astype(np.uint8)
    centres = (np.arange(50) + 0.5) / 50 * 250
    assert np.abs(resize(ramp, 50)[25, 2:-2, 0] - centres[2:-2]).max() <= 1.5


def test_mask_resize_is_true_from_half_of_the_area_on() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = True  # half of the first box
    mask[2, 0] = True  # a quarter of the third
    mask[2:, 2:] = True
    np.testing.assert_array_equal(resize_mask(mask, 2), [[True, False], [False, True]])


def test_mask_resize_weighs_pixels_by_their_overlap() -> None:
    # Three columns into two: the middle one is shared, half of it on either side.
    mask = np.array([[True, False, False]] * 3)
    np.testing.assert_array_equal(resize_mask(mask, 2), [[True, False]] * 2)
    np.testing.assert_array_equal(resize_mask(~mask, 2), [[False, True]] * 2)
    np.testing.assert_array_equal(resize_mask(np.array([[False, True, False]] * 3), 2), [[False] * 2] * 2)


def test_mask_resize_keeps_size_and_repeats_when_growing() -> None:
    mask = np.random.default_rng(0).random((12, 12)) > 0.5
    np.testing.assert_array_equal(resize_mask(mask, 12), mask)
    np.testing.assert_array_equal(resize_mask(mask, 24), mask.repeat(2, 0).repeat(2, 1))


def test_mask_and_image_keep_the_same_geometry() -> None:
    mask = np.zeros((900, 700), bool)
    mask[200:500, 150:420] = True
    grey = resize(np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * np.uint8(255), 64)[..., 0]
    differing = resize_mask(mask, 64) != (grey >= 128)
    assert differing.sum() <= 4


def test_unit_range() -> None:
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (0, 255, 51)])
    images[2, 1, 2] = [0, 255, 51]
    scaled = to_unit_range(images)
    assert scaled.shape == (3, 3, 2, 3)
    assert scaled.dtype == np.float32
    assert scaled.flags.c_contiguous
    np.testing.assert_array_equal(scaled[:2].min(axis=(1, 2, 3)), [-1, 1])
    np.testing.assert_allclose(scaled[2, :, 1, 2], [-1, 1, -0.6], atol=1e-6)
    assert images.max() == 255


@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7)])
def test_png_comes_back(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode(encode_png(image)), expected)

"""Real textures with known defects: the embedded data set, and synthetic defects for any photograph.

The photographs come inside scikit-image, so nothing is downloaded. Implanted defects have exact masks;
they also stand in for labelled defects when hyper-parameters are chosen on defect-free photographs alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.defects import PAINTERS, Array, contrast
from pipeline.errors import UserError
from pipeline.images import encode_png
from pipeline.storage import Location

DEFECTS = tuple(PAINTERS)
TEXTURES = ("brick", "grass", "gravel")

MIN_SIDE = 32  # px
VISIBLE = 5.0  # grey levels: a smaller change is undone, so the mask's edge is where the change ends
STRONG = 12.0  # grey levels: a defect needs some pixels that changed at least this much, ...
STRONG_OF_CONTRAST = 0.7  # ... and on a rough texture a mean change of this part of its own deviation,
STRONG_AT_MOST = 30.0  # grey levels; a still rougher texture asks for no more
MIN_STRONG_FRACTION = 0.0008  # of the image's pixels (13 at 128 x 128), but never fewer than ...
MIN_STRONG_PIXELS = 10
SHOWN_PART = 0.6  # of the defect's shape: less is a ragged remainder, not the defect that was meant
SHIFT_FROM_TRY, OPPOSE_FROM_TRY, MAX_TRIES = 8, 12, 16
SHIFT_STEP = 15.0  # grey levels


def implant(
    image_hwc_u8: NDArray[np.uint8],
    kind: str,
    rng: np.random.Generator,
    *,
    foreign_hwc_u8: NDArray[np.uint8] | None = None,
    scale: float = 1.0,
    size: float = 1.0,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A copy of the image with one defect of this kind (see DEFECTS), and the (H, W) mask of the defect.

    image_hwc_u8: (H, W, 3) uint8, H and W at least 32. foreign_hwc_u8: (h, w, 3) uint8 of any size, what
    `foreign_patch` and `perlin_blend` paste; by default one of the bundled photographs. Outside the mask the
    result equals the image bit for bit. The mask is never empty, and solid: pixels inside a defect that
    happen to keep their value belong to it. A scale above 1 asks for a larger and stronger defect, a size below 1 for
    a smaller one, no weaker, as it would be in an image of so much of this one's side (32 px or more). A grey
    image stays grey. Same image, kind, scale, size and rng state: same result. Raises ValueError for an unknown kind
    or another shape or dtype.
    """
    if kind not in DEFECTS:
        raise ValueError(f"unknown defect {kind!r}: choose one of {', '.join(DEFECTS)}")
    if image_hwc_u8.dtype != np.uint8 or image_hwc_u8.ndim != 3 or image_hwc_u8.shape[2] != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {image_hwc_u8.shape} {image_hwc_u8.dtype}")
    height, width, _ = image_hwc_u8.shape
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"expected at least {MIN_SIDE} x {MIN_SIDE} pixels, got {height} x {width}")

    image = image_hwc_u8.astype(np.float64)
    foreign = _foreign_like(image, foreign_hwc_u8, rng)
    size = min(1.0, max(size, MIN_SIDE / min(height, width)))
    enough = max(MIN_STRONG_PIXELS, MIN_STRONG_FRACTION * height * width * size**2)
    strong = min(max(STRONG, STRONG_OF_CONTRAST * contrast(image)), STRONG_AT_MOST)
    away = np.where(image.mean() < 128, 1.0, -1.0)
    for attempt in range(MAX_TRIES):
        content, opacity = PAINTERS[kind](image, foreign, rng, scale + 0.1 * attempt, size)
        # Where chance gives nothing to see (a foreign texture like the image's own, no texture that could be
        # missing), the next tries are larger and stronger, the late ones of another brightness, and the last
        # of the opposite brightness pixel by pixel: less plausible, but sure to show.
        if attempt >= OPPOSE_FROM_TRY:
            away = np.where(image.mean(axis=2, keepdims=True) < 128, 1.0, -1.0)
        shift = SHIFT_STEP * max(0, attempt - SHIFT_FROM_TRY + 1) * away
        content = np.clip(np.clip(content, 0, 255) + shift, 0, 255)
        painted = np.rint(image + opacity[..., None] * (content - image))
        change = np.abs(painted - image).max(axis=2)
        mask = _solid(change >= VISIBLE, opacity > 0, size * min(height, width))
        whole = np.count_nonzero(mask) >= SHOWN_PART * np.count_nonzero(opacity > opacity.max() / 2)
        seen = np.count_nonzero(mask & (change >= STRONG)) >= enough
        if whole and seen and change[mask].mean() >= strong:
            return np.where(mask[..., None], painted, image).astype(np.uint8), mask
    raise AssertionError(f"{kind} stayed invisible in {MAX_TRIES} tries on {image_hwc_u8.shape}")


def write_dataset(
    root: Location,
    *,
    textures: Sequence[str] = ("brick", "grass"),
    image_size: int = 128,
    train_images: int = 120,
    test_normal: int = 20,
    test_defective: int = 30,
    defects: Sequence[str] = ("scratch", "spot", "stain", "missing_texture", "foreign_patch"),
    scale: float = 2.5,
    seed: int = 0,
) -> None:
    """Write the embedded data set in MVTec AD's layout: square RGB PNG, `image_size` px; counts per texture.

    Training and test crops come from different strips of the photograph. The defects take turns; `scale`
    makes them larger and stronger than `implant` does by itself, for photographs as rough as these. A texture's
    files depend on its name and the arguments alone: the same bytes every time.
    Raises UserError for an unknown texture and for an image_size under 32 px.
    """
    unknown = sorted(set(textures) - set(TEXTURES))
    if unknown or not textures:
        given = ", ".join(unknown) or "nothing"
        raise UserError(f"embedded textures: {given} given; choose from {', '.join(TEXTURES)}")
    if image_size < MIN_SIDE:
        raise UserError(f"image size {image_size} is too small for a defect: use at least {MIN_SIDE} px")
    for name in textures:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        photo = photograph(name, min_side=2 * image_size)
        others = [photograph(other, min_side=2 * image_size) for other in TEXTURES if other != name]
        train_strips, test_strip = strips(photo, image_size)
        category = root / name
        for i in range(train_images):
            crop = _random_crop(train_strips[i % len(train_strips)], image_size, image_size, rng)
            (category / "train" / "good" / f"{i:03d}.png").write_bytes(encode_png(crop))
        for i in range(test_normal):
            crop = _random_crop(test_strip, image_size, image_size, rng)
            (category / "test" / "good" / f"{i:03d}.png").write_bytes(encode_png(crop))
        for i in range(test_defective):
            number, kind = i // len(defects), defects[i % len(defects)]
            crop = _random_crop(test_strip, image_size, image_size, rng)
            defective, mask = implant(crop, kind, rng, foreign_hwc_u8=others[number % len(others)], scale=scale)
            (category / "test" / kind / f"{number:03d}.png").write_bytes(encode_png(defective))
            mask_png = encode_png(mask.astype(np.uint8) * np.uint8(255))
            (category / "ground_truth" / kind / f"{number:03d}_mask.png").write_bytes(mask_png)


def photograph(name: str, *, min_side: int = 0) -> NDArray[np.uint8]:
    """The bundled photograph (see TEXTURES) as (S, S, 3) uint8; S is 512, or min_side where that is more."""
    # Read from the package's own folder: skimage.data.<name>() may go to the network where a file is missing.
    with Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png") as file:
        grey = file.convert("L")
    if grey.width < min_side:
        grey = grey.resize((min_side, min_side), Image.Resampling.LANCZOS)
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def strips(photo_hwc: NDArray[np.uint8], image_size: int) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Cut the photograph into upright strips without overlap: (for training, for testing).

    Upright, because the photographs change from top to bottom with distance. The middle third is for testing
    where thirds are wide enough for a crop: its view lies between those of the training strips.
    """
    width = photo_hwc.shape[1]
    if width // 3 >= image_size:
        left, right = width // 3, width - width // 3
        return [photo_hwc[:, :left], photo_hwc[:, right:]], photo_hwc[:, left:right]
    return [photo_hwc[:, : width // 2]], photo_hwc[:, width // 2 :]


def _random_crop(image_hwc: NDArray[np.uint8], height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    top = rng.integers(image_hwc.shape[0] - height + 1)
    left = rng.integers(image_hwc.shape[1] - width + 1)
    return np.ascontiguousarray(image_hwc[top : top + height, left : left + width])


def _foreign_like(image: Array, foreign_u8: NDArray[np.uint8] | None, rng: np.random.Generator) -> Array:
    """A random crop of the foreign photograph in the image's size; grey if the image is."""
    height, width, _ = image.shape
    if foreign_u8 is None:
        foreign_u8 = photograph(TEXTURES[rng.integers(len(TEXTURES))])
    enlarge = max(height / foreign_u8.shape[0], width / foreign_u8.shape[1], 1.0)
    if enlarge > 1:
        rows, columns = (int(np.ceil(side * enlarge)) for side in foreign_u8.shape[:2])
        foreign_u8 = np.asarray(Image.fromarray(foreign_u8).resize((columns, rows), Image.Resampling.BICUBIC))
    crop = _random_crop(foreign_u8, height, width, rng).astype(np.float64)
    if (image == image[..., :1]).all():
        return np.repeat(crop.mean(axis=2, keepdims=True), 3, axis=2)
    return crop


def _solid(changed: NDArray[np.bool_], shape: NDArray[np.bool_], side: float) -> NDArray[np.bool_]:
    """The changed pixels with the gaps that chance left inside the shape closed, and without specks: small ones for a side."""
    reach = max(1, round(side / 64))
    padded = np.pad(changed, reach)  # closing at the border would otherwise eat the border's pixels
    closed = ndimage.binary_closing(padded, iterations=reach)[reach:-reach, reach:-reach]
    solid = ndimage.binary_fill_holes(closed) & shape
    labels, _ = ndimage.label(solid, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    # Not so strict that a small image's whole defect is a speck.
    return (sizes >= max(4, (side / 40) ** 2))[labels]

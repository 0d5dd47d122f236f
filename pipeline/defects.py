"""Painters of synthetic defects: what a defect shows, and how opaque it is at every pixel.

A painter takes the image (H, W, 3) and a foreign texture of the same shape, both float64 in grey levels
0..255, a generator, a scale >= 1 that asks for a larger or stronger defect, and a size in 0..1 that makes it
smaller, no weaker. It returns the content (H, W, 3) in grey levels, not yet clipped, and its opacity (H, W) in
0..1. Lengths are relative to the image's shorter side times the size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]
Painter = Callable[[Array, Array, np.random.Generator, float, float], tuple[Array, Array]]


def contrast(image: Array) -> float:
    """Standard deviation of the image's grey levels."""
    return float(image.mean(axis=2).std())


def _contrasting_level(image: Array, opacity: Array, difference: float, rng: np.random.Generator) -> float:
    """The shape's mean level plus or minus the difference, whichever the grey scale has room for."""
    level = np.average(image.mean(axis=2), weights=opacity + 1e-9)
    room = [sign for sign in (-1, 1) if 0 <= level + sign * difference <= 255]
    sign = rng.choice(room) if room else (1 if level < 128 else -1)
    return float(level + sign * difference)


def _perlin(height: int, width: int, cells: tuple[int, int], rng: np.random.Generator) -> Array:
    """Perlin gradient noise (H, W), about -0.7..0.7, with this many lattice cells down and across."""
    angles = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    rows = (np.arange(height) + 0.5)[:, None] * cells[0] / height
    columns = (np.arange(width) + 0.5)[None, :] * cells[1] / width
    top, left = rows.astype(int), columns.astype(int)
    y, x = rows - top, columns - left

    def corner(down: int, right: int) -> Array:
        angle = angles[top + down, left + right]
        return np.sin(angle) * (y - down) + np.cos(angle) * (x - right)

    def fade(t: Array) -> Array:
        return t**3 * (t * (t * 6 - 15) + 10)

    upper = corner(0, 0) + fade(x) * (corner(0, 1) - corner(0, 0))
    lower = corner(1, 0) + fade(x) * (corner(1, 1) - corner(1, 0))
    return upper + fade(y) * (lower - upper)


def _blob(height: int, width: int, radius: float, feather: float, rng: np.random.Generator) -> Array:
    """Opacity (H, W) of an irregular region of about this radius (px), its edge `feather` px wide."""
    margin = min(0.8 * radius, 0.4 * min(height, width))
    cy, cx = rng.uniform(margin, height - margin), rng.uniform(margin, width - margin)
    dy, dx = np.arange(height)[:, None] - cy, np.arange(width)[None, :] - cx
    turn, aspect = rng.uniform(0, np.pi), rng.uniform(1, 1.7)
    along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    distance = np.hypot(along / np.sqrt(aspect), across * np.sqrt(aspect))
    angle = np.arctan2(across, along)
    edge = np.full((height, width), radius)
    for waves in range(2, 6):
        edge += radius * rng.uniform(0, 0.35) / waves * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    cells = (min(height, max(2, round(height / radius))), min(width, max(2, round(width / radius))))
    edge += 0.35 * radius * _perlin(height, width, cells, rng)
    return np.clip((edge - distance) / feather + 0.5, 0, 1)


def _scratch(image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float) -> tuple[Array, Array]:
    height, width, _ = image.shape
    side = size * min(height, width)
    length, joints = rng.uniform(0.2, 0.6) * side, 24
    bend = rng.uniform(-1.2, 1.2) / joints + rng.normal(0, 0.025, joints)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(bend)
    points = np.cumsum(np.stack([np.sin(heading), np.cos(heading)], axis=1), axis=0) * length / joints
    points -= points.min(axis=0)
    points += rng.uniform(0, 1, 2) * np.maximum([height, width] - points.max(axis=0) - 1, 0)

    ys, xs = np.mgrid[:height, :width]
    pixels = np.stack([ys, xs], axis=-1).astype(np.float64)
    thickness = max(1.0, rng.uniform(1, 3) * side / 128) * scale
    # Thinner towards both ends, as a scratch begins and ends with less pressure.
    taper = np.sin(np.pi * (np.arange(joints - 1) + 1.5) / (joints + 1)) ** 0.5
    opacity = np.zeros((height, width))
    for start, end, pressure in zip(points[:-1], points[1:], taper, strict=True):
        step = end - start
        nearest = np.clip(((pixels - start) * step).sum(axis=-1) / (step**2).sum(), 0, 1)
        distance = np.hypot(*np.moveaxis(pixels - start - nearest[..., None] * step, -1, 0))
        opacity = np.maximum(opacity, np.clip(0.5 + thickness * pressure / 2 - distance, 0, 1))
    level = _contrasting_level(image, opacity, (rng.uniform(35, 75) + contrast(image)) * scale, rng)
    return level + 0.2 * (image - image.mean(axis=(0, 1))), opacity * rng.uniform(0.75, 1.0)


def _spot(image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float) -> tuple[Array, Array]:
    height, width, _ = image.shape
    side = size * min(height, width)
    radius = max(2.0, rng.uniform(0.025, 0.065) * side) * scale
    cy, cx = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
    turn, aspect = rng.uniform(0, np.pi), rng.uniform(1, 1.3)
    dy, dx = np.arange(height)[:, None] - cy, np.arange(width)[None, :] - cx
    along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    softness = max(1.5, rng.uniform(0.3, 0.8) * radius)
    opacity = np.clip((radius - np.hypot(along / aspect, across * aspect)) / softness + 0.5, 0, 1)
    level = _contrasting_level(image, opacity, (rng.uniform(35, 75) + contrast(image)) * scale, rng)
    return level + 0.2 * (image - image.mean(axis=(0, 1))), opacity * rng.uniform(0.75, 1.0)


def _stain(image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float) -> tuple[Array, Array]:
    height, width, _ = image.shape
    side = size * min(height, width)
    opacity = _blob(height, width, rng.uniform(0.12, 0.25) * side, rng.uniform(0.04, 0.1) * side, rng)
    weights = opacity + 1e-9
    mean = (image * weights[..., None]).sum(axis=(0, 1)) / weights.sum()
    level = _contrasting_level(image, opacity, (rng.uniform(15, 40) + 0.3 * contrast(image)) * scale, rng)
    content = mean + (level - mean.mean()) + rng.uniform(0.55, 1.0) * (image - mean)
    if (image != image[..., :1]).any():
        content = content + rng.uniform(-15, 15, 3)
    return content, opacity


def _missing_texture(
    image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float
) -> tuple[Array, Array]:
    height, width, _ = image.shape
    side = size * min(height, width)
    radius = max(4.0, rng.uniform(0.08, 0.2) * side) * scale
    opacity = _blob(height, width, radius, max(1.5, 0.02 * side), rng)
    if rng.uniform() < 0.5:
        sigma = rng.uniform(0.04, 0.1) * side
        content = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="reflect")
    else:
        weights = opacity + 1e-9
        content = np.broadcast_to((image * weights[..., None]).sum(axis=(0, 1)) / weights.sum(), image.shape)
    camera_noise = rng.normal(0, 1.5, (height, width, 1))
    return content + camera_noise, opacity


def _foreign_patch(
    image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float
) -> tuple[Array, Array]:
    height, width, _ = image.shape
    side = size * min(height, width)
    radius = max(4.0, rng.uniform(0.08, 0.18) * side) * scale
    return foreign, _blob(height, width, radius, max(1.5, rng.uniform(0.01, 0.03) * side), rng)


def _perlin_blend(
    image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float
) -> tuple[Array, Array]:
    """DRAEM's anomaly (Zavrtanik et al., ICCV 2021): thresholded Perlin noise shows a foreign texture.

    The threshold is the noise's own quantile, which bounds the defect's area: 3-12 % of the image at scale and size 1.
    """
    height, width, _ = image.shape
    rows, columns = (min(length // 2, round(int(rng.integers(2, 6)) / size)) for length in (height, width))
    noise = _perlin(height, width, (rows, columns), rng)
    threshold = np.quantile(noise, 1 - min(0.3, rng.uniform(0.03, 0.12) * scale * size**2))
    opacity = ndimage.gaussian_filter((noise > threshold).astype(np.float64), 0.5, truncate=2.0)
    return foreign, opacity * min(1.0, rng.uniform(0.2, 0.8) * scale)


def _moved_piece(
    image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float
) -> tuple[Array, Array]:
    """CutPaste's anomaly (Li et al., CVPR 2021): a piece of the photograph itself, turned and laid elsewhere.

    Nothing in it is foreign, only its place: what finds it must know what belongs where.
    """
    height, width, _ = image.shape
    side = size * min(height, width)
    radius = min(max(4.0, rng.uniform(0.06, 0.25) * side) * scale, 0.3 * side)
    opacity = _blob(height, width, radius, 1.5, rng)
    centre = np.array(ndimage.center_of_mass(opacity + 1e-9))
    source = rng.uniform(0.15, 0.85, 2) * [height, width]
    turn = rng.uniform(-np.pi, np.pi) if rng.uniform() < 0.5 else rng.normal(0, 0.2)
    offset = np.indices((height, width)) - centre[:, None, None]
    rows = source[0] + np.cos(turn) * offset[0] - np.sin(turn) * offset[1]
    columns = source[1] + np.sin(turn) * offset[0] + np.cos(turn) * offset[1]
    return _sampled(image, rows, columns), opacity


def _bent(image: Array, foreign: Array, rng: np.random.Generator, scale: float, size: float) -> tuple[Array, Array]:
    """A part pushed sideways by up to 3-9 % of the side, its surroundings stretched; opaque where that shows."""
    height, width, _ = image.shape
    side = size * min(height, width)
    reach = rng.uniform(0.08, 0.2) * side * scale
    centre = rng.uniform(0.1, 0.9, 2) * [height, width]
    rows, columns = np.indices((height, width)).astype(np.float64)
    window = np.exp(-0.5 * ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / reach**2)
    heading, push = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.09) * side * scale * window
    content = _sampled(image, rows + np.sin(heading) * push, columns + np.cos(heading) * push)
    shows = np.abs(content - image).max(axis=2) * window
    opacity = np.clip(ndimage.gaussian_filter(shows, 0.005 * side) / 10 - 0.5, 0, 1)
    # Where nothing could show that it was bent, what else is done to the content has to.
    return content, opacity if opacity.max() > 0.5 else np.clip(4 * window - 2, 0, 1)


def _sampled(image: Array, rows: Array, columns: Array) -> Array:
    """The image (H, W, 3) at fractional rows and columns (H, W), bilinear, edges reflected."""
    return np.stack(
        [ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode="reflect") for c in range(3)], axis=2
    )


PAINTERS: dict[str, Painter] = {
    "scratch": _scratch,
    "spot": _spot,
    "stain": _stain,
    "missing_texture": _missing_texture,
    "foreign_patch": _foreign_patch,
    "perlin_blend": _perlin_blend,
    "moved_piece": _moved_piece,
    "bent": _bent,
}

STRUCTURE = ("moved_piece", "bent")
"""Kinds that show nothing foreign, only the photograph's own content where it does not belong; the others are marks."""

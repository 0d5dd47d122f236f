"""The normal photographs of a training run: which are trained on, which are held out, and what names them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.config import TrainingConfig
from pipeline.datasets import Record
from pipeline.errors import UserError
from pipeline.images import ImageError, decode, resize
from pipeline.storage import Location

FEWEST_IMAGES = 8
"""Normal images below which a category cannot be both trained and calibrated."""

Load = Callable[[list[Record], int], np.ndarray]
"""load(records, side): the photographs decoded and shrunk, uint8 (N, side, side, 3), in memory or the pages of a file."""


@dataclass(frozen=True)
class TrainingImages:
    """Decoded photographs of one category, or of all that share a network."""

    training: np.ndarray
    """Of all categories one after the other, uint8 (N, side, side, 3)."""
    parts: dict[str, slice]
    """Where a category's lie in `training`."""
    held_out: dict[str, np.ndarray]
    """A category's photographs kept for calibration, uint8 (n, side, side, 3)."""
    names: dict[str, list[str]]
    """Addresses of a category's photographs: of those in `training`, then of those held out."""
    fingerprint: str
    """As `data_fingerprint` of all photographs in the order of their records."""

    @property
    def labels(self) -> np.ndarray:
        """The category of every training photograph as a number, in the order of `parts`; int64 (N,)."""
        return np.repeat(np.arange(len(self.parts)), [part.stop - part.start for part in self.parts.values()])


def load_training_images(
    records: Mapping[str, list[Record]], training: TrainingConfig, side: int, load: Load
) -> TrainingImages:
    """Split every category's photographs and load them. Raises UserError where there are too few or one cannot be read."""
    splits = {}
    for category, found in records.items():
        if len(found) < FEWEST_IMAGES:
            raise UserError(
                f"category {category!r} has {len(found)} normal training images: at least {FEWEST_IMAGES} are needed"
            )
        splits[category] = split_holdout(len(found), training.holdout_fraction, training.seed)
    images = load([records[category][i] for category, (kept, _) in splits.items() for i in kept], side)
    held_out = {
        category: load_photographs([records[category][i] for i in out], side) for category, (_, out) in splits.items()
    }
    ends = np.cumsum([len(kept) for kept, _ in splits.values()])
    parts = {
        category: slice(int(end) - len(kept), int(end))
        for (category, (kept, _)), end in zip(splits.items(), ends, strict=True)
    }
    in_order: list[np.ndarray] = []
    for category, (kept, out) in splits.items():
        places = dict(zip(kept, images[parts[category]], strict=True)) | dict(zip(out, held_out[category], strict=True))
        in_order += [places[i] for i in range(len(places))]
    names = {
        category: [records[category][i].image.uri for i in (*kept, *out)] for category, (kept, out) in splits.items()
    }
    return TrainingImages(images, parts, held_out, names, data_fingerprint(in_order))


def split_holdout(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` normal images -> (training, held out for calibration), both sorted; 4 to 200 are held out."""
    held_out = min(200, max(4, round(count * fraction)))
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def load_photographs(records: list[Record], side: int) -> np.ndarray:
    """Decode and shrink to uint8 (N, side, side, 3). Raises UserError naming the first image that cannot be read."""
    images = np.empty((len(records), side, side, 3), np.uint8)

    def load(place: int) -> None:
        images[place] = load_photograph(records[place].image, side)

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(load, range(len(records))):
            pass
    return images


def load_photograph(image: Location, side: int) -> np.ndarray:
    """One photograph, uint8 (side, side, 3). Raises UserError where it cannot be read."""
    try:
        return resize(decode(image.read_bytes()), side)
    except (ImageError, FileNotFoundError) as error:
        raise UserError(f"{image}: {error}: replace or remove it") from error


def data_fingerprint(images: Sequence[np.ndarray] | np.ndarray) -> str:
    """Sixteen hex digits naming decoded photographs, each uint8 (side, side, 3)."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:16]


def files_fingerprint(records: Sequence[Record]) -> str:
    """Sixteen hex digits that change when one of the files is added, removed or replaced; nothing is read but listings.

    On S3 it is the content that counts (ETags), elsewhere size and time.
    """
    folders = {record.image.parent for record in records}
    listings = {folder: folder.listing() for folder in folders}
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: record.image):
        info = listings[record.image.parent].get(record.image.name)
        digest.update(f"{record.category}\0{record.image.name}\0{info and info.fingerprint}\0".encode())
    return digest.hexdigest()[:16]

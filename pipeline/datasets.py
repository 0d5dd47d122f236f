"""Labelled photograph collections in their published folder layouts, read as one kind of record."""

from __future__ import annotations

import csv
import difflib
import io
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, get_args

from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.storage_checks import require_exists

Layout = Literal["mvtec", "btad", "visa", "dtd", "folder"]
"""How a collection lies in folders, where C is a category:

mvtec   ``C/train/good``, ``C/test/<defect>``, ``C/ground_truth/<defect>/<stem>_mask.png`` or ``<stem>.png``
btad    ``C/train/ok``, ``C/test/{ok,ko}``, ``C/ground_truth/ko/<stem>.{png,bmp}``
visa    ``split_csv/1cls.csv`` with the columns object, split, label, image, mask; paths start at the root
dtd     DTD-Synthetic: as mvtec
folder  ``C/*``, all normal; or ``C/train/**``, all normal, with ``C/test/{good,<defect>}`` and masks as mvtec

All but visa also take a root that is one category itself; it is named after the folder.
"""

Split = Literal["train", "test"]

_IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"))
_NORMAL_FOLDERS = frozenset(("good", "ok"))
_VISA_SPLIT = "split_csv/1cls.csv"
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_DTD_NAME = re.compile(r"[A-Z][a-z]+_\d{3}")


@dataclass(frozen=True)
class Record:
    """One photograph with what is known of it."""

    image: Location
    mask: Location | None
    """An image, above zero on the defect. None for a normal image and where no mask was drawn."""
    category: str
    split: Split
    defect: str
    """The kind of defect as the collection calls it; "good" for a normal image."""

    @property
    def is_normal(self) -> bool:
        return self.defect == "good"


def detect_layout(root: Location) -> Layout:
    """The layout of the folders under ``root``. Raises UserError where none fits or nothing is there."""
    require_exists(root, "dataset")
    if (root / _VISA_SPLIT).is_file():
        return "visa"
    folders = _visible_folders(root)
    for category in [root] if "train" in folders else folders.values():
        kinds = _visible_folders(category / "train")
        if "good" in kinds:
            return "dtd" if _DTD_NAME.fullmatch(category.name) else "mvtec"
        if "ok" in kinds:
            return "btad"
    if _category_names(root, "folder"):
        return "folder"
    raise UserError(
        f"dataset {root} has none of the layouts {', '.join(get_args(Layout))}: "
        "check that the path is the folder around the categories, or name one with --layout"
    )


def categories(root: Location, layout: Layout) -> list[str]:
    """The category names, sorted. Raises UserError where there is none."""
    require_exists(root, "dataset")
    names = sorted({row["object"] for row in _visa_rows(root)}) if layout == "visa" else _category_names(root, layout)
    if not names:
        raise UserError(f"dataset {root} has no category in the layout {layout}: check the path and --layout")
    return names


def records(root: Location, layout: Layout, category: str) -> list[Record]:
    """All records of one category: training ones first, then by image URI.

    Takes one recursive listing of the category; VisA's images are taken from its table, unseen. Raises
    UserError for an unknown category, naming those that exist, and for a test image in no labelled folder.
    """
    require_exists(root, "dataset")
    if layout == "visa":
        found = [_visa_record(root, row) for row in _visa_rows(root) if row["object"] == category]
    else:
        found = _folder_records(root / category, layout, category)
        if not found and category == root.name:
            found = _folder_records(root, layout, category)
    if not found:
        _require_known(category, categories(root, layout), root)
    return sorted(found, key=lambda record: (record.split != "train", record.image))


def training_records(root: Location, layout: Layout, category: str) -> list[Record]:
    """The normal images to train on, never empty. Raises UserError where there is none."""
    found = [r for r in records(root, layout, category) if r.split == "train" and r.is_normal]
    if found:
        return found
    where = {"visa": f"list them in {_VISA_SPLIT}", "btad": "put them into its train/ok"}
    remedy = where.get(layout, "put them into its train/good")
    raise UserError(f"category '{category}' of {root} has no normal training images: {remedy}")


def labelled_records(root: Location, layout: Layout, category: str) -> list[Record]:
    """The test images, never empty, each defective one with its mask. Raises UserError otherwise."""
    found = [r for r in records(root, layout, category) if r.split == "test"]
    if not found:
        raise UserError(f"category '{category}' of {root} has no test images: evaluation needs a labelled test split")
    bare = [r for r in found if not r.is_normal and r.mask is None]
    if bare:
        remedy = (
            f"fill in the mask column of {_VISA_SPLIT}"
            if layout == "visa"
            else f"add ground_truth/{bare[0].defect}/{_stem(bare[0].image.name)}_mask.png and the like"
        )
        raise UserError(
            f"{len(bare)} defective test images of '{category}' have no mask, first {bare[0].image}: {remedy}"
        )
    return found


def _folder_records(folder: Location, layout: Layout, category: str) -> list[Record]:
    paths = ((file.relative_to(folder), file) for file in folder.files(recursive=True))
    images = {path: file for path, file in paths if _is_image(path)}
    masks = {
        _stem(path.removeprefix("ground_truth/")): file
        for path, file in images.items()
        if path.startswith("ground_truth/")
    }
    loose = layout == "folder" and not any(path.startswith("train/") for path in images)
    found = []
    for path, image in images.items():
        top, _, rest = path.partition("/")
        if (top == "train" and rest and layout == "folder") or (not rest and loose):
            found.append(Record(image, None, category, "train", "good"))
        elif top in ("train", "test") and rest:
            found.append(_sorted_record(image, rest, masks, category, "train" if top == "train" else "test"))
    return found


def _sorted_record(image: Location, path: str, masks: dict[str, Location], category: str, split: Split) -> Record:
    """The record of an image at ``<defect>/<name>`` in its split; ``masks`` go by path without suffix."""
    defect, _, name = path.partition("/")
    if not name:
        raise UserError(f"{image} has no label: move it to {split}/good or {split}/<defect>, or try --layout folder")
    if defect in _NORMAL_FOLDERS:
        return Record(image, None, category, split, "good")
    stem = _stem(path)
    return Record(image, masks.get(f"{stem}_mask") or masks.get(stem), category, split, defect)


def _visa_rows(root: Location) -> list[dict[str, str]]:
    table = root / _VISA_SPLIT
    require_exists(table, "VisA's table")
    rows = csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig")))
    missing = [column for column in _VISA_COLUMNS if column not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{table} lacks the columns {', '.join(missing)}: it needs {','.join(_VISA_COLUMNS)}")
    return list(rows)


def _visa_record(root: Location, row: dict[str, str]) -> Record:
    if row["split"] not in ("train", "test"):
        raise UserError(f"{root / _VISA_SPLIT} has the split '{row['split']}': it must be train or test")
    normal = row["label"] == "normal"
    return Record(
        image=root / row["image"],
        mask=root / row["mask"] if row["mask"] and not normal else None,
        category=row["object"],
        split="train" if row["split"] == "train" else "test",
        defect="good" if normal else row["label"],
    )


def _category_names(root: Location, layout: Layout) -> list[str]:
    folders = _visible_folders(root)
    if "train" in folders:
        return [root.name]
    loose = layout == "folder"
    names = [name for name, folder in folders.items() if _has_splits(folder) or (loose and _holds_images(folder))]
    return sorted(names) or ([root.name] if loose and _holds_images(root) else [])


def _has_splits(folder: Location) -> bool:
    return not {"train", "test"}.isdisjoint(_visible_folders(folder))


def _require_known(category: str, known: list[str], root: Location) -> None:
    if category in known:
        return
    close = difflib.get_close_matches(category, known, n=1)
    guess = f"; did you mean '{close[0]}'?" if close else ""
    raise UserError(f"dataset {root} has no category '{category}', it has: {', '.join(known)}{guess}")


def _visible_folders(folder: Location) -> dict[str, Location]:
    return {child.name: child for child in folder.folders() if not _is_hidden(child.name)}


def _holds_images(folder: Location) -> bool:
    return any(_is_image(file.name) for file in folder.files())


def _is_image(path: str) -> bool:
    hidden = any(_is_hidden(part) for part in path.split("/"))
    return not hidden and PurePosixPath(path).suffix.lower() in _IMAGE_SUFFIXES


def _is_hidden(name: str) -> bool:
    # macOS adds "__MACOSX" folders and "._name" files to archives.
    return name.startswith(".") or name == "__MACOSX"


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))

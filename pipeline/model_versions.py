"""The versions of every category's model: what is there, which one is in use, and going back to an older one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model_store import ModelInfo, model_info
from pipeline.storage import Location
from pipeline.storage_checks import require_exists


@dataclass(frozen=True)
class StoredVersion:
    """One version of a category's model."""

    category: str
    version: str
    in_use: bool
    pinned: bool
    """In use until people say otherwise; what is trained meanwhile is stored beside it."""
    info: ModelInfo | None
    """None where it cannot be read."""
    problem: str = ""
    """Why it cannot be read."""


def stored_versions(models: Location, category: str) -> list[StoredVersion]:
    """All versions, oldest first; those without `model.json` are unfinished and not among them."""
    pointer = _pointer(models, category)
    found = []
    for folder in (models / category).folders():
        if not (folder / "model.json").is_file():
            continue
        in_use = folder.name == pointer.get("version")
        pinned = in_use and bool(pointer.get("pinned"))
        try:
            info, problem = model_info(models, category, folder.name), ""
        except UserError as error:
            info, problem = None, str(error)
        found.append(StoredVersion(category, folder.name, in_use, pinned, info, problem))
    return sorted(found, key=lambda stored: stored.version)


def trained_categories(models: Location) -> list[str]:
    """Categories with a stored version, sorted. Raises UserError where the folder does not exist."""
    require_exists(models, "models folder")
    return [folder.name for folder in models.folders() if not folder.name.startswith("_") and folder.folders()]


def publish(models: Location, category: str, version: str, *, instead_of: str | None = None) -> bool:
    """Put a newly trained version in use, unless people pinned another, or `instead_of` is given and no longer the one in
    use; returns whether it was kept back."""

    def change(pointer: dict[str, object]) -> dict[str, object] | None:
        superseded = instead_of is not None and pointer.get("version") != instead_of
        return None if pointer.get("pinned") or superseded else {"version": version}

    return _use(models, category, change)["version"] != version


def promote(models: Location, category: str, version: str) -> None:
    """Put this stored version in use; where one was pinned, this is pinned now. Raises UserError if it is not there."""
    model_info(models, category, version)
    if not (models / category / version / "weights.safetensors").is_file():
        raise UserError(
            f"version {version} of category {category!r} in {models} has no weights: choose another (--list)"
        )
    _use(models, category, lambda pointer: pointer | {"version": version})


def pin(models: Location, category: str) -> str:
    """Keep the version in use until `unpin` or `promote`, whatever is trained; returns it. UserError where none is in use."""
    model_info(models, category)
    return str(_use(models, category, lambda pointer: pointer | {"pinned": True})["version"])


def unpin(models: Location, category: str) -> str:
    """Let the next training put its model in use again; returns the version in use. UserError where none is."""
    model_info(models, category)
    return str(_use(models, category, lambda pointer: pointer | {"pinned": False})["version"])


def networks_in_use(
    models: Location, group: tuple[str, ...], config: Config, initial_weights: str | None
) -> tuple[str, ...]:
    """The versions in use of categories that share a network, or of one alone. Raises UserError where that is not what is
    asked for: other settings than those of scoring, categories, or weights (URI) that it started from."""
    versions = []
    for category in group:
        info = model_info(models, category)
        stored, asked = (each.model_dump(mode="json", exclude={"preset", "scoring"}) for each in (info.config, config))
        stored["features"], asked["features"] = info.config.features.of_network(), config.features.of_network()
        stored |= {"scoring.map_size": info.config.scoring.map_size, "categories": info.classes}
        stored["initial_weights"] = info.provenance.get("initial_weights")
        asked |= {"scoring.map_size": config.scoring.map_size, "categories": group if config.joint else None}
        asked["initial_weights"] = initial_weights
        differing = [name for name, value in asked.items() if stored[name] != value]
        if differing:
            raise UserError(
                f"{category} {info.version} was trained with other {', '.join(differing)} (preset {info.config.preset}): "
                "give the same, or leave out --calibrate-only to train"
            )
        versions.append(info.version)
    return tuple(versions)


def up_to_date(models: Location, category: str, settings_digests: set[str], files_fingerprint: str) -> bool:
    """Whether one of these settings was trained on these files already: by the model in use, or where that is pinned
    by the newest one."""
    pointer = _pointer(models, category)
    version = pointer.get("version")
    if pointer.get("pinned"):
        finished = [folder.name for folder in (models / category).folders() if (folder / "model.json").is_file()]
        version = max(finished, default=None)
    if not isinstance(version, str):
        return False
    try:
        info = model_info(models, category, version)
    except UserError:
        return False
    known = info.provenance
    return (
        not info.outdated
        and known.get("settings_digest") in settings_digests
        and known.get("files_fingerprint") == files_fingerprint
    )


def _pointer(models: Location, category: str) -> dict[str, object]:
    try:
        return _parsed((models / category / "latest.json").read_bytes())
    except FileNotFoundError:
        return {}


def _parsed(data: bytes) -> dict[str, object]:
    """A pointer; {} where it is damaged, since nobody could say which version was in use."""
    try:
        pointer = json.loads(data)
    except ValueError:
        return {}
    return pointer if isinstance(pointer, dict) else {}


def _use(
    models: Location, category: str, change: Callable[[dict[str, object]], dict[str, object] | None]
) -> dict[str, object]:
    """Change the pointer to the version in use, None for as it is; whatever others change meanwhile is changed in turn.

    Returns the pointer that is there now.
    """
    file = models / category / "latest.json"
    while True:
        try:
            stored = file.read_stored()
        except FileNotFoundError:
            wanted = change({}) or {}
            if file.create_bytes(json.dumps(wanted).encode()):
                return wanted
            continue
        pointer = _parsed(stored.data)
        wanted = change(pointer) or pointer
        if wanted == pointer or file.replace_if(stored.version, json.dumps(wanted).encode()):
            return wanted

"""Trained categories on storage: weights and calibration as safetensors, everything else as JSON you can read.

MODELS/<category>/<version>/weights.safetensors
MODELS/<category>/<version>/model.json      config, calibration, provenance, ways of scoring tried; written after the weights
MODELS/<category>/latest.json               {"version": ...}; written last. With "pinned": true, training leaves it alone

Nothing here needs torch: planning, listing and reading archives start sooner without it. Weights are in model_weights.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from typing import Any

from pydantic import ValidationError

from pipeline import __version__
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.storage_checks import require_exists

FORMAT = 9
"""Version of the files' layout; a reader refuses a higher one. 8 may measure features by kinds of cells, 9 by what is usual of
these at a place."""
CONTEXT_APART = 6
"""The first format whose networks do not predict context, and whose kept cells are the extractor's own."""
FOLDED = 7
"""The first format whose extractors have their batch norms folded, and round their features so."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a stored model without reading its weights."""

    location: Location
    category: str
    version: str
    config: Config
    calibration: dict[str, float]
    """alpha, top_pixels, thresholds, and the interval of the rate of false alarms."""
    subtract_prediction: bool
    """Whether the feature branch measures features minus their prediction."""
    context_weight: float
    """Weight of the deeper stages in the feature branch."""
    classes: tuple[str, ...] | None
    """The categories that share the network, in the order of their labels; None for a network of its own."""
    provenance: dict[str, Any]
    """Where it comes from: data, counts, losses, package versions, time."""
    normal_scores: tuple[float, ...] = ()
    """Scores of the normal photographs that the threshold comes from, ascending; none in models of early releases."""
    reach: int = 0
    """Cells that a part may lie from its place; none in models of early releases."""
    turned: bool = False
    """Whether the Gaussians of the features' places or kinds learned from turned photographs, too."""
    predicts_context: bool = False
    """Whether its network predicts the context stages, too, which nobody asks it for: models of early releases."""
    folded: bool = True
    """Whether it was calibrated with an extractor whose batch norms are folded; not in models of earlier releases."""

    @property
    def outdated(self) -> bool:
        """Whether it was calibrated for a measure that this release no longer has; its network is as good as ever."""
        return self.predicts_context and self.context_weight > 0


def new_version(config: Config, now: datetime) -> str:
    """A version sorts by time and names its settings: 20260131T093000Z-<config digest>."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{config.digest()}"


def package_versions() -> dict[str, str]:
    """The versions that decide what a model computes."""
    others = {name: package_version(name) for name in ("torch", "timm", "numpy", "pillow", "ray")}
    return {"defectmap": __version__, **others}


def replace_threshold(
    info: ModelInfo,
    threshold: float,
    *,
    rate: float,
    false_alarms: tuple[float, float],
    reason: Mapping[str, Any],
    now: datetime,
) -> str:
    """Put a copy of the model in use in use instead, with another threshold of the image score; returns its version.

    rate: the share of normal images it was chosen for, and `false_alarms` the interval of what it may really be; `reason`
    goes to the provenance. Raises UserError, and changes nothing in use, where another version has come into use.
    """
    assert not info.outdated, "a model that cannot score proposes no threshold"
    models = info.location.parent.parent
    config = info.config.model_copy(
        update={"scoring": info.config.scoring.model_copy(update={"false_alarm_rate": rate})}
    )
    version = new_version(config, now)
    folder, latest = models / info.category / version, models / info.category / "latest.json"
    if folder.exists():
        raise UserError(f"{folder} is there already: try again in a second")
    used = latest.read_stored()
    meanwhile = UserError(
        f"another model of {info.category!r} came into use meanwhile: score a night with it and review that"
    )
    pointer = json.loads(used.data)
    if pointer["version"] != info.version:
        raise meanwhile
    (info.location / "weights.safetensors").copy_to(folder / "weights.safetensors")
    low, high = false_alarms
    numbers = {"threshold": threshold, "false_alarms_low": low, "false_alarms_high": high}
    text = (info.location / "model.json").read_json()
    (folder / "model.json").write_json(
        text
        | {
            "version": version,  # and the format stays: it says how the weights are to be read
            "config": config.model_dump(mode="json"),
            "calibration": info.calibration | numbers,
            "provenance": info.provenance | {"recalibrated": {**reason, "weights_of": weights_of(info)}},
        }
    )
    # Training may have published while the weights were copied: a copy of the model before it must not take its place.
    if not latest.replace_if(used.version, json.dumps(pointer | {"version": version}).encode()):
        for name in ("model.json", "weights.safetensors"):
            (folder / name).remove()
        raise meanwhile
    return version


def weights_of(info: ModelInfo) -> str:
    """The trained version that gives the same scores: its own unless it was made by `replace_threshold`."""
    return str(info.provenance.get("recalibrated", {}).get("weights_of", info.version))


def model_categories(models: Location) -> list[str]:
    """Categories that have a latest model, sorted. Raises UserError when there is none."""
    require_exists(models, "models folder")
    found = [folder.name for folder in models.folders() if (folder / "latest.json").is_file()]
    if not found:
        raise UserError(f"{models} holds no trained category: run jobs/train_all.py --models {models} first")
    return found


def scoring_model(models: Location, category: str) -> ModelInfo:
    """The model in use, to score with. Raises UserError as model_info does, and where its calibration is outdated."""
    info = model_info(models, category)
    if info.outdated:
        raise UserError(
            f"{info.location} was calibrated for what this release measures otherwise: "
            "run jobs/train_all.py with --calibrate-only, or train the category again"
        )
    return info


def model_info(models: Location, category: str, version: str | None = None) -> ModelInfo:
    """The named version of a category's model, by default the latest. Raises UserError when it is not there or not readable."""
    require_exists(models, "models folder")
    try:
        version = version or (models / category / "latest.json").read_json()["version"]
        folder = models / category / str(version)
        text = (folder / "model.json").read_json()
        newer, trained_for = text["format"] > FORMAT, text["category"]
    except FileNotFoundError as error:
        known = model_categories(models)
        if category in known:
            raise UserError(f"category {category!r} in {models} has no version {version}: train it again") from error
        there = ", ".join(known)
        raise UserError(f"no model of category {category!r} in {models} (there: {there}): train it first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the model of {category!r} in {models} is damaged ({error}): train it again") from error
    if newer:
        raise UserError(f"{folder} has format {text['format']}, newer than this release reads: upgrade defectmap")
    if trained_for != category:
        raise UserError(
            f"{folder} was trained for category {trained_for!r}, not {category!r}: "
            "models cannot be renamed; train that category"
        )
    try:
        config = Config.model_validate(text["config"])
        classes = None if text["classes"] is None else tuple(text["classes"])
        return ModelInfo(
            location=folder,
            category=category,
            version=text["version"],
            config=config,
            calibration=text["calibration"],
            subtract_prediction=text["subtract_prediction"],
            context_weight=text["context_weight"],
            classes=classes,
            provenance=text["provenance"],
            normal_scores=tuple(text.get("normal_scores", ())),
            reach=text.get("reach", 0),
            turned=text.get("turned", False),
            predicts_context=text["format"] < CONTEXT_APART and bool(config.features.context_stages),
            folded=text["format"] >= FOLDED,
        )
    except (ValidationError, KeyError) as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{folder}/model.json does not fit this release ({first}): train the category again") from error

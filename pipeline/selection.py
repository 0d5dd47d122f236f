"""What `--select` tries: every combination of the listed settings, as networks to train and ways of scoring with each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ScoringConfig
from pipeline.errors import UserError
from pipeline.presets import PresetName, load_config

if TYPE_CHECKING:  # planning does without torch
    from pipeline.choice import Choice

DEFAULT_SPACE = ("scoring.map_sigma=[1,2,4]", "scoring.pixel_window=[1,3,5]")
"""Tried where nothing is listed: settings that need no further training."""
FIXED = ("scoring.map_size", "scoring.false_alarm_rate", "training.seed", "training.holdout_fraction")
"""Settings that are a user's wish, or under which candidates would be judged on different images."""


@dataclass(frozen=True)
class Candidate:
    """One network to train, and the ways of scoring that are tried with it."""

    config: Config
    """With the first of the ways of scoring."""
    variants: tuple[ScoringConfig, ...]
    settings: tuple[str, ...]
    """What tells it from the other networks, such as training.iterations=200."""


def candidates(preset: PresetName, overrides: Sequence[str], listed: Sequence[str]) -> list[Candidate]:
    """All combinations of settings listed as "SECTION.FIELD=[VALUE, VALUE...]". Raises UserError when one is not valid."""
    axes = []
    for item in listed:
        name, separator, text = item.partition("=")
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            values = None
        if not separator or "." not in name or not isinstance(values, list) or not values:
            raise UserError(
                f"--select {item}: expected SECTION.FIELD=[VALUE,VALUE], for example scoring.map_sigma=[1,2,4]"
            )
        if name.strip() in FIXED:
            raise UserError(f"--select {item}: {name.strip()} is chosen with --set, not by its figures")
        axes.append([f"{name}={json.dumps(value)}" for value in values])
    networks: dict[str, list[Config]] = {}
    settings: dict[str, list[str]] = {}
    for combination in itertools.product(*axes):
        config = load_config(preset, [*overrides, *combination])
        key = config.model_dump_json(exclude={"scoring"})
        networks.setdefault(key, []).append(config)
        settings[key] = [setting for setting in combination if not setting.strip().startswith("scoring.")]
    return [
        Candidate(configs[0], tuple(config.scoring for config in configs), tuple(settings[key]))
        for key, configs in networks.items()
    ]


def summary(choice: Choice, variants: Sequence[ScoringConfig] = ()) -> dict[str, Any]:
    """A choice in plain values; of its scoring settings only those in which the variants differ."""
    scoring = choice.scoring.model_dump(mode="json")
    others = [variant.model_dump(mode="json") for variant in variants]
    differing = {name: value for name, value in scoring.items() if any(other[name] != value for other in others)}
    return differing | {
        "covariance": choice.covariance,
        "subtract_prediction": choice.subtract_prediction,
        "context_weight": choice.context_weight,
        "reach": choice.reach,
        "turned": choice.turned,
        "alpha": choice.alpha,
        "top_pixels": choice.top_pixels,
        "pixel_auroc": choice.pixel_auroc,
        "pro_0.30": choice.pro,
        "image_auroc": choice.image_auroc,
    }


def best(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Of candidates by name, with figures as in `summary`, the one that finds implanted defects best; the first of equals."""
    return max(
        found, key=lambda name: sum(found[name][figure] for figure in ("pixel_auroc", "pro_0.30", "image_auroc"))
    )

"""Named settings, and settings that differ from them as command lines give them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config import (
    Config,
    FeatureConfig,
    NetworkConfig,
    RestorationConfig,
    ScoringConfig,
    TrainingConfig,
)
from pipeline.diffusion.schedules import kept_timesteps
from pipeline.errors import UserError

PresetName = Literal["demo", "fast", "texture", "gaussian", "best", "paper", "unified"]

SMALL_NETWORK = NetworkConfig(
    image_size=128,
    model_channels=32,
    channel_mult=(1, 2, 4, 6, 8),
    num_res_blocks=1,
    attention_resolutions=(8, 16),
    num_head_channels=32,
)
"""For two CPU cores."""
SHORT_TRAINING = TrainingConfig(iterations=400, batch_size=4, learning_rate=4e-4, ema_decay=0.99, max_timestep=450)
"""Some ten minutes of theirs."""
STUDIED_FEATURE_WEIGHT = 0.1
"""At 1, as published, features keep a network so busy that it learns little of noise in so few steps (pipeline/ACCURACY.md)."""

STUDIED_FEATURES = FeatureConfig(context_stages=(3, 4), input_size=512, grid=64, neighbourhood=3)
STUDIED_SCORING = ScoringConfig(
    timesteps=(5, 25),
    alpha=None,
    pixel="gaussian",
    prediction="select",
    covariance="select",
    place_reach=None,
    place_turns=None,
    kinds=512,
    context_weight=None,
    map_sigma=2.0,
    top_pixels=None,
)
"""What the CPU study found (pipeline/ACCURACY.md); what it leaves open every model chooses by itself."""

PRESETS: dict[PresetName, Config] = {
    "demo": Config(
        preset="demo",
        network=NetworkConfig(
            image_size=64,
            model_channels=32,
            channel_mult=(1, 2, 4, 6),
            num_res_blocks=1,
            attention_resolutions=(8,),
            num_head_channels=32,
        ),
        features=FeatureConfig(grid=32, neighbourhood=3),
        training=TrainingConfig(iterations=120, batch_size=8, learning_rate=4e-4, ema_decay=0.97, max_timestep=450),
        scoring=ScoringConfig(
            alpha=None,
            pixel="gaussian",
            prediction="select",
            covariance="general",
            map_sigma=4.0,
            top_pixels=None,
            batch_size=16,
        ),
    ),
    "fast": Config(
        preset="fast",
        network=SMALL_NETWORK,
        features=STUDIED_FEATURES,
        training=SHORT_TRAINING.model_copy(update={"feature_weight": STUDIED_FEATURE_WEIGHT}),
        scoring=STUDIED_SCORING,
    ),
    # For textures: restored photographs beside the given ones, conditioned; blur guidance would double the time. Smoothing is the
    # published method's; what calibration leaves open every model chooses by itself.
    "texture": Config(
        preset="texture",
        network=SMALL_NETWORK,
        features=FeatureConfig(input_size=512, grid=64, neighbourhood=5),
        training=SHORT_TRAINING.model_copy(update={"feature_weight": STUDIED_FEATURE_WEIGHT}),
        scoring=ScoringConfig(
            method="restoration",
            restoration=RestorationConfig(guidance=0.0),
            respaced_steps=40,
            timesteps=(9,),
            alpha=None,
            pixel="gaussian",
            prediction="select",
            covariance="select",
            place_turns=None,
            kinds=512,
            map_sigma=4.0,
            top_pixels=None,
        ),
    ),
    # A Gaussian of normal features at each place, after PaDiM (Defard et al. 2021), as a baseline: no training, and a network
    # that nobody asks. Unlike there directions are random ones of whitened space, the covariance is shrunk by the number of
    # photographs, and distances stay squared.
    "gaussian": Config(
        preset="gaussian",
        network=NetworkConfig(
            image_size=64,
            model_channels=32,
            channel_mult=(1, 1, 1),
            num_res_blocks=1,
            attention_resolutions=(),
            num_head_channels=32,
        ),
        features=FeatureConfig(stages=(1, 2, 3), grid=64),
        training=TrainingConfig(iterations=0),
        scoring=ScoringConfig(
            method="features",
            alpha=0.0,
            pixel="none",
            prediction="ignore",
            covariance="place",
            map_sigma=4.0,
            top_pixels=1,
        ),
    ),
    # What the CPU study found, at twice the network's resolution and width, for one data-centre GPU.
    "best": Config(
        preset="best",
        network=NetworkConfig(
            image_size=256,
            model_channels=64,
            channel_mult=(1, 2, 4, 6, 8),
            num_res_blocks=1,
            attention_resolutions=(8, 16),
            num_head_channels=64,
        ),
        features=STUDIED_FEATURES,
        training=TrainingConfig(
            iterations=3000,
            batch_size=16,
            learning_rate=3e-4,
            feature_weight=STUDIED_FEATURE_WEIGHT,
            ema_decay=0.997,
            max_timestep=450,
            checkpoint_every=500,
        ),
        scoring=STUDIED_SCORING.model_copy(update={"batch_size": 16}),
    ),
    # The published recipe; scoring.normalisation "image" is what its code does to the KL map. Its extractor's weights come
    # from a model hub: without one, set features.extractor=tf_efficientnet_lite0.
    "paper": Config(
        preset="paper",
        features=FeatureConfig(extractor="tf_efficientnet_b4", standardise=False),
        training=TrainingConfig(checkpoint_every=1000),
        scoring=ScoringConfig(normalisation="image", batch_size=8),
    ),
    "unified": Config(
        preset="unified",
        joint=True,
        features=FeatureConfig(extractor="tf_efficientnet_b4", standardise=False),
        training=TrainingConfig(iterations=20_000, checkpoint_every=1000),
        scoring=ScoringConfig(normalisation="image", batch_size=8),
    ),
}


def load_config(preset: PresetName, overrides: Sequence[str] = ()) -> Config:
    """A preset with overrides such as "training.iterations=100". Raises UserError naming field, value and remedy."""
    values: dict[str, Any] = PRESETS[preset].model_dump()
    for override in overrides:
        path, separator, text = override.partition("=")
        *sections, field = path.strip().split(".")
        target: Any = values
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if not separator or not isinstance(target, dict) or field not in target or isinstance(target[field], dict):
            raise UserError(f"--set {override}: expected SECTION.FIELD=VALUE, for example training.iterations=100")
        try:
            target[field] = json.loads(text)
        except json.JSONDecodeError:
            target[field] = text
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # fields that do not go together: the reason names them
            raise UserError(f"--set {reason}") from error
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--set {where}: {reason} (given {first['input']!r})") from error
    # Asked of new models only: stored ones score as they always did.
    scoring, limit = config.scoring, config.training.max_timestep
    highest = kept_timesteps(1000, scoring.respaced_steps)[max(scoring.timesteps)]
    if scoring.method != "features" and highest >= limit:
        raise UserError(f"--set training.max_timestep = {limit}: scoring.timesteps reach {highest} of 1000")
    return config

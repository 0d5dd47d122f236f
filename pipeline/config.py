"""Every setting of a model, typed and frozen. A model's config never changes after training.

Settings of a *job* (where data lie, how many workers) are not here: they belong to its command line.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from pipeline.diffusion.schedules import Schedule
from pipeline.errors import UserError


class Section(BaseModel):
    """A frozen group of settings; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class NetworkConfig(Section):
    """The U-Net. `channel_mult` has one entry per halving of the side; the defaults are the paper's network."""

    image_size: int = Field(256, ge=16, multiple_of=8)
    """Side of the diffused image in pixels; photographs are shrunk from `map_size` by whole factors."""
    model_channels: int = Field(256, ge=32, multiple_of=32)
    """Base width in channels."""
    channel_mult: tuple[PositiveInt, ...] = Field((1, 1, 2, 2, 4, 4), min_length=1)
    """Width of each level as a multiple of `model_channels`."""
    num_res_blocks: int = Field(2, ge=1)
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    """Down-sampling rates at which self-attention runs."""
    num_head_channels: int = Field(64, ge=8)
    """Channels per attention head."""


class FeatureConfig(Section):
    """The frozen extractor whose clean features the network predicts."""

    extractor: str = "tf_efficientnet_lite0"
    """A timm model name; tf_efficientnet_lite0/1/2 need no network connection."""
    stages: tuple[NonNegativeInt, ...] = Field((0, 1, 2, 3), min_length=1)
    """Backbone stages whose outputs are concatenated, the details."""
    context_stages: tuple[NonNegativeInt, ...] = ()
    """Stages of which cells of normal photographs are kept: deep ones, which see more of the surroundings, tell what belongs
    together, wherever it lies. The network predicts none of them."""
    input_size: int | None = Field(None, ge=32)
    """Side in pixels to which photographs are enlarged or shrunk for the extractor; null takes them as read (map_size)."""
    grid: int = Field(64, ge=4)
    """Side of the feature map in cells; `image_size / grid` must be a power of two within the U-Net."""
    neighbourhood: int = Field(1, ge=1)
    """Side of the window, in cells, over which each cell's features are averaged; odd. Context has half as many cells each way,
    so that its window is twice as wide."""
    standardise: bool = True
    """Scale each channel to zero mean and unit variance over the training images. Off: raw features, as published."""

    def of_network(self) -> dict[str, Any]:
        """What the network is trained with: only scoring looks at context."""
        return self.model_dump(mode="json", exclude={"context_stages"})


class TrainingConfig(Section):
    """Optimisation of one category."""

    iterations: int = Field(10_000, ge=0)
    """Optimiser steps; 0 for a way of scoring that does not ask the network."""
    batch_size: int = Field(2, ge=1)
    """Images per step, over all workers of the category."""
    learning_rate: float = Field(1e-4, gt=0)
    """AdamW's rate at the start, annealed linearly to 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    feature_weight: float = Field(1.0, ge=0)
    """Weight of the feature loss beside noise loss and bound."""
    ema_decay: float = Field(0.997, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones that score."""
    max_timestep: int = Field(1000, ge=1, le=1000)
    """Timesteps are drawn uniformly below this one; scoring must not look further."""
    rotation_degrees: float = Field(5.0, ge=0, le=180)
    """Each image is turned by a uniform angle up to this, either way."""
    holdout_fraction: float = Field(0.1, gt=0, lt=0.9)
    """Share of the normal images kept from training for calibration; at least 4 images."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of convolutions and products; losses, norms' statistics and the optimiser stay float32."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints."""
    seed: int = Field(0, ge=0)
    """Seeds weights, data order, angles and noise."""

    def share(self, workers: int) -> int:
        """Images of a step for each of so many workers. Raises UserError where they cannot all have as many."""
        share, rest = divmod(self.batch_size, workers)
        if rest:
            raise UserError(
                f"training.batch_size {self.batch_size} does not divide among {workers} workers: change one of them"
            )
        return share


class RestorationConfig(Section):
    """How photographs are restored where `scoring.method` is "restoration"."""

    weight: float = Field(3.0, ge=0)
    """Pull towards the photograph (w)."""
    guidance: float = Field(0.3, ge=0)
    """Push away from what the network says of the blurred image (s); 0 halves the time."""
    blur: float = Field(9.0, ge=0)
    """Of that image: standard deviation in pixels of one of 256."""
    eta: float = Field(1.0, ge=0, le=1)
    """Noise of each step: 0 none, 1 as ancestral sampling."""


class ScoringConfig(Section):
    """How a trained network's outputs become one anomaly map and one score per image."""

    method: Literal["noise", "restoration", "features"] = "noise"
    """What photographs are compared with: what the network says of their noised selves (Lu et al. 2023), what it restores them
    to (conditioned, blur-guided), or only normal features, without the network."""
    restoration: RestorationConfig = Field(RestorationConfig(), description="Where `method` is restoration.")
    respaced_steps: int = Field(250, ge=2, le=1000)
    """Length of the respaced chain."""
    timesteps: tuple[NonNegativeInt, ...] = Field((5, 50, 100), min_length=1)
    """Indices into the respaced chain at which each image is noised once, and from which it is restored if at all."""
    alpha: float | None = Field(0.5, ge=0, le=1)
    """Weight of the pixel branch; the feature branch has 1 - alpha. null: each model takes the one that finds defects
    implanted in its held-out normal images best."""
    normalisation: Literal["calibration", "maxima", "image"] = "calibration"
    """Pixel and feature maps are centred and scaled by held-out normal images, divided by their maxima, or (Lu et al.'s code)
    the KL map is scaled by each image itself."""
    kl_sigma: float = Field(0.0, ge=0)
    """Gaussian smoothing of the pixel branch before calibration, in map pixels, where `pixel` is "kl" or "distance"."""
    pixel: Literal["kl", "distance", "gaussian", "none"] = "kl"
    """The pixel branch: the KL map (published, of the method "noise"), the distance from the restored image ("restoration"),
    how far either, with the change's sign, lies from what is normal at its place, or nothing ("features")."""
    pixel_grid: int = Field(32, ge=4)
    """Side in cells of the grid on which `pixel` "gaussian" measures."""
    pixel_window: int = Field(3, ge=1)
    """Cells each way over which it averages; odd."""
    prediction: Literal["subtract", "ignore", "select"] = "subtract"
    """What the feature branch measures: features minus the network's prediction, or minus those of the restored image
    (published), the features themselves, or whichever finds defects implanted in held-out normal images best."""
    covariance: Literal["none", "general", "place", "kind", "select"] = "none"
    """How the feature branch measures: as published (plain squares, or the cosine distance from restored features),
    Mahalanobis distance under the Gaussian of normal images in general, at each place or of each kind of cell (only of features
    as they are), or whichever finds defects implanted in held-out normal images best."""
    context_weight: float | None = Field(0.0, ge=0, le=1)
    """Weight in the feature branch of how far `features.context_stages` lie from the nearest of the kept normal cells;
    `features.stages` have the rest. null: each model takes the one that finds defects implanted in its held-out normal images
    best."""
    context_cells: int = Field(2000, ge=1, le=20_000)
    """Normal cells that are kept for that; at most half of those that the training photographs have."""
    place_dimensions: int = Field(100, ge=1)
    """Random directions kept for the Gaussian of each place or kind; memory grows with the square."""
    kinds: int = Field(0, ge=0, le=4096)
    """Kinds of cells that have a Gaussian of their own where `covariance` is "kind", or where it is "select", places tell little
    of what photographs show, and kinds find implanted defects best: for textures, and products that lie in any direction.
    Memory grows with it. 0: none."""
    place_reach: int | None = Field(0, ge=0, le=8)
    """Cells, rows plus columns, that a part may lie from where it usually does: features but for context are measured under the
    Gaussian of the place so near that expects them most; time and memory grow with the square. null: each model takes none or
    one, whichever finds defects implanted in its held-out normal images best."""
    place_turns: bool | None = False
    """Whether Gaussians of places and kinds learn features as they are from photographs turned by quarter turns, too: for
    products that lie in any direction. null: each model does where places tell little of what photographs show and that finds
    defects implanted in its held-out normal images best."""
    map_sigma: float = Field(0.0, ge=0)
    """Gaussian smoothing of the final map, in map pixels."""
    map_size: int = Field(256, ge=16)
    """Side of photographs as read and of anomaly maps, in pixels; a multiple of the network's image_size."""
    top_pixels: int | None = Field(64, ge=1)
    """The image score is the mean of this many largest map values. null: each model takes the number that tells photographs
    with implanted defects from normal ones best."""
    false_alarm_rate: float = Field(0.01, gt=0, lt=0.5)
    """Share of normal images that may be called anomalous; sets the threshold from the scores of normal images."""
    batch_size: int = Field(8, ge=1)
    """Images per forward pass. Fixed (short batches are padded), so that a score never depends on its neighbours."""

    @property
    def by_place(self) -> bool:
        """Whether features are measured, or may be, by Gaussians of places."""
        return self.covariance in ("place", "select")

    @property
    def by_kind(self) -> bool:
        """Whether features as they are are measured, or may be, by Gaussians of kinds of cells."""
        return self.covariance == "kind" or (
            self.covariance == "select" and self.kinds > 0 and self.prediction != "subtract"
        )

    def named(self) -> dict[str, Any]:
        """What digests are taken of: without what these settings do not ask, and without the first method's name and no reach, so
        that models of releases that knew no other keep their digests."""
        unasked = {"noise": {"method", "restoration"}, "features": {"restoration"}}.get(self.method, set())
        if self.place_reach == 0 or not self.by_place:
            unasked |= {"place_reach"}
        if self.place_turns is False or not (self.by_place or self.by_kind):
            unasked |= {"place_turns"}
        if not self.by_kind:
            unasked |= {"kinds"}
        if self.context_weight == 0:
            unasked |= {"context_cells"}
        return self.model_dump(mode="json", exclude=unasked)


class Config(Section):
    """All settings of one category's model."""

    preset: str = "paper"
    """The preset it came from; informative."""
    joint: bool = False
    """One network for all categories of a run, told apart by class labels, instead of one per category."""
    schedule: Schedule = "linear"
    """Noise schedule over 1000 steps."""
    network: NetworkConfig = NetworkConfig()
    features: FeatureConfig = FeatureConfig()
    training: TrainingConfig = TrainingConfig()
    scoring: ScoringConfig = ScoringConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        net, rate = self.network, self.network.image_size / self.features.grid
        rates = [2**level for level in range(len(net.channel_mult))]
        if rate not in rates:
            raise ValueError(
                f"features.grid = {self.features.grid}: network.image_size ({net.image_size}) over it must be one of {rates}"
            )
        if net.image_size % rates[-1]:
            raise ValueError(f"network.image_size = {net.image_size}: must be a multiple of {rates[-1]}")
        attending = [m for m, r in zip(net.channel_mult, rates, strict=True) if r in net.attention_resolutions]
        for mult in (*attending, net.channel_mult[-1]):  # the middle of the U-Net always attends
            if mult * net.model_channels % net.num_head_channels:
                raise ValueError(
                    f"network.num_head_channels = {net.num_head_channels}: must divide {mult * net.model_channels}, "
                    "the channels of a level with attention"
                )
        if self.scoring.map_size % net.image_size:
            raise ValueError(
                f"scoring.map_size = {self.scoring.map_size}: must be a multiple of network.image_size ({net.image_size})"
            )
        if self.features.neighbourhood % 2 == 0:
            raise ValueError(f"features.neighbourhood = {self.features.neighbourhood}: must be odd")
        if self.scoring.pixel_window % 2 == 0:
            raise ValueError(f"scoring.pixel_window = {self.scoring.pixel_window}: must be odd")
        if self.scoring.pixel == "gaussian" and net.image_size % self.scoring.pixel_grid:
            raise ValueError(
                f"scoring.pixel_grid = {self.scoring.pixel_grid}: must divide network.image_size ({net.image_size})"
            )
        self._require_settings_of_the_method()
        if self.scoring.covariance == "none" and self.scoring.prediction == "ignore":
            raise ValueError('scoring.prediction = "ignore": needs a scoring.covariance other than "none"')
        if self.features.context_stages and self.scoring.covariance == "none":
            raise ValueError('features.context_stages: need a scoring.covariance other than "none"')
        if self.scoring.place_reach and not self.scoring.by_place:
            raise ValueError(
                f'scoring.place_reach = {self.scoring.place_reach}: needs scoring.covariance "place" or "select"'
            )
        by_place_or_kind = self.scoring.by_place or self.scoring.by_kind
        if self.scoring.place_turns and not (by_place_or_kind and self.scoring.prediction != "subtract"):
            raise ValueError(
                'scoring.place_turns = True: needs scoring.covariance "place", "kind" or "select", and scoring.prediction other '
                'than "subtract"'
            )
        if self.scoring.covariance == "kind" and not (self.scoring.kinds and self.scoring.prediction == "ignore"):
            raise ValueError('scoring.covariance = "kind": needs scoring.kinds, and scoring.prediction = "ignore"')
        if self.scoring.context_weight and not self.features.context_stages:
            raise ValueError(f"scoring.context_weight = {self.scoring.context_weight}: needs features.context_stages")
        if max(self.scoring.timesteps) >= self.scoring.respaced_steps:
            raise ValueError(
                f"scoring.timesteps = {self.scoring.timesteps}: each must be below respaced_steps ({self.scoring.respaced_steps})"
            )
        return self

    def _require_settings_of_the_method(self) -> None:
        scoring, method = self.scoring, self.scoring.method
        fitting = {"noise": ("kl", "gaussian"), "restoration": ("distance", "gaussian"), "features": ("none",)}[method]
        if scoring.pixel not in fitting:
            choices = " or ".join(f'"{each}"' for each in fitting)
            raise ValueError(f'scoring.pixel = "{scoring.pixel}": with scoring.method = "{method}" choose {choices}')
        if method != "restoration" and scoring.restoration != RestorationConfig():
            raise ValueError('scoring.restoration: only scoring.method = "restoration" looks at it')
        if method != "noise" and scoring.normalisation == "image":
            raise ValueError('scoring.normalisation = "image": only with scoring.method = "noise"')
        if method == "features" and (scoring.alpha, scoring.prediction) != (0.0, "ignore"):
            raise ValueError('scoring.method = "features": needs scoring.alpha = 0 and scoring.prediction = "ignore"')
        if method != "features" and self.training.iterations == 0:
            raise ValueError('training.iterations = 0: only scoring.method = "features" does without a trained network')

    def digest(self) -> str:
        """Twelve hex digits naming these settings (the preset's name aside): equal settings, equal digest."""
        named = self.model_dump(mode="json", exclude={"preset", "scoring"}) | {"scoring": self.scoring.named()}
        canonical = json.dumps(named, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

"""The ways of restoring a photograph and their settings; no torch, so that drivers know them too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config import Config
from pipeline.diffusion.schedules import kept_timesteps
from pipeline.errors import UserError


@dataclass(frozen=True)
class GradientDenoising:
    """Lu et al. 2023, algorithm 1."""

    rounds: int = 10
    """At the most; 100 as published."""
    descents: int = 5
    """Steps on the distance of features from normal ones in each round (N_d)."""
    scale: float = 0.02
    """Size of such a step (s), in units of the image's range of 2."""
    steps: int = 250
    """Length of the respaced chain."""
    index: int = 8
    """Where on it the network cleans up after each round."""
    within_regions: bool = True
    """Whether only regions that the model calls defective change."""

    @property
    def highest_index(self) -> int:
        """The noisiest place of the chain that the network is asked about."""
        return self.index


@dataclass(frozen=True)
class Conditioned:
    """Diffusion from a partly noised photograph, pulled towards it (DDAD) and away from blur (SAG)."""

    steps: int = 40
    """Length of the respaced chain: every 25th of 1000 timesteps."""
    start: int = 9
    """Index on it up to which the photograph is noised: about 250 of 1000 timesteps."""
    weight: float = 3.0
    """Pull towards the photograph (w)."""
    guidance: float = 0.3
    """Push away from what the network says of the blurred image (s)."""
    blur: float = 9.0
    """Of that image: standard deviation in pixels of one of 256."""
    eta: float = 1.0
    """Noise of each step: 0 none, 1 as ancestral sampling."""
    spare_defects: bool = True
    """Whether there is no pull where the model finds a defect."""
    within_regions: bool = True
    """Whether only regions that the model calls defective change."""

    @property
    def highest_index(self) -> int:
        """The noisiest place of the chain that the network is asked about."""
        return self.start


Method = GradientDenoising | Conditioned
MethodName = Literal["gradient", "conditioned"]


def require_able(config: Config, method: Method) -> None:
    """Raises UserError where a network of these settings cannot restore this way."""
    training = config.training
    if training.iterations == 0:
        raise UserError(
            f"a model of preset {config.preset} has no trained network to restore with: train another preset"
        )
    highest = kept_timesteps(1000, method.steps)[method.highest_index]
    if highest >= training.max_timestep:
        raise UserError(
            f"a network trained below timestep {training.max_timestep} cannot restore from {highest}: "
            "train it with a higher training.max_timestep"
        )


METHODS: dict[MethodName, Method] = {"conditioned": Conditioned(), "gradient": GradientDenoising()}
"""With the settings that did best on defects implanted in held-out normal photographs."""

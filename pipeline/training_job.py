"""What is asked of one training, and the names that follow from it. Planning needs this and no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from pipeline.config import Config, ScoringConfig
from pipeline.datasets import Layout
from pipeline.storage import Location


@dataclass(frozen=True)
class TrainingJob:
    """One network to fit: all that decides the models it becomes. Plain values, so that it travels."""

    name: str
    """What progress calls it: the category or "joint", numbered where several networks are tried."""
    categories: tuple[str, ...]
    """The category, or all that share the network."""
    dataset: Location
    layout: Layout
    models: Location
    config: Config
    initial_weights: Location | None = None
    """A published guided-diffusion checkpoint that the network starts from."""
    variants: tuple[ScoringConfig, ...] = ()
    """Ways of scoring of which the best is kept; none: the config's own."""
    versions: tuple[str, ...] = ()
    """Stored versions, one for each category, whose networks are calibrated anew; none: a network is trained."""
    publish: bool = True
    """Whether the model becomes the one in use as soon as it is stored."""
    files_fingerprint: str = ""
    """What was in the data set when the run was planned; for provenance."""
    revision: str | None = None
    """Of the source code; for provenance."""

    @property
    def run_name(self) -> str:
        """Names one interrupted run: same categories, data set, settings and start, same run."""
        start = [] if self.initial_weights is None else [self.initial_weights.fingerprint()]
        what = hashlib.sha256("\0".join([self.dataset.uri, *self.categories, *start]).encode()).hexdigest()[:8]
        name = "joint" if self.config.joint else self.categories[0]
        return f"{name}-{self.config.digest()}-{what}"

    @property
    def settings_digest(self) -> str:
        """Twelve hex digits of what was asked for: settings, ways of scoring and start. A model's own config has the choices."""
        start = [] if self.initial_weights is None else [self.initial_weights.fingerprint()]
        asked = [self.config.digest(), [way.named() for way in self.variants], start]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def run_folder(self) -> Location:
        """Where the run keeps its checkpoint until it is done."""
        return self.models / "_runs" / self.run_name

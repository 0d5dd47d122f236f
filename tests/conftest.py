"""Small shared things: tiny settings, made photographs, and one model fitted to them for the whole session."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.calibration import calibrate
from pipeline.config import Config, FeatureConfig, NetworkConfig, ScoringConfig, TrainingConfig
from pipeline.diffusion.loss import Losses
from pipeline.features import FeatureExtractor
from pipeline.fit import Fit
from pipeline.scoring import Scorer
from tests.job_runs import ROOT, make_dataset, train_tiny

pytest_plugins = ["tests.s3_server", "tests.seaweed_server"]

# Jobs under test have a Ray of their own, whatever else runs on this machine.
os.environ.setdefault("RAY_ADDRESS", "local")
# Two workers of pytest share the cores: a job gets one of them, and where it has more its threads do not look on for each other.
os.environ.setdefault("RAY_OVERRIDE_RESOURCES", '{"CPU": 1}')
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Tests are small and may run beside each other: a second thread costs more than it brings.
torch.set_num_threads(1)

LONGEST = ("test_jobs.py", "test_training_jobs.py", "test_cluster_jobs.py", "test_nights.py")
"""Files of tests that take minutes: real jobs on real Ray."""

TINY = Config(
    preset="tiny",
    network=NetworkConfig(
        image_size=16,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=32,
    ),
    features=FeatureConfig(stages=(0, 1), grid=8),
    training=TrainingConfig(
        iterations=24, batch_size=4, learning_rate=2e-3, ema_decay=0.8, max_timestep=450, precision="float32"
    ),
    scoring=ScoringConfig(
        map_size=32, batch_size=4, top_pixels=8, kl_sigma=1.0, map_sigma=1.0, covariance="general", pixel_grid=8
    ),
)


def make_photographs(count: int, seed: int, side: int = 32) -> np.ndarray:
    """Striped cloth under uneven light, uint8 (count, side, side, 3): alike, but no two the same."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    images = np.empty((count, side, side, 3), np.uint8)
    for image in images:
        stripes = 40 * np.sin(2 * np.pi * (x + rng.uniform(0, 8)) / 8)
        light = rng.uniform(-20, 20) * (y / side - 0.5)
        grey = 120 + stripes + light + rng.normal(0, 6, (side, side))
        image[:] = np.clip(grey[..., None] + [20, 0, -20], 0, 255)
    return images


@pytest.hookimpl(trylast=True)  # after pytest has brought tests with the same fixtures together
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that at the end no worker of pytest waits minutes for another's last file."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny() -> Config:
    """Settings of a model that fits in a second: float32, 16 px network, 32 px maps, batches of 4."""
    return TINY


@pytest.fixture(scope="session")
def variant() -> Callable[..., Config]:
    """variant(scoring={"alpha": 1.0}, ...): the tiny settings with some of them changed, validated."""

    def build(**sections: dict[str, object]) -> Config:
        values = TINY.model_dump()
        for section, changes in sections.items():
            values[section] |= changes
        return Config.model_validate(values)

    return build


@pytest.fixture(scope="session")
def photographs() -> np.ndarray:
    """Normal photographs to train on: uint8 (16, 32, 32, 3)."""
    return make_photographs(16, seed=1)


@pytest.fixture(scope="session")
def held_out() -> np.ndarray:
    """Normal photographs of the same kind to calibrate on: uint8 (7, 32, 32, 3); not whole batches."""
    return make_photographs(7, seed=2)


@pytest.fixture(scope="session")
def fresh() -> np.ndarray:
    """Normal photographs that no model has seen: uint8 (6, 32, 32, 3)."""
    return make_photographs(6, seed=3)


@pytest.fixture(scope="session")
def extractor() -> FeatureExtractor:
    """The first two stages of EfficientNet-Lite0 (16 + 24 channels) on an 8 x 8 grid."""
    return FeatureExtractor(TINY.features.extractor, stages=TINY.features.stages, grid=TINY.features.grid)


@pytest.fixture(scope="session")
def training_run(photographs: np.ndarray, extractor: FeatureExtractor) -> tuple[Fit, list[Losses]]:
    """A finished fit of the tiny settings and the losses of its steps. Shared: do not advance it."""
    fit, history = Fit(TINY, photographs, extractor), []
    while not fit.finished:
        history.append(fit.advance())
    return fit, history


@pytest.fixture(scope="session")
def fitted(training_run: tuple[Fit, list[Losses]]) -> Fit:
    """The fit of `training_run`."""
    return training_run[0]


@pytest.fixture(scope="session")
def scorer(fitted: Fit, held_out: np.ndarray, photographs: np.ndarray) -> Scorer:
    """The fitted model, calibrated. Shared: do not calibrate it again."""
    scorer = fitted.scorer()
    calibrate(scorer, held_out, photographs)
    return scorer


@pytest.fixture(scope="session")
def calibrated(
    fitted: Fit, variant: Callable[..., Config], held_out: np.ndarray, photographs: np.ndarray
) -> Callable[..., Scorer]:
    """calibrated(scoring={...}, ...): the fitted network under changed settings, calibrated with them."""
    built: dict[str, Scorer] = {}

    def build(**sections: dict[str, object]) -> Scorer:
        config = variant(**sections)
        if config.digest() not in built:
            denoiser = fitted.result()
            denoiser.config = config
            extractor = FeatureExtractor.of(config.features, context=True)
            built[config.digest()] = Scorer(denoiser, extractor)
            calibrate(built[config.digest()], held_out, photographs)
        return built[config.digest()]

    return build


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of two textures on disk."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def models(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of both textures."""
    return train_tiny(dataset, tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """start(job, arguments...): exit status, output and errors of that command, run in this process."""

    def run(name: str, *arguments: object) -> tuple[object, str, str]:
        script = str(ROOT / "jobs" / f"{name}.py")
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run

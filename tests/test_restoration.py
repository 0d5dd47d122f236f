"""Photographs restored by a trained tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.benchmarks.restore import VERSIONS, measure_restore, quality
from pipeline.errors import UserError
from pipeline.presets import PRESETS
from pipeline.restoration import Restorer
from pipeline.restoration_methods import METHODS, Conditioned, GradientDenoising, Method, require_able
from pipeline.scoring import Scorer

SIDE = 32


@pytest.fixture(scope="module")
def defective(fresh: np.ndarray) -> np.ndarray:
    """Four photographs, the last two with a bright patch."""
    images = fresh[:4].copy()
    images[2:, 10:18, 10:18] = (255, 40, 200)
    return images


@pytest.fixture
def sensitive(scorer: Scorer, defective: np.ndarray) -> Scorer:
    """The model with a limit that the patches exceed and the other photographs do not."""
    highest = scorer.score(defective).maps.reshape(4, -1).max(1)
    assert highest[:2].max() < highest[2:].min()
    assert scorer.calibration is not None
    limit = float(highest[:2].max() + highest[2:].min()) / 2
    calibration = replace(scorer.calibration, pixel_threshold=limit)
    return Scorer(scorer.denoiser, scorer.extractor, calibration)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_only_what_is_defective_changes(sensitive: Scorer, defective: np.ndarray, method: Method) -> None:
    restorer = Restorer(sensitive, method)
    regions = restorer.regions(sensitive.score(defective).maps)[:, 0].numpy() > 0
    found = restorer.restore(defective, range(4))
    assert (found.shape, found.dtype) == (defective.shape, np.uint8)
    assert np.array_equal(found[:2], defective[:2])
    assert regions[2:, 10:18, 10:18].mean() > 0.5
    assert not np.array_equal(found[2], defective[2])
    # Soft edges reach a little beyond a region.
    far = (
        torch.nn.functional.max_pool2d(torch.from_numpy(regions[:, None].astype(np.float32)), 5, 1, 2)[:, 0].numpy()
        == 0
    )
    assert far[2:].any()
    assert np.array_equal(found[far], defective[far])


@pytest.mark.parametrize(
    ("scoring", "features"),
    [
        ({}, {}),
        ({"covariance": "none"}, {}),
        ({"prediction": "ignore"}, {}),
        ({"covariance": "place", "place_dimensions": 7, "place_reach": 1}, {}),
        ({"covariance": "kind", "kinds": 9, "place_dimensions": 7, "prediction": "ignore"}, {}),
        ({"covariance": "general", "context_weight": 0.9}, {"context_stages": (1,)}),
    ],
    ids=str,
)
def test_gradient_denoising_lowers_the_score(
    calibrated: Callable[..., Scorer], defective: np.ndarray, scoring: dict[str, object], features: dict[str, object]
) -> None:
    scorer = calibrated(scoring=scoring, features=features)
    restorer = Restorer(scorer, GradientDenoising(rounds=4, within_regions=False))
    before, after = (
        scorer.score(images).feature_scores for images in (defective, restorer.restore(defective, range(4)))
    )
    assert (after[2:] < before[2:]).all()


def test_a_network_that_never_saw_such_noise_is_refused(calibrated: Callable[..., Scorer]) -> None:
    with pytest.raises(UserError, match="trained below timestep 100 cannot restore from 231"):
        Restorer(calibrated(training={"max_timestep": 100}, scoring={"timesteps": (5, 20)}), METHODS["conditioned"])


def test_a_model_without_a_trained_network_is_refused() -> None:
    with pytest.raises(UserError, match="preset gaussian has no trained network"):
        require_able(PRESETS["gaussian"], METHODS["gradient"])


def test_states_end_with_the_restored_photographs(sensitive: Scorer, defective: np.ndarray) -> None:
    restorer = Restorer(sensitive, Conditioned(start=3))
    states = list(restorer.states(defective, range(4)))
    assert len(states) == 4
    assert np.array_equal(states[-1], restorer.restore(defective, range(4)))


def test_noise_is_the_photographs_own(sensitive: Scorer, defective: np.ndarray) -> None:
    restorer = Restorer(sensitive, Conditioned(start=3))
    together = restorer.restore(defective, range(4))
    alone = restorer.restore(defective[3:], [3])
    assert np.abs(together[3].astype(int) - alone[0]).max() <= 1  # sums of another batch round differently
    other = restorer.restore(defective[3:], [4])
    assert not np.array_equal(other, alone)


def test_normal_photographs_cost_no_evaluation(sensitive: Scorer, defective: np.ndarray) -> None:
    restorer = Restorer(sensitive, METHODS["gradient"])
    assert not list(restorer.states(defective[:2], range(2)))
    assert restorer.evaluations == 0


def test_restoration_is_measured_against_the_clean_originals(scorer: Scorer, fresh: np.ndarray) -> None:
    measured = measure_restore(scorer, fresh[:2], seed=1)
    figures = measured.figures
    assert measured.sizes["images"] == 2 * VERSIONS
    assert figures["untouched_outside_psnr_db"] > 60 > figures["blur_outside_psnr_db"]
    assert figures["untouched_outside_ssim"] > figures["blur_outside_ssim"]
    assert figures["partial_diffusion_unet_evaluations_per_image"] == 10
    assert figures["conditioned_everywhere_unet_evaluations_per_image"] == 20
    assert figures["conditioned_everywhere_change_of_normal_grey_levels"] > 0


def test_the_clean_original_is_as_near_as_can_be(scorer: Scorer, fresh: np.ndarray) -> None:
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[:, 4:9, 4:9] = True
    found = quality(scorer, fresh[:2], fresh[:2], masks)
    assert found["inside_psnr_db"] == found["outside_psnr_db"] == pytest.approx(10 * np.log10(255**2 / 1e-2))
    assert found["inside_ssim"] == found["outside_ssim"] == pytest.approx(1)
    assert found["inside_features"] == found["outside_features"] == 0
    darker = fresh[:2].copy()
    darker[masks] -= np.minimum(darker[masks], 16)
    found = quality(scorer, fresh[:2], darker, masks)
    assert found["inside_psnr_db"] < 30
    assert found["outside_psnr_db"] > 60

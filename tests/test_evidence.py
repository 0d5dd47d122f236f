"""Evidence by restoration is what the restored photograph says; the Gaussian baseline asks the features alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipeline.calibration import calibrate
from pipeline.denoiser import Denoiser
from pipeline.diffusion.process import DiffusionProcess, at
from pipeline.diffusion.restore import conditioned_reconstruction
from pipeline.diffusion.sampling import Prediction
from pipeline.diffusion.unet import UNetOutput
from pipeline.gaussian import fit_general, fit_places
from pipeline.images import to_unit_range
from pipeline.scoring import Scorer
from pipeline.smoothing import gaussian_blur

SCALES = (2, 4)
RESTORATION = {"method": "restoration", "respaced_steps": 20, "timesteps": SCALES, "pixel": "distance"}
PUBLISHED = RESTORATION | {"covariance": "none", "normalisation": "maxima", "alpha": 0.5}


class GreyWorld(Denoiser):
    """The best denoiser where pixels are a grey, give or take a deviation: every photograph the same where that is 0."""

    grey = 0.25
    deviation = 0.0

    def predict(self, process: DiffusionProcess, x_t, t, label=None) -> UNetOutput:
        abar, variance = process.alphas_cumprod, self.deviation**2
        signal, noise = at(np.sqrt(abar), t, x_t), at(np.sqrt(1 - abar), t, x_t)
        gain = variance * signal / (signal**2 * variance + noise**2)
        x_start = self.grey + gain * (x_t - signal * self.grey)
        eps = (x_t - signal * x_start) / noise
        return UNetOutput(torch.cat([eps, torch.zeros_like(eps)], 1), None)


def grey_scorer(config, extractor, deviation: float = 0.0) -> Scorer:
    denoiser = GreyWorld(config, extractor.channels)
    denoiser.deviation = deviation
    return Scorer(denoiser, extractor)


def grey_photographs(spoiled: bool) -> np.ndarray:
    images = np.full((1, 32, 32, 3), round((0.25 + 1) * 127.5), np.uint8)
    if spoiled:
        images[0, 8:16, 8:16] = 255
    return images


def settings(weight: float) -> dict[str, object]:
    return {"weight": weight, "guidance": 0.2, "blur": 9.0, "eta": 1.0}


def test_what_restoring_changes_is_the_defect(variant, extractor):
    config = variant(scoring=PUBLISHED | {"restoration": settings(0.0)})
    evidence = grey_scorer(config, extractor).evidence(grey_photographs(spoiled=True))
    assert evidence.pixel.shape == (1, 2, 16, 16)
    assert evidence.denoising.shape == (1, 8, 8, 8)
    assert evidence.feature.shape == (1, 2, 8, 8)
    expected = torch.zeros(16, 16)
    expected[4:8, 4:8] = 0.75  # white is 1
    for distance in evidence.pixel[0]:
        torch.testing.assert_close(distance, expected, atol=5e-3, rtol=0)
    colours = evidence.denoising[0, 1:4]
    assert (colours[:, 2:4, 2:4] > 0.2).all(), "brighter than normal has its sign"
    for cosine in evidence.feature[0]:
        assert cosine[2:4, 2:4].min() > 5 * cosine[6:, 6:].max()
    assert (evidence.residuals[0, :, 2:4, 2:4].abs().mean() > 5 * evidence.residuals[0, :, 6:, 6:].abs().mean()).all()


SETTINGS = {"weight": 2.0, "guidance": 0.5, "blur": 64.0, "eta": 0.7}


@pytest.fixture(scope="module")
def random_network(variant, extractor) -> Callable[..., Scorer]:
    """random_network(label, seed=..., **settings): restoring evidence of a random network with three classes."""
    config = variant(scoring=RESTORATION)
    torch.manual_seed(0)
    denoiser = Denoiser(config, extractor.channels, num_classes=3)
    with torch.no_grad():
        for parameter in denoiser.unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def build(label: int, seed: int = 0, **settings: float) -> Scorer:
        scorer = Scorer(denoiser, extractor, label=label)
        scoring = RESTORATION | {"restoration": SETTINGS | settings}
        scorer.configure(variant(scoring=scoring, training={"seed": seed}))
        return scorer

    return build


def test_evidence_is_what_conditioned_reconstruction_gives(random_network, extractor, fresh):
    scorer = random_network(1)
    evidence = scorer.evidence(fresh[:4])
    denoiser, process = scorer.denoiser, DiffusionProcess.from_schedule("linear").respaced(20)
    x = torch.from_numpy(to_unit_range(fresh[:4]))
    start = denoiser.shrink(x)
    residuals = []
    for scale, index in enumerate(SCALES):
        draws = torch.Generator().manual_seed(scale)

        def predict(x_t, t):
            output = denoiser.unet(x_t, process.network_timesteps(t), torch.full_like(t, 1))
            return Prediction(*output.prediction.chunk(2, 1))

        with torch.no_grad():
            *_, restored = conditioned_reconstruction(
                process,
                predict,
                start,
                start=index,
                weight=2.0,
                guidance=0.5,
                blur=lambda images: gaussian_blur(images, 4.0),  # 64 of 256 pixels are 4 of 16
                noise=lambda draws=draws: torch.randn(3, 16, 16, generator=draws).expand(4, 3, 16, 16),
                eta=0.7,
            )
            change = torch.nn.functional.interpolate(restored - start, size=(32, 32), mode="bilinear")
            first, second = extractor(x).details, extractor((x + change).clamp(-1, 1)).details
        torch.testing.assert_close(evidence.pixel[:, scale], (start - restored).abs().mean(1), atol=1e-4, rtol=1e-3)
        stages = zip(first.split([16, 24], 1), second.split([16, 24], 1), strict=True)
        cosines = sum(torch.nn.functional.cosine_similarity(*pair, dim=1) for pair in stages)
        torch.testing.assert_close(evidence.feature[:, scale], 2 - cosines, atol=1e-4, rtol=1e-2)
        residuals.append(denoiser.target(first) - denoiser.target(second))
    torch.testing.assert_close(evidence.residuals, torch.stack(residuals).mean(0), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "changed", [{"weight": 0.0}, {"guidance": 0.0}, {"blur": 16.0}, {"eta": 0.0}, {"seed": 1}, {"label": 2}]
)
def test_every_setting_of_restoration_counts(random_network, fresh, changed):
    given = random_network(1).evidence(fresh[:2]).pixel
    other = random_network(**{"label": 1} | changed).evidence(fresh[:2]).pixel
    assert (given - other).abs().max() > 1e-3 * given.max()


def test_the_pull_keeps_what_is_given(variant, extractor):
    changes = []
    for weight in (0.0, 3.0, 8.0):
        config = variant(scoring=PUBLISHED | {"restoration": settings(weight)})
        evidence = grey_scorer(config, extractor, deviation=0.1).evidence(grey_photographs(spoiled=True))
        changes.append(float(evidence.pixel[0, 1, 4:8, 4:8].mean()))
    assert changes[0] > 1.1 * changes[1] > 1.1 * 1.1 * changes[2] > 0


def test_a_normal_photograph_comes_back_as_it_is(variant, extractor):
    config = variant(scoring=PUBLISHED | {"restoration": settings(1.0)})
    evidence = grey_scorer(config, extractor).evidence(grey_photographs(spoiled=False))
    assert evidence.pixel.max() < 5e-3
    assert evidence.feature.max() < 1e-3


@pytest.mark.parametrize("scoring", [PUBLISHED, RESTORATION | {"pixel": "gaussian", "covariance": "place"}])
def test_a_restored_photograph_gets_the_same_map_in_any_company(calibrated, fresh, scoring):
    scorer = calibrated(scoring=scoring)
    together = scorer.score(fresh)
    alone = scorer.score(fresh[[4, 0]])
    np.testing.assert_allclose(alone.maps.astype(float), together.maps[[4, 0]].astype(float), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(alone.scores, together.scores[[4, 0]], rtol=1e-3)


def test_maxima_of_normal_photographs_balance_the_branches(calibrated, held_out):
    scorer = calibrated(scoring=PUBLISHED | {"kl_sigma": 0.0, "map_sigma": 0.0})
    evidence = [scorer.evidence(held_out[i : i + 4]) for i in (0, 4)]
    for scale in range(2):
        pixel, feature = (torch.cat([getattr(e, name)[:, scale] for e in evidence]) for name in ("pixel", "feature"))
        assert scorer.calibration.pixel_std[scale] == pytest.approx(float(pixel.max()), rel=1e-5)
        assert scorer.calibration.feature_std[scale] == pytest.approx(float(feature.max()), rel=1e-5)
    assert not scorer.calibration.pixel_mean.any()
    assert scorer.score(held_out).maps.max() <= 1.001


def test_restoration_finds_implanted_defects(calibrated, fresh):
    scorer = calibrated(scoring=RESTORATION | {"pixel": "gaussian", "alpha": 1.0})
    spoiled = fresh.copy()
    spoiled[:, 8:16, 16:24] = 255
    maps = scorer.score(spoiled).maps.astype(float)
    assert (maps[:, 10:14, 18:22].mean((1, 2)) > 3 * maps[:, 20:, :12].mean((1, 2))).all()


class Unasked(Denoiser):
    def predict(self, process, x_t, t, label=None) -> UNetOutput:
        raise AssertionError("the network is not asked")


def test_the_gaussian_baseline_measures_features_and_asks_no_network(
    variant, extractor, fitted, held_out, photographs, fresh
):
    config = variant(
        scoring={
            **{"method": "features", "pixel": "none", "alpha": 0.0, "prediction": "ignore", "covariance": "place"},
            **{"top_pixels": 1, "map_sigma": 0.0},
        }
    )
    denoiser = Unasked(config, extractor.channels)
    denoiser.feature_mean.copy_(fitted.denoiser.feature_mean)
    denoiser.feature_std.copy_(fitted.denoiser.feature_std)
    scorer = Scorer(denoiser, extractor)
    calibrate(scorer, held_out, photographs)
    found = scorer.score(fresh)
    assert not found.kl_scores.any(), "there is no pixel branch"
    np.testing.assert_allclose(found.scores, found.feature_scores, rtol=1e-3)

    def features(images):
        return [scorer.evidence(images[i : i + 4]).features for i in range(0, len(images), 4)]

    normal = features(photographs)
    places = fit_places(normal, fit_general(normal), config.scoring.place_dimensions, config.training.seed)
    distance = torch.cat([places.distance(each) for each in features(fresh)])
    calibration = scorer.calibration
    expected = scorer.upsample((distance[:, None] - calibration.feature_mean) / calibration.feature_std)[:, 0]
    np.testing.assert_allclose(found.maps.astype(float), expected.numpy(), rtol=5e-3, atol=5e-3)

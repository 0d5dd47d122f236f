"""Maps do not depend on company, calibration centres normal images, and the small functions equal plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from pipeline.denoiser import Denoiser
from pipeline.evidence import denoising_cells, fixed_noise
from pipeline.regions import find_regions
from pipeline.scoring import Scorer, top_means
from pipeline.smoothing import gaussian_blur


def spoiled(images):
    """The images with a white patch in rows 8 to 15, columns 16 to 23."""
    images = images.copy()
    images[:, 8:16, 16:24] = 255
    return images


# ---- A photograph's map is its own ----


BY_KIND = {"covariance": "kind", "prediction": "ignore", "kinds": 40}


@pytest.mark.parametrize(("precision", "scoring"), [("float32", {}), ("bfloat16", {}), ("bfloat16", BY_KIND)])
def test_a_photograph_gets_the_same_map_in_any_company(calibrated, precision, scoring, fresh):
    scorer = calibrated(training={"precision": precision}, scoring=scoring)
    together = scorer.score(fresh)
    assert together.maps.astype(float).std(axis=0).max() > 0.1  # the photographs' maps do differ
    strange = spoiled(fresh[:1])
    arrangements = [[0], [4, 0], [0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [3, 1, 0, 2, 5, 4, 1]]
    for order in arrangements:
        alone = scorer.score(np.concatenate([strange, fresh[order]]))
        for place, image in enumerate(order, start=1):
            np.testing.assert_allclose(
                alone.maps[place].astype(float), together.maps[image].astype(float), rtol=2**-10, atol=2**-10
            )
            assert alone.scores[place] == pytest.approx(together.scores[image], rel=1e-3)
            assert alone.kl_scores[place] == pytest.approx(together.kl_scores[image], rel=1e-3)
            assert alone.feature_scores[place] == pytest.approx(together.feature_scores[image], rel=1e-3)


def test_results_come_in_order_and_in_the_stated_types(scorer, fresh):
    found = scorer.score(fresh)
    assert found.maps.shape == (6, 32, 32)
    assert found.maps.dtype == np.float16
    for scores in (found.scores, found.kl_scores, found.feature_scores):
        assert scores.shape == (6,)
        assert scores.dtype == np.float64


def test_scores_are_taken_from_the_stored_maps(scorer, fresh):
    found = scorer.score(fresh)
    largest = np.sort(found.maps.reshape(6, -1).astype(np.float64), axis=1)[:, -8:]
    np.testing.assert_allclose(found.scores, largest.mean(axis=1), rtol=1e-12)


def test_the_noise_belongs_to_the_model(tiny, variant):
    noise = fixed_noise(tiny)
    assert noise.shape == (3, 3, 16, 16)
    assert torch.equal(noise, fixed_noise(tiny))
    assert not torch.equal(noise, fixed_noise(variant(training={"seed": 1})))
    assert not torch.equal(noise[0], noise[1])


def test_evidence_has_one_entry_per_noise_scale(scorer, fresh):
    evidence = scorer.evidence(fresh[:3])
    assert evidence.pixel.shape == (3, 3, 16, 16)
    assert evidence.denoising.shape == (3, 12, 8, 8)
    assert evidence.feature.shape == (3, 3, 8, 8)
    assert evidence.residuals.shape == evidence.features.shape == (3, 40, 8, 8)
    assert (evidence.pixel >= 0).all()


@pytest.mark.parametrize(("prediction", "asked"), [("ignore", 0), ("subtract", 1)])
def test_the_feature_head_is_asked_only_by_measures_that_look_at_it(calibrated, fresh, prediction, asked):
    scorer = calibrated(scoring={"alpha": 0.5, "covariance": "general", "prediction": prediction})
    calls = []
    convolution = scorer.denoiser.unet.feature_head[-1]
    convolution.register_forward_hook(lambda *_: calls.append(1))
    scorer.score(fresh[:4])
    assert len(calls) == asked


def test_denoising_cells_are_means_over_a_window_of_cells():
    generator = torch.Generator().manual_seed(0)
    kl = torch.rand(2, 16, 16, generator=generator) + 0.1
    changed = torch.randn(2, 3, 16, 16, generator=generator)
    single = denoising_cells(kl, changed, grid=8, window=1)
    assert single.shape == (2, 4, 8, 8)
    torch.testing.assert_close(single[1, 0, 3, 4], kl[1, 6:8, 8:10].mean().log())
    torch.testing.assert_close(single[1, 2, 3, 4], changed[1, 1, 6:8, 8:10].mean())
    wide = denoising_cells(kl, changed, grid=8, window=3)
    torch.testing.assert_close(wide[1, :, 3, 4], single[1, :, 2:5, 3:6].mean((1, 2)))
    torch.testing.assert_close(wide[1, :, 0, 0], single[1, :, :2, :2].mean((1, 2)))  # borders average what there is


def test_every_measure_gives_two_maps(calibrated, fresh):
    settings = {"timesteps": (5, 50), "alpha": 0.5}
    published = calibrated(scoring=settings | {"covariance": "none"})
    evidence = published.evidence(fresh[:2])
    found = published.branch_maps(evidence, published.calibration.measure)
    assert found.pixel.shape == evidence.pixel.shape
    assert found.feature is evidence.feature
    ours = calibrated(scoring=settings | {"covariance": "place", "pixel": "gaussian", "prediction": "ignore"})
    measure = ours.calibration.measure
    found = ours.branch_maps(evidence, measure)
    assert found.pixel.shape == found.feature.shape == (2, 1, 8, 8)
    assert measure.pixel.by_place
    torch.testing.assert_close(found.pixel[:, 0], measure.pixel.distance(evidence.denoising))
    torch.testing.assert_close(found.feature[:, 0], measure.feature.distance(evidence.features))
    subtracted = ours.branch_maps(evidence, measure._replace(subtract_prediction=True))
    torch.testing.assert_close(subtracted.feature[:, 0], measure.feature.distance(evidence.residuals))


def test_maps_and_scores_equal_the_recorded_ones(calibrated, fresh):
    """What this release computes: a change here changes what stored models and thresholds mean."""
    scorer = calibrated(scoring={"pixel": "gaussian", "covariance": "place", "alpha": 0.5})
    found = scorer.score(spoiled(fresh[:2]))
    np.testing.assert_allclose(found.scores, [254.2, 238.8], rtol=5e-2)
    np.testing.assert_allclose(found.maps[0, 10, 2:30:8].astype(float), [11.0, 23.1, 251.0, 63.1], rtol=5e-2)


def test_labels_reach_a_network_with_classes(variant, extractor, fresh):
    torch.manual_seed(0)
    denoiser = Denoiser(variant(), extractor.channels, num_classes=3)
    with torch.no_grad():
        for parameter in denoiser.unet.parameters():  # no branch may stay at zero, as new ones do
            parameter.add_(0.02 * torch.randn_like(parameter))
    first, second, again = (
        Scorer(denoiser, extractor, label=label).evidence(fresh[:2]).residuals for label in (0, 2, 0)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


def test_photographs_are_shrunk_by_area_average(scorer):
    x = torch.arange(32.0).repeat(1, 3, 32, 1)
    torch.testing.assert_close(scorer.denoiser.shrink(x)[0, 0, 0], torch.arange(16) * 2 + 0.5)
    assert scorer.denoiser.shrink(x[..., :16, :16]).shape == (1, 3, 16, 16)


def test_a_defect_is_found_where_it_is(scorer, fresh):
    calibration = scorer.calibration
    assert (scorer.score(fresh).scores < calibration.threshold).all()
    found = scorer.score(spoiled(fresh))
    assert (found.scores > calibration.threshold).all()
    for anomaly_map in found.maps:
        region = find_regions(anomaly_map, calibration.pixel_threshold)[0]
        assert region.x <= 18 < 21 < region.x + region.width
        assert region.y <= 10 < 13 < region.y + region.height
        y, x = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        assert 6 <= y < 18
        assert 14 <= x < 26


def test_a_scorer_without_calibration_does_not_score(fitted, fresh):
    with pytest.raises(AssertionError, match="without calibration"):
        Scorer(fitted.result(), fitted.extractor).score(fresh)


# ---- The small functions ----


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5, 3.3])
def test_blur_equals_scipy(sigma):
    maps = np.random.default_rng(0).normal(size=(3, 24, 17))
    found = gaussian_blur(torch.from_numpy(maps), sigma).numpy()
    expected = np.stack([ndimage.gaussian_filter(m, sigma, mode="mirror", truncate=4) for m in maps])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_blur_of_small_maps_and_of_none():
    maps = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    assert gaussian_blur(maps, 0) is maps
    blurred = gaussian_blur(maps, 4.0)  # the kernel is wider than the map
    assert blurred.shape == maps.shape
    assert blurred.std() < 0.5 * maps.std()
    torch.testing.assert_close(gaussian_blur(torch.full((1, 5, 5), 3.0), 4.0), torch.full((1, 5, 5), 3.0))


def test_top_means_are_the_means_of_the_largest_values():
    maps = np.random.default_rng(1).normal(size=(4, 9, 11)).astype(np.float32)
    ordered = np.sort(maps.reshape(4, -1).astype(np.float64), axis=1)
    found = top_means(torch.from_numpy(maps), (7, 1, 1000))
    assert found.dtype == torch.float64
    expected = [ordered[:, -7:].mean(axis=1), ordered[:, -1], ordered.mean(axis=1)]  # never more than there are
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-12)

"""Training learns, resumes bit by bit, splits over ranks without changing the gradient, and repeats recorded numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.features import FeatureExtractor
from pipeline.fit import Fit, Rank, batch_indices, hash_seed, rotate
from pipeline.images import to_unit_range
from pipeline.training_images import split_holdout


def weights(fit):
    return [p.detach().clone() for p in fit.denoiser.unet.parameters()]


def assert_equal_tensors(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


# ---- Learning ----


def test_all_three_losses_fall(training_run):
    _, history = training_run
    for name, ratio in (("noise", 0.6), ("bound", 0.6), ("feature", 0.8), ("total", 0.7)):
        values = [getattr(losses, name).item() for losses in history]
        assert all(np.isfinite(values))
        assert np.mean(values[-6:]) < ratio * np.mean(values[:6]), name


def test_a_fit_ends_after_its_iterations_with_the_rate_annealed_to_nothing(training_run, tiny, photographs, extractor):
    fit, history = training_run
    assert fit.finished
    assert fit.step == len(history) == tiny.training.iterations
    rate = tiny.training.learning_rate
    assert fit.optimizer.param_groups[0]["lr"] == pytest.approx(rate / tiny.training.iterations)
    new = Fit(tiny, photographs, extractor)
    assert not new.finished
    new.advance()
    assert new.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_losses_of_the_first_steps_equal_the_recorded_ones(tiny, photographs, extractor):
    fit = Fit(tiny, photographs, extractor)
    found = [[loss.item() for loss in fit.advance()] for _ in range(3)]
    recorded = [
        [2.209131, 1.007431, 0.010444, 1.191256],
        [1.846004, 0.900220, 0.039544, 0.906240],
        [1.802360, 0.841173, 0.011578, 0.949609],
    ]
    np.testing.assert_allclose(found, recorded, rtol=1e-3)


def test_average_follows_the_weights(tiny, photographs, extractor):
    fit = Fit(tiny, photographs, extractor)
    expected = weights(fit)
    for _ in range(2):
        fit.advance()
        expected = [0.8 * old + 0.2 * new for old, new in zip(expected, weights(fit), strict=True)]
    for found, average in zip(fit.average, expected, strict=True):
        torch.testing.assert_close(found, average)


def test_result_holds_the_averaged_weights_and_the_feature_scale(fitted):
    before = weights(fitted)
    denoiser = fitted.result()
    assert_equal_tensors([p.detach() for p in denoiser.unet.parameters()], fitted.average)
    assert torch.equal(denoiser.feature_mean, fitted.denoiser.feature_mean)
    assert torch.equal(denoiser.feature_std, fitted.denoiser.feature_std)
    # A copy: neither the fit's weights nor its average are the result's.
    with torch.no_grad():
        next(denoiser.unet.parameters()).add_(1)
    assert_equal_tensors(weights(fitted), before)
    assert not torch.equal(next(denoiser.unet.parameters()), fitted.average[0])


def test_feature_targets_are_standardised_over_the_training_photographs(fitted, photographs, extractor):
    with torch.no_grad():
        target = fitted.denoiser.target(extractor(torch.from_numpy(to_unit_range(photographs))).details)
    channels = target.permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(40), atol=1e-3, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(40), atol=1e-2, rtol=0)


def test_a_network_learns_no_context_and_its_scorer_sees_some(variant, photographs, extractor):
    config = variant(features={"context_stages": (1,)})
    fit = Fit(config, photographs, extractor)
    assert fit.denoiser.feature_mean.numel() == extractor.channels == 16 + 24
    seeing = fit.scorer(FeatureExtractor.of(config.features, context=True))
    assert seeing.evidence(photographs[:2]).context.shape == (2, 24, 4, 4)
    assert fit.scorer().evidence(photographs[:2]).context is None


def test_feature_targets_stay_raw_when_asked(variant, photographs, extractor):
    fit = Fit(variant(features={"standardise": False}), photographs, extractor)
    features = torch.randn(1, 40, 8, 8)
    assert torch.equal(fit.denoiser.target(features), features)


def test_training_leaves_photographs_and_extractor_alone(tiny, photographs, extractor):
    images, tensors = photographs.copy(), [v.clone() for v in extractor.state_dict().values()]
    Fit(tiny, photographs, extractor).advance()
    np.testing.assert_array_equal(photographs, images)
    assert_equal_tensors(extractor.state_dict().values(), tensors)


# ---- Published weights ----


def test_a_fit_starts_from_published_weights(variant, photographs, extractor):
    published = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)).half()
        for name, tensor in Fit(variant(), photographs, extractor).denoiser.unet.state_dict().items()
        if not name.startswith("feature_head.")
    }
    published["label_emb.weight"] = torch.zeros(1000, 128, dtype=torch.float16)  # of other classes than ours
    for labels in (None, np.arange(16) % 2):
        fit = Fit(variant(), photographs, extractor, labels=labels, initial_weights=published)
        own = fit.denoiser.unet.state_dict()
        for name in published.keys() - {"label_emb.weight"}:
            assert torch.equal(own[name], published[name].float()), name
        assert_equal_tensors(fit.average, weights(fit))
        assert (fit.denoiser.unet.label_emb is None) == (labels is None)


def test_published_weights_of_another_network_are_refused(variant, photographs, extractor):
    with pytest.raises(UserError, match="initial weights do not fit the network of the preset: the checkpoint lacks"):
        Fit(variant(), photographs, extractor, initial_weights={"out.0.weight": torch.zeros(32)})


# ---- Resuming and ranks ----


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_fit_ends_with_the_very_same_weights(variant, photographs, extractor, precision):
    config = variant(training={"precision": precision, "iterations": 4})
    undisturbed = Fit(config, photographs, extractor)
    interrupted = Fit(config, photographs, extractor)
    for _ in range(2):
        undisturbed.advance()
        interrupted.advance()
    checkpoint = io.BytesIO()
    torch.save(interrupted.state_dict(), checkpoint)
    checkpoint.seek(0)
    resumed = Fit(config, photographs, extractor)
    torch.manual_seed(12345)  # what another process would have done with torch's own generator does not matter
    resumed.load_state_dict(torch.load(checkpoint, weights_only=True))
    assert resumed.step == 2
    before = weights(resumed)
    while not undisturbed.finished:
        undisturbed.advance()
        resumed.advance()
    assert resumed.finished
    assert_equal_tensors(weights(resumed), weights(undisturbed))
    assert_equal_tensors(resumed.average, undisturbed.average)
    assert not torch.equal(weights(resumed)[0], before[0])


def test_gradients_of_two_ranks_average_to_that_of_the_whole_batch(tiny, photographs, extractor):
    whole = Fit(tiny, photographs, extractor)
    ranks = [Fit(tiny, photographs, extractor, rank=Rank(index, 2)) for index in range(2)]
    # The output convolution starts at zero and would hide most of the network's gradient.
    with torch.no_grad():
        for fit in (whole, *ranks):
            generator = torch.Generator().manual_seed(5)
            for parameter in fit.denoiser.unet.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    losses = [fit.advance() for fit in (whole, *ranks)]
    assert losses[0].total.item() == pytest.approx((losses[1].total + losses[2].total).item() / 2, rel=1e-5)
    assert losses[1].total.item() != pytest.approx(losses[2].total.item(), rel=1e-3)
    for one, *two in zip(*(fit.denoiser.unet.parameters() for fit in (whole, *ranks)), strict=True):
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(
            (two[0].grad + two[1].grad) / 2, one.grad, rtol=1e-3, atol=1e-5 * one.grad.abs().max().item() + 1e-8
        )


def test_a_batch_that_does_not_divide_among_workers_is_refused(tiny, photographs, extractor):
    with pytest.raises(UserError, match="batch_size 4 does not divide among 3 workers"):
        Fit(tiny, photographs, extractor, rank=Rank(0, 3))


# ---- The draws ----


@pytest.mark.parametrize(("count", "batch"), [(16, 4), (10, 4), (7, 3), (3, 8)])
def test_every_photograph_is_visited_once_per_epoch(count, batch):
    steps = 2 * count  # 2 * batch whole epochs
    order = np.concatenate([batch_indices(count, step, batch, seed=0) for step in range(steps)])
    epochs = order.reshape(-1, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_depend_on_seed_and_step_alone():
    assert batch_indices(16, 3, 4, 0).tolist() == batch_indices(16, 3, 4, 0).tolist()
    assert batch_indices(16, 3, 4, 0).tolist() != batch_indices(16, 3, 4, 1).tolist()


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(100, 0.1, 10), (8, 0.1, 4), (209, 0.25, 52), (3000, 0.1, 200)]
)
def test_holdout_is_a_part_of_the_photographs_and_no_part_of_training(count, fraction, held):
    training, held_out = split_holdout(count, fraction, seed=0)
    assert len(held_out) == held
    assert sorted([*training, *held_out]) == list(range(count))
    assert (np.diff(training) > 0).all()
    assert (np.diff(held_out) > 0).all()
    again = split_holdout(count, fraction, seed=0)
    np.testing.assert_array_equal(held_out, again[1])
    assert held_out.tolist() != split_holdout(count, fraction, seed=1)[1].tolist()


def test_rotation_turns_each_image_by_its_own_angle():
    x = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, torch.tensor([0.0, 180.0, 90.0, -90.0]))
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned[1], x[1].flip(1, 2), atol=1e-5, rtol=0)
    quarter = turned[2]
    assert any(torch.allclose(quarter, x[2].rot90(k, (1, 2)), atol=1e-5) for k in (1, 3))
    torch.testing.assert_close(rotate(quarter[None], torch.tensor([-90.0]))[0], x[2], atol=1e-5, rtol=0)


def test_rotation_fills_corners_from_the_image():
    turned = rotate(torch.full((1, 3, 16, 16), 0.7), torch.tensor([5.0]))
    torch.testing.assert_close(turned, torch.full((1, 3, 16, 16), 0.7))


def test_seeds_of_steps_are_all_different_and_fit_a_generator():
    seeds = [hash_seed(seed, step) for seed in range(4) for step in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))

"""KL, likelihood, bound and hybrid loss against torch.distributions and hand-derived gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pipeline.diffusion.loss import (
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    kl_map,
    training_loss,
    variational_bound,
)
from pipeline.diffusion.process import DiffusionProcess, Gaussian

PROCESS = DiffusionProcess.from_schedule("linear", 1000)
RESPACED = PROCESS.respaced(250)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normal(gaussian):
    return Normal(gaussian.mean, (0.5 * gaussian.log_variance).exp())


def noised(process, t, seed=0):
    """x_start in [-0.9, 0.9], its noised version and the noise: float64 (len(t), 3, 4, 5)."""
    x_start = draw(len(t), 3, 4, 5, seed=seed, scale=0.2).clamp(-0.9, 0.9)
    noise = draw(len(t), 3, 4, 5, seed=seed + 1)
    return x_start, process.q_sample(x_start, t, noise), noise


def test_gaussian_kl_equals_torch_distributions():
    p = Gaussian(draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2, scale=2))
    q = Gaussian(draw(2, 3, 4, 4, seed=3), draw(2, 3, 4, 4, seed=4, scale=2))
    torch.testing.assert_close(gaussian_kl(p, q), kl_divergence(normal(p), normal(q)), rtol=1e-9, atol=1e-9)
    assert (gaussian_kl(p, p) == 0).all()


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.004, 0.7, 1.0])
@pytest.mark.parametrize("log_variance", [-12.0, -6.0, -2.0, 1.0])
def test_likelihood_is_a_distribution_over_the_256_pixel_values(mean, log_variance):
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    gaussian = Gaussian(torch.full_like(values, mean), torch.full_like(values, log_variance))
    assert discretised_gaussian_log_likelihood(values, gaussian).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_likelihood_of_a_pixel_is_the_mass_of_its_bin():
    gaussian = Gaussian(torch.tensor([0.1] * 3, dtype=torch.float64), torch.tensor([-3.0] * 3, dtype=torch.float64))
    x = torch.tensor([-1.0, 30 / 127.5 - 1, 1.0], dtype=torch.float64)
    cdf = normal(gaussian).cdf
    mass = [cdf(x + 1 / 255)[0], (cdf(x + 1 / 255) - cdf(x - 1 / 255))[1], 1 - cdf(x - 1 / 255)[2]]
    found = discretised_gaussian_log_likelihood(x, gaussian).exp()
    torch.testing.assert_close(found, torch.stack(mass), rtol=1e-9, atol=0)


def test_likelihood_of_the_impossible_stays_finite():
    x, far = torch.tensor([0.0, -1.0, 1.0]), torch.tensor([0.9, 1.0, -1.0])
    found = discretised_gaussian_log_likelihood(x, Gaussian(far, torch.full((3,), -20.0)))
    torch.testing.assert_close(found, torch.full((3,), math.log(1e-12)))


def test_kl_map_is_zero_where_the_prediction_is_perfect():
    t = torch.tensor([5, 50, 100])
    x_start, x_t, noise = noised(RESPACED, t)
    eps = noise.clone()
    eps[:, 1, 2, 3] += 0.02
    found = kl_map(RESPACED, x_start, x_t, t, eps, -torch.ones_like(eps))
    assert found.shape == (3, 4, 5)
    wrong = torch.zeros(4, 5, dtype=torch.bool)
    wrong[2, 3] = True
    assert (found[:, wrong] > 1e-6).all()
    assert found[:, ~wrong].abs().max() < 1e-9


def test_kl_map_is_in_bits_and_averages_the_colours():
    t = torch.tensor([50])
    x_start = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    noise = draw(1, 3, 2, 2, seed=5)
    x_t = RESPACED.q_sample(x_start, t, noise)
    error = torch.zeros_like(noise)
    error[:, 0] = 0.01
    found = kl_map(RESPACED, x_start, x_t, t, noise + error, -torch.ones_like(noise))
    # By hand: the noise error becomes an error of the mean; equal variances leave (m1 - m2)^2 / 2v nats.
    implied = 0.01 * math.sqrt(1 / RESPACED.alphas_cumprod[50] - 1)
    shift = RESPACED.posterior_mean_coef1[50] * implied
    bits = shift**2 / (2 * RESPACED.posterior_variance[50]) / math.log(2) / 3
    torch.testing.assert_close(found, torch.full((1, 2, 2), bits, dtype=torch.float64), rtol=1e-6, atol=0)


def test_kl_map_clamps_the_implied_image():
    t = torch.tensor([100])
    x_start, x_t, noise = noised(RESPACED, t)
    v = -torch.ones_like(noise)
    far, farther = (kl_map(RESPACED, x_start, x_t, t, noise - wrong, v) for wrong in (1e3, 1e4))
    torch.testing.assert_close(far, farther)


def test_bound_is_the_likelihood_at_the_first_step_and_the_kl_after_it():
    t = torch.tensor([0, 1, 400, 0])
    x_start, x_t, noise = noised(PROCESS, t)
    eps, v = noise + draw(4, 3, 4, 5, seed=9, scale=0.1), draw(4, 3, 4, 5, seed=10, scale=0.3)
    reverse = PROCESS.p_reverse(eps, v, x_t, t, clamp=False)
    likelihood = -discretised_gaussian_log_likelihood(x_start, reverse).mean((1, 2, 3)) / math.log(2)
    kl = kl_divergence(normal(PROCESS.q_posterior(x_start, x_t, t)), normal(reverse)).mean((1, 2, 3)) / math.log(2)
    found = variational_bound(PROCESS, x_start, x_t, t, eps, v)
    torch.testing.assert_close(found, torch.where(t == 0, likelihood, kl), rtol=1e-7, atol=1e-12)
    assert (likelihood[[1, 2]] - kl[[1, 2]]).abs().min() > 1e-3  # the choice is not without consequence


def test_bound_does_not_clamp_the_implied_image():
    t = torch.tensor([400])
    x_start, x_t, noise = noised(PROCESS, t)
    v = torch.zeros_like(noise)
    far, farther = (variational_bound(PROCESS, x_start, x_t, t, noise - wrong, v).item() for wrong in (10, 100))
    assert farther > 50 * far


@pytest.fixture
def step():
    """The arguments of one training loss, with gradients wanted for the network's two outputs."""
    t = torch.tensor([0, 7, 300])
    x_start, x_t, noise = (x.float() for x in noised(PROCESS, t))
    return {
        "x_start": x_start,
        "x_t": x_t,
        "t": t,
        "noise": noise,
        "prediction": draw(3, 6, 4, 5, seed=20).float().requires_grad_(),
        "features": draw(3, 7, 2, 2, seed=21).float().requires_grad_(),
        "target_features": draw(3, 7, 2, 2, seed=22).float(),
        "feature_weight": 0.3,
    }


def test_training_loss_is_the_sum_of_its_parts(step):
    losses = training_loss(PROCESS, **step)
    eps, v = step["prediction"].detach().chunk(2, dim=1)
    bound = variational_bound(PROCESS, step["x_start"], step["x_t"], step["t"], eps, v).mean()
    assert losses.noise.item() == pytest.approx(((eps - step["noise"]) ** 2).mean().item(), rel=1e-6)
    assert losses.bound.item() == pytest.approx(bound.item(), rel=1e-6)
    feature = ((step["features"] - step["target_features"]) ** 2).mean().item()
    assert losses.feature.item() == pytest.approx(feature, rel=1e-6)
    assert losses.total.item() == pytest.approx((losses.noise + losses.bound + 0.3 * losses.feature).item(), rel=1e-6)


def test_bound_trains_the_variance_and_never_the_noise(step):
    training_loss(PROCESS, **step).total.backward()
    eps_gradient, v_gradient = step["prediction"].grad.chunk(2, dim=1)
    eps = step["prediction"].detach()[:, :3]
    # Nothing but the mean squared error reaches the noise prediction.
    torch.testing.assert_close(eps_gradient, 2 * (eps - step["noise"]) / eps.numel())
    assert (v_gradient[1:] != 0).all()
    difference = (step["features"] - step["target_features"]).detach()
    torch.testing.assert_close(step["features"].grad, 0.3 * 2 * difference / difference.numel())


def test_training_loss_of_low_precision_outputs_is_computed_in_float32(step):
    step["prediction"] = step["prediction"].detach().bfloat16()
    step["features"] = step["features"].detach().bfloat16()
    losses = training_loss(PROCESS, **step)
    exact = training_loss(
        PROCESS, **step | {"prediction": step["prediction"].float(), "features": step["features"].float()}
    )
    assert losses.total.dtype == torch.float32
    assert losses == exact

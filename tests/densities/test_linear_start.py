"""Ridge regression by generalised cross-validation, and what it leaves of the targets."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_voed.densities.linear_start import predict_linearly
from pyro_voed.densities.residual import LinearResidual


def linear(num, context_dim, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(num, context_dim, generator=generator)
    weight = torch.randn(2, context_dim, generator=generator) / context_dim**0.5
    return context @ weight.mT + noise * torch.randn(num, 2, generator=generator) + 3.0, context, weight


def test_weights_are_found():
    targets, context, weight = linear(20_000, 5, 0.3)
    found = predict_linearly(targets, context)
    # Each weight has the standard error .3 / sqrt(20000): six of them is once in 5e7 for the ten weights.
    assert (found.weight - weight).abs().max() < 6 * 0.3 / 20_000**0.5
    assert (found.offset - 3.0).abs().max() < 6 * 0.3 / 20_000**0.5
    torch.testing.assert_close(found.covariance, 0.09 * torch.eye(2).double(), rtol=0, atol=6 * 0.09 / 10_000**0.5)


@pytest.mark.parametrize(("num", "context_dim"), [(100, 5), (100, 60), (100, 150), (60, 400)])
def test_covariance_is_that_of_new_draws(num, context_dim):
    # Also where a fit without penalty would be perfect on its own draws and useless on others.
    ratios = []
    for seed in range(20):
        targets, context, _ = linear(num + 2_000, context_dim, 0.5, seed)
        found = predict_linearly(targets[:num], context[:num])
        errors = targets[num:] - context[num:] @ found.weight.mT.float() - found.offset.float()
        ratios.append(found.covariance.diagonal().mean() / errors.square().mean())
    ratios = torch.stack(ratios)
    # The estimate is nearly unbiased: within a tenth, beyond four standard errors of the repeats.
    assert abs(ratios.mean() - 1.0) < 0.1 + 4 * ratios.std() / 20**0.5


def test_useless_contexts_predict_the_mean():
    targets, context = torch.randn(200, 1), torch.randn(200, 150)
    found = predict_linearly(targets, context)
    assert (context @ found.weight.mT.float()).std() < 0.4
    assert 0.8 < found.covariance.item() < 1.3


@pytest.mark.parametrize("dim", [1, 3, 40])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_a_residual_is_that_of_the_linear_gaussian_posterior(dim, size):
    generator = torch.Generator().manual_seed(0)
    mixing, weight = torch.randn(dim, dim, generator=generator) * 0.3 + torch.eye(dim), torch.randn(dim, 4)
    features = torch.randn(4_000, 4, generator=generator).double()
    noise = size * torch.randn(4_000, dim, generator=generator).double()
    theta = features @ weight.mT.double() + noise @ mixing.mT.double()
    residual = LinearResidual(dim, 4).fit_(theta, features)
    z = residual(theta, residual.prediction(features))
    log_prob = Normal(0.0, 1.0).log_prob(z).sum(-1) + residual.log_det()
    expected = MultivariateNormal(features @ weight.mT.double(), (size**2 * mixing @ mixing.mT).double())
    # Both are evaluated at the draws: a fit with the right mean and covariance loses dim^2 / 4,000 nats at most.
    assert abs(log_prob.mean() - expected.log_prob(theta).mean()) < dim * (dim + 5) / 4_000 + 1e-3
    torch.testing.assert_close(residual.inverse(z, residual.prediction(features)), theta)


def test_targets_that_the_context_determines_are_left_a_spread_above_rounding():
    features = torch.randn(200, 2).double()
    residual = LinearResidual(2, 2).fit_(features, features)
    z = residual(features, residual.prediction(features))
    assert z.isfinite().all()
    assert z.abs().max() < 1.0
    assert residual.log_det() == pytest.approx(2 * math.log(1e7), rel=1e-3)


UNFIT = {
    "too few draws": (torch.ones(4, 2), torch.ones(4, 3)),
    "features that are not finite": (torch.ones(100, 2), torch.full((100, 3), torch.nan)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_tells_nothing_leaves_the_targets_as_they_are(name):
    theta, features = UNFIT[name]
    residual = LinearResidual(2, 3).fit_(theta, features)
    assert torch.equal(residual(theta, residual.prediction(torch.zeros_like(features))), theta.double())


@pytest.mark.parametrize("features", [torch.ones(100, 3), torch.zeros(100, 0)], ids=["constant", "none"])
def test_features_that_say_nothing_predict_the_mean(features):
    theta = torch.randn(100, 2)
    residual = LinearResidual(2, features.shape[1]).fit_(theta, features)
    assert not residual.weight.any()
    torch.testing.assert_close(residual.prediction(features)[0], theta.double().mean(0))

"""Ridge regression by generalised cross-validation, and flows that start at its prediction."""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_voed.densities import AffineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.densities.linear_start import predict_linearly


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
def test_a_flow_starts_at_the_linear_gaussian_posterior(dim):
    mixing, weight = torch.randn(dim, dim) * 0.3 + torch.eye(dim), torch.randn(dim, 4)
    context = torch.randn(4_000, 4)
    theta = context @ weight.mT + torch.randn(4_000, dim) @ mixing.mT
    flow = AffineCouplingFlow(dim, 4)
    flow.start_(theta, context)
    covariance = mixing @ mixing.mT
    if dim > 32:
        covariance = covariance.diagonal().diag()
    expected = MultivariateNormal(context @ weight.mT, covariance)
    # Both are evaluated at the draws: a start with the right mean and covariance loses dim^2 / 4,000 nats at most.
    difference = flow.log_prob(theta, context).mean() - expected.log_prob(theta).mean()
    assert abs(difference) < dim * (dim + 5) / 4_000 + 1e-3


class Fixed(torch.nn.Module):
    def condition(self, context):
        return Independent(Normal(torch.zeros_like(context), 1.0), 1)


def learnt():
    flow = AffineCouplingFlow(2, 2)
    torch.nn.init.normal_(flow.gaussian.head.weight)
    return flow


THETA, CONTEXT = torch.randn(2, 100, 2, generator=torch.Generator().manual_seed(0))
NO_START = {
    "a flow that has learnt": (learnt, THETA, CONTEXT),
    "a density that cannot start": (Fixed, THETA, CONTEXT),
    "targets that the context determines": (lambda: AffineCouplingFlow(2, 2), CONTEXT, CONTEXT),
    "contexts that are not finite": (lambda: AffineCouplingFlow(2, 2), THETA, torch.full((100, 2), torch.nan)),
}


@pytest.mark.parametrize("name", NO_START)
def test_without_a_start_it_stays_as_it_is(name):
    make, theta, context = NO_START[name]
    density = StandardisedDensity(make(), Standardise(2), Standardise(2))
    before = {key: value.clone() for key, value in density.state_dict().items()}
    density.start_(theta, context)
    assert all(torch.equal(value, before[key]) for key, value in density.state_dict().items())


def test_contexts_that_say_nothing_predict_nothing():
    flow, theta, constant = AffineCouplingFlow(2, 3), torch.randn(100, 2), torch.ones(100, 3)
    flow.start_(theta, constant)
    assert not flow.gaussian.linear.weight.any()
    assert flow.log_prob(theta, constant).isfinite().all()

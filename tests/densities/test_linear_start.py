"""Ridge regression by generalised cross-validation, and flows that start at its prediction."""

from functools import partial

import pytest
import torch

from pyro_voed import eig_flow
from pyro_voed.densities import AffineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.densities.linear_start import predict_linearly
from pyro_voed.estimators import learning
from pyro_voed.problems.linear_gaussian import DEFAULT_DESIGN, exact_eig, linear_gaussian

DESIGNS = torch.stack([torch.tensor(DEFAULT_DESIGN), torch.eye(3, 2)])


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
    error = ratios.std() / 20**0.5
    # The estimate is nearly unbiased: within a tenth, beyond four standard errors of the repeats.
    assert abs(ratios.mean() - 1.0) < 0.1 + 4 * error


def test_useless_contexts_predict_the_mean():
    generator = torch.Generator().manual_seed(0)
    targets, context = torch.randn(200, 1, generator=generator), torch.randn(200, 150, generator=generator)
    found = predict_linearly(targets, context)
    assert (context @ found.weight.mT.float()).std() < 0.4
    assert 0.8 < found.covariance.item() < 1.3


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_a_flow_starts_at_the_linear_gaussian_posterior(dim):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator) * 0.3 + torch.eye(dim)
    context = torch.randn(4_000, 4, generator=generator)
    weight = torch.randn(dim, 4, generator=generator)
    theta = context @ weight.mT + torch.randn(4_000, dim, generator=generator) @ mixing.mT
    flow = AffineCouplingFlow(dim, 4)
    flow.start_(theta, context)
    covariance = mixing @ mixing.mT
    if dim > 32:
        covariance = covariance.diagonal().diag()
    expected = torch.distributions.MultivariateNormal(context @ weight.mT, covariance)
    # Both are evaluated at the draws: a start with the right mean and covariance loses dim^2 / 4,000 nats at most.
    difference = flow.log_prob(theta, context).mean() - expected.log_prob(theta).mean()
    assert abs(difference) < dim * (dim + 5) / 4_000 + 1e-3


def test_a_flow_that_has_learnt_is_left_alone():
    flow = AffineCouplingFlow(2, 3)
    torch.nn.init.normal_(flow.gaussian.head.weight)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.start_(torch.randn(100, 2), torch.randn(100, 3))
    torch.testing.assert_close(dict(flow.state_dict()), before)


def test_targets_that_the_context_fixes_are_no_start():
    context = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    flow = AffineCouplingFlow(2, 2)
    flow.start_(context.clone(), context)
    assert not flow.gaussian.linear.weight.any()


def test_contexts_that_say_nothing_or_are_not_finite_are_no_obstacle():
    theta = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    constant, broken = AffineCouplingFlow(2, 3), AffineCouplingFlow(2, 3)
    constant.start_(theta, torch.ones(100, 3))
    assert not constant.gaussian.linear.weight.any()
    assert constant.log_prob(theta, torch.ones(100, 3)).isfinite().all()
    broken.start_(theta, torch.full((100, 3), torch.nan))
    assert all(value.isfinite().all() for value in broken.parameters())


def test_densities_that_cannot_start_are_left_alone():
    class Fixed(torch.nn.Module):
        def condition(self, context):
            return torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(context), 1.0), 1)

    density = StandardisedDensity(Fixed(), Standardise(2), Standardise(2))
    theta, context = torch.randn(50, 2), torch.randn(50, 2)
    before = density.log_prob(theta, context)
    density.start_(theta, context)
    torch.testing.assert_close(density.log_prob(theta, context), before)


def test_untrained_bound_is_that_of_the_linear_gaussian():
    # Nothing is to be learnt beyond it here: some nine numbers from 1,000 pilot draws cost about 9 / 2,000 nats.
    result = eig_flow(linear_gaussian(), "y", num_steps=0, num_samples=20_000, seed=0)
    assert abs(result.eig - exact_eig(torch.tensor(DEFAULT_DESIGN))) < 0.02 + 4 * result.standard_error


@pytest.mark.parametrize(
    "sizes", [{}, {"ensemble": True, "designs": {"xi": DESIGNS}}, {"learning_rate": (1e-12, 1e-13)}]
)
def test_a_pool_starts_at_the_linear_gaussian_posterior_too(sizes, monkeypatch):
    monkeypatch.setattr(learning, "fit_pool", partial(learning.fit_pool, max_epochs=1))
    num_designs = len(DESIGNS) if "designs" in sizes else 1
    settings = {"num_simulations": 1_000 * num_designs, "learning_rate": 1e-12, "num_samples": 20_000, **sizes}
    result = eig_flow(linear_gaussian(), "y", seed=0, progress=False, **settings)
    exact = exact_eig(sizes["designs"]["xi"] if "designs" in sizes else torch.tensor(DEFAULT_DESIGN))
    assert ((result.eig - exact).abs() < 0.02 + 4 * result.standard_error).all()


@pytest.mark.parametrize("ensemble", [{}, {"ensemble": True, "designs": {"xi": DESIGNS}}])
def test_a_pool_behind_a_summary_that_has_yet_to_learn_starts_at_the_standard_normal(ensemble, monkeypatch):
    monkeypatch.setattr(learning, "fit_pool", partial(learning.fit_pool, max_epochs=1))
    settings = {"num_simulations": 400, "learning_rate": 1e-12, "num_samples": 100, **ensemble}
    result = eig_flow(linear_gaussian(), "y", summary=torch.nn.Linear(3, 2), seed=0, progress=False, **settings)
    flow = result.density.member(0) if ensemble else result.density
    assert flow.density.gaussian.linear.weight.abs().max() < 1e-6

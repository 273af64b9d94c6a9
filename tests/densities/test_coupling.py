"""Parts of coupling flows, what they refuse, and a posterior learnt by Pyro's own inference."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_voed.densities import AffineCouplingFlow, SplineCouplingFlow
from pyro_voed.densities.gaussian import colour, whiten
from pyro_voed.densities.halves import permute, split, unpermute


@pytest.fixture(params=[AffineCouplingFlow, SplineCouplingFlow])
def flow_class(request):
    return request.param


@pytest.mark.parametrize("theta_dim", [2, 3, 4, 5, 8, 13, 32, 33])
def test_permutations_separate_all_pairs_as_fast_as_possible(theta_dim):
    numbers = torch.arange(float(theta_dim))
    halves, apart = split(numbers), set()
    for _ in range(math.ceil(math.log2(theta_dim))):
        apart |= {frozenset(pair) for pair in itertools.product(*(half.tolist() for half in halves))}
        halves = permute(halves)
    assert len(apart) == theta_dim * (theta_dim - 1) // 2
    assert torch.equal(torch.cat(unpermute(permute(split(numbers)))), numbers)


def test_gaussian_layer_is_a_full_gaussian():
    shift, log_scale = torch.randn(3).double(), 0.3 * torch.randn(3).double()
    lower = torch.randn(3, 3).double().tril(-1)
    factor = torch.diag(torch.exp(-log_scale)) @ (torch.eye(3).double() + lower)
    exact = dist.MultivariateNormal(shift, precision_matrix=factor.T @ factor)
    theta = torch.randn(10, 3).double()
    z = whiten(theta, shift, log_scale, lower)
    log_prob = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - log_scale.sum()
    torch.testing.assert_close(log_prob, exact.log_prob(theta))
    torch.testing.assert_close(colour(z, shift, log_scale, lower), theta)


@pytest.mark.parametrize("theta_dim", [1, 2])
def test_without_context(flow_class, theta_dim):
    flow = flow_class(theta_dim, 0, num_transforms=2, hidden_dim=8)
    theta = torch.randn(5, theta_dim)
    assert flow.condition(torch.zeros(4, 0)).sample().shape == (4, theta_dim)
    flow.log_prob(theta, torch.zeros(0)).mean().backward()
    torch.testing.assert_close(flow.log_prob(theta, torch.zeros(5, 0)), flow.log_prob(theta, torch.zeros(0)))


WRONG = {
    "theta": (
        lambda flow: flow.log_prob(torch.zeros(5, 3), torch.zeros(5, 3)),
        r"theta: expected shape \(..., 2\), got",
    ),
    "context": (
        lambda flow: flow.log_prob(torch.zeros(5, 2), torch.zeros(5, 2)),
        r"context: expected shape \(..., 3\)",
    ),
    "condition": (lambda flow: flow.condition(torch.zeros(5, 2)), r"context: expected shape \(..., 3\), got \(5, 2\)"),
    "value": (lambda flow: flow.condition(torch.zeros(5, 3)).log_prob(torch.zeros(5, 3)), "event_shape|rightmost"),
    "a value that is NaN": (
        lambda flow: flow.condition(torch.zeros(3)).log_prob(torch.full((2,), math.nan)),
        "support",
    ),
    "a context that is NaN": (lambda flow: flow.condition(torch.full((5, 3), math.nan)), "constraint"),
    "size": (lambda flow: type(flow)(0, 3), "theta_dim: expected at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(flow_class, name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(flow_class(2, 3, hidden_dim=8))


def test_learns_a_posterior_by_variational_inference_in_a_plate(flow_class):
    """Fit theta | y ~ N(y / 2, 1/2) for prior N(0, 1) and likelihood N(theta, 1), ten outcomes at once."""
    flow = flow_class(1, 1, num_transforms=1, hidden_dim=8)
    outcomes = torch.linspace(-1.0, 1.0, 10).unsqueeze(-1)

    def model():
        with pyro.plate("outcomes", 10):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=outcomes)

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("outcomes", 10):
            pyro.sample("theta", flow.condition(outcomes))

    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(outcomes).sum().item()
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
    for _ in range(150):
        svi.step()
    # The gap is the divergence from the posterior, over all ten outcomes, at the start about 2.5 nats.
    assert svi.evaluate_loss() + evidence < 0.5

"""Laws that every conditional density obeys, at random weights."""

import copy
import itertools
import math

import pyro.distributions as dist
import pytest
import torch

from pyro_voed.densities import as_density
from tests.densities.cases import CONTEXT_DIM, DISCRETE, OURS, REAL, randomised

Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""

DENSITIES = {f"{name}-{dim}": (make, dim) for (name, make), dim in itertools.product(REAL.items(), (1, 2, 3))}
DENSITIES |= {name: (make, CONTEXT_DIM) for name, make in DISCRETE.items()}


@pytest.fixture(params=DENSITIES)
def density(request):
    make, dim = DENSITIES[request.param]
    return randomised(make(dim), dtype=torch.float64)


@pytest.fixture(params=REAL)
def build(request):
    return lambda theta_dim: randomised(REAL[request.param](theta_dim), dtype=torch.float64)


@pytest.fixture(params=OURS)
def build_ours(request):
    return lambda theta_dim, dtype=torch.float64: randomised(OURS[request.param](theta_dim), dtype=dtype)


def contexts(*batch):
    return torch.randn(*batch, CONTEXT_DIM, dtype=torch.float64)


@pytest.mark.parametrize("theta_dim", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
def test_starts_at_standard_normal(make, theta_dim):
    theta, context = 3.0 * torch.randn(50, theta_dim), 10.0 * torch.randn(50, CONTEXT_DIM)
    expected = dist.Normal(0.0, 1.0).log_prob(theta).sum(-1)
    torch.testing.assert_close(make(theta_dim).log_prob(theta, context), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("theta_dim", [1, 2, 3, 6, 40])
def test_inverts(build_ours, theta_dim, dtype, tolerance):
    flow = build_ours(theta_dim, dtype)
    theta, context = torch.randn(200, theta_dim, dtype=dtype), contexts(200).to(dtype)
    z, _ = flow.whiten(theta, context)
    torch.testing.assert_close(flow.colour(z, context), theta, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("theta_dim", [1, 2, 3, 6])
def test_log_det_is_that_of_the_jacobian(build_ours, theta_dim):
    flow = build_ours(theta_dim)
    for theta, context in zip(torch.randn(5, theta_dim).double(), contexts(5), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda theta, c=context: flow.whiten(theta, c)[0], theta)
        torch.testing.assert_close(flow.whiten(theta, context)[1], jacobian.slogdet().logabsdet)


@pytest.mark.parametrize("theta_dim", [1, 2])
def test_integrates_to_one(build, theta_dim):
    axis = torch.linspace(-25.0, 25.0, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * theta_dim).reshape(-1, theta_dim)
    with torch.no_grad():
        log_integral = build(theta_dim).log_prob(grid, contexts()).logsumexp(0) + theta_dim * math.log(
            axis[1] - axis[0]
        )
    assert log_integral.exp().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("theta_dim", [1, 2, 3])
def test_draws_follow_the_density(build, theta_dim):
    conditioned = build(theta_dim).condition(contexts())
    draws = conditioned.sample((4000,))
    # A reference narrower than the density keeps the ratio bounded, so that its mean is nearly normal.
    reference = dist.Normal(draws.median(0).values, 0.3 * draws.std(0)).to_event(1)
    fresh = conditioned.sample((4000,))
    ratio = (reference.log_prob(fresh) - conditioned.log_prob(fresh)).exp()
    assert abs(ratio.mean() - 1.0) < Z_MAX * ratio.std() / math.sqrt(len(ratio))


@pytest.mark.parametrize("theta_dim", [1, 2, 3])
def test_tails_depend_on_the_context(build_ours, theta_dim):
    theta, context = torch.full((theta_dim,), 50.0).double(), contexts().requires_grad_()
    (gradient,) = torch.autograd.grad(build_ours(theta_dim).log_prob(theta, context), context)
    assert gradient.abs().min() > 1e-3


def test_batches_broadcast(density):
    context = contexts(4, 5)
    theta = density.condition(context).sample()
    log_prob = density.log_prob(theta, context)
    assert log_prob.shape == (4, 5)
    assert as_density(density, density.theta_dim, CONTEXT_DIM) is density
    for same, expected in (
        (density.condition(context).log_prob(theta), log_prob),
        (density(theta[:, 2], context[:, 2]), log_prob[:, 2]),
        (density.log_prob(theta, context[1]), density.log_prob(theta, context[1].expand(4, 5, -1))),
        (density.log_prob(theta[1], context), density.log_prob(theta[1].expand(4, 5, -1), context)),
    ):
        torch.testing.assert_close(same, expected)


def test_distributions_have_the_shapes_of_torch_distributions(density):
    conditioned = density.condition(contexts(3, 1))
    expanded = conditioned.expand((6, 3, 4))
    event, dim = expanded.to_event(1), density.theta_dim
    assert (conditioned.batch_shape, conditioned.event_shape) == ((3, 1), (dim,))
    assert (expanded.batch_shape, expanded.sample((5,)).shape) == ((6, 3, 4), (5, 6, 3, 4, dim))
    assert (event.batch_shape, event.event_shape) == ((6, 3), (4, dim))
    value = event.sample()
    torch.testing.assert_close(event.log_prob(value), conditioned.log_prob(value).sum(-1))
    assert expanded.log_prob(value[0, 0, 0]).shape == (6, 3, 4)
    assert conditioned.support is dist.constraints.real_vector
    assert not conditioned.sample().requires_grad


def test_draws_of_an_expanded_distribution_differ(build):
    assert build(2).condition(contexts(1)).expand((50,)).sample().unique(dim=0).shape == (50, 2)


def test_reparametrised_draws_carry_the_pathwise_gradient(build):
    density = build(2)

    def mean_of_draws(context):
        torch.manual_seed(0)
        return density.condition(context).rsample((7,)).mean()

    assert density.condition(contexts()).has_rsample
    torch.autograd.gradcheck(mean_of_draws, contexts().requires_grad_())


def test_repeated_backward_and_optimiser_steps_are_harmless(build):
    density = build(2)
    theta, context = torch.randn(6, 2).double(), contexts(6)
    conditioned = density.condition(context)
    optimiser = torch.optim.Adam(density.parameters(), 0.05)
    drawn = conditioned.rsample()
    for _ in range(2):
        optimiser.zero_grad()
        (conditioned.log_prob(theta).sum() + conditioned.log_prob(drawn.detach()).sum()).backward()
        optimiser.step()
    fresh = copy.deepcopy(density)
    for value in (theta, drawn.detach()):
        torch.testing.assert_close(conditioned.log_prob(value), fresh.log_prob(value.clone(), context.clone()))


def test_weights_and_context_count(density):
    context = contexts(6).requires_grad_()
    theta = density.condition(context).sample()
    density.log_prob(theta, context).sum().backward()
    assert context.grad.abs().sum(-1).min() > 0
    assert all(parameter.grad is not None for parameter in density.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in density.parameters())

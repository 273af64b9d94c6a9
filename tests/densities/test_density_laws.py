"""Laws that every conditional density obeys, at random weights."""

import copy
import io
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.nn import ConditionalDenseNN
from torch import nn
from torch.func import functional_call, stack_module_state

from pyro_voed.densities import AffineCouplingFlow, SplineCouplingFlow, Standardise, StandardisedDensity, as_density

CONTEXT_DIM = 3

Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""


def affine(theta_dim):
    return AffineCouplingFlow(theta_dim, CONTEXT_DIM, num_transforms=2, hidden_dim=16)


def spline(theta_dim):
    return SplineCouplingFlow(theta_dim, CONTEXT_DIM, num_transforms=2, hidden_dim=16, num_bins=5)


def standardised(theta_dim):
    theta_scaling = Standardise(theta_dim).fit_(0.7 * torch.randn(50, theta_dim) + 0.3)
    context_scaling = Standardise(CONTEXT_DIM).fit_(2.0 * torch.randn(50, CONTEXT_DIM) - 1.0)
    flow = SplineCouplingFlow(theta_dim, 4 + 1, num_transforms=2, hidden_dim=16, num_bins=5)
    return StandardisedDensity(flow, theta_scaling, context_scaling, nn.Linear(CONTEXT_DIM - 1, 4), num_bypass=1)


def zuko_adapted(theta_dim):
    return as_density(zuko.flows.NICE(theta_dim, CONTEXT_DIM, hidden_features=(16,)), theta_dim, CONTEXT_DIM)


def pyro_adapted(theta_dim):
    base = dist.Normal(torch.zeros(theta_dim).double(), torch.ones(theta_dim).double()).to_event(1)
    fixed_dim, moved_dim = theta_dim // 2, theta_dim - theta_dim // 2
    network = ConditionalDenseNN(fixed_dim, CONTEXT_DIM, [16], [moved_dim, moved_dim], nonlinearity=nn.Tanh())
    transforms = [
        dist.transforms.ConditionalAffineCoupling(fixed_dim, network),
        dist.transforms.AffineTransform(0.5, 0.8, event_dim=1, cache_size=1),
        dist.transforms.matrix_exponential(theta_dim),
    ]
    return as_density(dist.ConditionalTransformedDistribution(base, transforms), theta_dim, CONTEXT_DIM)


OURS = {"affine": affine, "spline": spline}
CASES = {**OURS, "standardised": standardised, "zuko": zuko_adapted, "pyro": pyro_adapted}


@pytest.fixture(params=CASES)
def build(request):
    return lambda theta_dim, dtype=torch.float64: randomised(CASES[request.param], theta_dim, dtype)


@pytest.fixture(params=OURS)
def build_ours(request):
    return lambda theta_dim, dtype=torch.float64: randomised(OURS[request.param], theta_dim, dtype)


def randomised(builder, theta_dim, dtype):
    density = builder(theta_dim).to(dtype)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return density


def random_pair(theta_dim, *batch, dtype=torch.float64):
    return torch.randn(*batch, theta_dim, dtype=dtype), torch.randn(*batch, CONTEXT_DIM, dtype=dtype)


@pytest.mark.parametrize("theta_dim", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("builder", OURS.values(), ids=OURS)
def test_starts_at_standard_normal(builder, theta_dim):
    theta, context = random_pair(theta_dim, 50, dtype=torch.float32)
    expected = dist.Normal(0.0, 1.0).log_prob(3.0 * theta).sum(-1)
    torch.testing.assert_close(builder(theta_dim).log_prob(3.0 * theta, 10.0 * context), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("theta_dim", [1, 2, 3, 6, 40])
def test_inverts(build_ours, theta_dim, dtype, tolerance):
    flow = build_ours(theta_dim, dtype)
    theta, context = random_pair(theta_dim, 200, dtype=dtype)
    z, _ = flow.whiten(theta, context)
    torch.testing.assert_close(flow.colour(z, context), theta, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("theta_dim", [1, 2, 3, 6])
def test_log_det_is_that_of_the_jacobian(build_ours, theta_dim):
    flow = build_ours(theta_dim)
    for theta, context in zip(*random_pair(theta_dim, 5), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda theta, c=context: flow.whiten(theta, c)[0], theta)
        torch.testing.assert_close(flow.whiten(theta, context)[1], jacobian.slogdet().logabsdet)


@pytest.mark.parametrize("theta_dim", [1, 2])
def test_integrates_to_one(build, theta_dim):
    density = build(theta_dim)
    axis = torch.linspace(-25.0, 25.0, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * theta_dim).reshape(-1, theta_dim)
    context = torch.randn(CONTEXT_DIM, dtype=torch.float64)
    with torch.no_grad():
        log_integral = density.log_prob(grid, context).logsumexp(0) + theta_dim * math.log(axis[1] - axis[0])
    assert log_integral.exp().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("theta_dim", [1, 2, 3])
def test_conditioned_and_direct_log_prob_agree(build, theta_dim):
    density = build(theta_dim)
    theta, context = random_pair(theta_dim, 4, 5)
    direct = density.log_prob(theta, context)
    assert direct.shape == (4, 5)
    torch.testing.assert_close(density.condition(context).log_prob(theta), direct)
    torch.testing.assert_close(density(theta[:, 2], context[:, 2]), direct[:, 2])
    torch.testing.assert_close(
        density.log_prob(theta, context[1]), density.log_prob(theta, context[1].expand(4, 5, -1))
    )
    torch.testing.assert_close(
        density.log_prob(theta[1], context), density.log_prob(theta[1].expand(4, 5, -1), context)
    )


@pytest.mark.parametrize("theta_dim", [1, 2, 3])
def test_draws_follow_the_density(build, theta_dim):
    conditioned = build(theta_dim).condition(torch.randn(CONTEXT_DIM, dtype=torch.float64))
    draws = conditioned.sample((4000,))
    # A reference narrower than the density keeps the ratio bounded, so that its mean is nearly normal.
    reference = dist.Normal(draws.median(0).values, 0.3 * draws.std(0)).to_event(1)
    fresh = conditioned.sample((4000,))
    ratio = (reference.log_prob(fresh) - conditioned.log_prob(fresh)).exp()
    assert abs(ratio.mean() - 1.0) < Z_MAX * ratio.std() / math.sqrt(len(ratio))


@pytest.mark.parametrize("theta_dim", [1, 2, 3])
def test_tails_depend_on_the_context(build_ours, theta_dim):
    theta, context = torch.full((theta_dim,), 50.0).double(), torch.randn(CONTEXT_DIM).double().requires_grad_()
    (gradient,) = torch.autograd.grad(build_ours(theta_dim).log_prob(theta, context), context)
    assert gradient.abs().min() > 1e-3


def test_shapes_of_distributions(build):
    density = build(2)
    conditioned = density.condition(torch.randn(3, 1, CONTEXT_DIM, dtype=torch.float64))
    expanded = conditioned.expand((6, 3, 4))
    event = expanded.to_event(1)
    assert (conditioned.batch_shape, conditioned.event_shape) == ((3, 1), (2,))
    assert (expanded.batch_shape, expanded.sample((5,)).shape) == ((6, 3, 4), (5, 6, 3, 4, 2))
    assert (event.batch_shape, event.event_shape) == ((6, 3), (4, 2))
    value = event.sample()
    torch.testing.assert_close(event.log_prob(value), conditioned.log_prob(value).sum(-1))
    assert expanded.log_prob(value[0, 0, 0]).shape == (6, 3, 4)
    assert conditioned.support is dist.constraints.real_vector
    assert not conditioned.sample().requires_grad


def test_draws_of_an_expanded_distribution_differ(build):
    draws = build(2).condition(torch.zeros(1, CONTEXT_DIM, dtype=torch.float64)).expand((50,)).sample()
    assert draws.unique(dim=0).shape == (50, 2)


def test_reparametrised_draws_carry_the_pathwise_gradient(build):
    density = build(2)
    context = torch.randn(CONTEXT_DIM, dtype=torch.float64, requires_grad=True)

    def mean_of_draws(context):
        torch.manual_seed(0)
        return density.condition(context).rsample((7,)).mean()

    assert density.condition(context).has_rsample
    torch.autograd.gradcheck(mean_of_draws, context)


def test_repeated_backward_and_optimiser_steps_are_harmless(build):
    density = build(2)
    theta, context = random_pair(2, 6)
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


def test_weights_are_registered(build):
    density = build(2)
    theta, context = random_pair(2, 6)
    density.log_prob(theta, context).sum().backward()
    assert density.theta_dim == 2
    assert density.context_dim == CONTEXT_DIM
    assert all(parameter.grad is not None for parameter in density.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in density.parameters())


@pytest.mark.parametrize("theta_dim", [1, 2, 3])
def test_stacked_modules_under_vmap_agree_with_each(build_ours, theta_dim):
    flows = [build_ours(theta_dim) for _ in range(3)]
    theta, context = random_pair(theta_dim, 3, 8)
    skeleton = copy.deepcopy(flows[0]).to("meta")

    def log_prob(state, theta, context):
        return functional_call(skeleton, state, (theta, context))

    stacked = torch.func.vmap(log_prob)(stack_module_state(flows), theta, context)
    one_by_one = torch.stack([flow.log_prob(t, c) for flow, t, c in zip(flows, theta, context, strict=True)])
    torch.testing.assert_close(stacked, one_by_one)


def test_copies_agree(build):
    density = build(2)
    theta, context = random_pair(2, 6)
    expected = density.log_prob(theta, context)
    reloaded = build(2)
    buffer = io.BytesIO()
    torch.save(density.state_dict(), buffer)
    buffer.seek(0)
    reloaded.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(density), pickle.loads(pickle.dumps(density)), reloaded):
        torch.testing.assert_close(other.log_prob(theta, context), expected)
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
    torch.testing.assert_close(density.log_prob(theta, context), expected)

"""What `as_density` lets in, and what it says about the rest."""

import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.distributions import transforms
from torch import nn

from pyro_voed.densities import AffineCouplingFlow, ConditionalDensity, FlowDistribution, as_density


class Regression(nn.Module):
    """A density with `condition` alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def condition(self, context):
        return dist.Normal(self.linear(context), 1.0).to_event(1)


def transformed(transform):
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    return dist.ConditionalTransformedDistribution(base, [transform])


GOOD = {
    "flow": lambda: AffineCouplingFlow(2, 3),
    "condition": Regression,
    "zuko": lambda: zuko.flows.NSF(2, 3),
    "zuko mixture": lambda: zuko.mixtures.GMM(2, 3),
    "pyro": lambda: transformed(transforms.conditional_affine_coupling(2, 3)),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_adapts(make):
    density = as_density(make(), theta_dim=2, context_dim=3)
    assert as_density(density, 2, 3) is density
    conditioned = density.condition(torch.randn(5, 3))
    assert isinstance(density, ConditionalDensity)
    assert isinstance(conditioned, FlowDistribution)
    assert conditioned.sample((4,)).shape == (4, 5, 2)
    assert density.log_prob(torch.randn(5, 2), torch.randn(3)).shape == (5,)
    assert list(density.parameters())
    for dims in ((3, 3), (2, 4), (1, 3)):
        with pytest.raises(ValueError, match=r"Build it with the dimensions of your data"):
            as_density(make(), *dims)


def test_own_flows_pass_unchanged():
    flow = AffineCouplingFlow(2, 3)
    assert as_density(flow, 2, 3) is flow


@pytest.mark.parametrize("wrong", [None, 3, "NSF", AffineCouplingFlow, dist.Normal(0.0, 1.0)], ids=str)
def test_refuses_what_is_not_a_density(wrong):
    with pytest.raises(TypeError, match=r"expected a flow of pyro_voed\.densities"):
        as_density(wrong, 2, 3)


def test_refuses_networks_that_return_tensors_and_transforms_without_an_inverse():
    with pytest.raises(TypeError, match="returns a torch distribution, got Tensor"):
        as_density(nn.Linear(3, 2), 2, 3)
    with pytest.raises(ValueError, match="log-density of a given theta can be evaluated"):
        as_density(transformed(transforms.conditional_planar(2, 3)), 2, 3)


def test_without_reparametrised_draws_rsample_says_so():
    conditioned = as_density(zuko.mixtures.GMM(2, 3), 2, 3).condition(torch.zeros(3))
    assert not conditioned.has_rsample
    with pytest.raises(NotImplementedError, match="use sample"):
        conditioned.rsample()


@pytest.mark.parametrize("make", [transforms.Spline, transforms.matrix_exponential, transforms.affine_coupling])
def test_cached_transforms_follow_the_weights(make):
    density = as_density(transformed(make(2)), 2, 3)
    theta, context = torch.randn(6, 2, requires_grad=True), torch.zeros(6, 3)
    before = density.log_prob(theta, context)
    optimiser = torch.optim.SGD(density.parameters(), 0.1)
    (-before.mean()).backward()
    optimiser.step()
    after = density.log_prob(theta, context)
    after.mean().backward()
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, density.log_prob(theta.detach().clone(), context))


def test_the_probe_leaves_batch_statistics_and_modes_alone():
    norm = transforms.BatchNorm(2)
    norm.gamma.requires_grad_(False)
    density = as_density(transformed(norm), 2, 3)
    assert norm.training
    assert density.transforms[0] is norm
    torch.testing.assert_close(norm.moving_variance, torch.ones(2))

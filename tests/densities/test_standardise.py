import pytest
import torch
from torch import nn
from torch.distributions import Normal

from pyro_voed.densities import AffineCouplingFlow, Standardise, StandardisedDensity


def test_fitted_scaling_gives_mean_zero_and_deviation_one():
    x = torch.randn(100, 3, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6]) + torch.tensor([1.0, -2.0, 1e6])
    scaling = Standardise(3).double().fit_(x)
    torch.testing.assert_close(scaling(x).mean(0), torch.zeros(3).double(), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(scaling(x).std(0), torch.ones(3).double())
    torch.testing.assert_close(scaling.inverse(scaling(x)), x)


def test_log_det_is_that_of_the_jacobian():
    scaling = Standardise(3).fit_(4.0 * torch.randn(20, 3))
    jacobian = torch.autograd.functional.jacobian(scaling, torch.randn(3))
    torch.testing.assert_close(scaling.log_det(), jacobian.slogdet().logabsdet)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e8])
def test_constant_columns_keep_their_scale(value):
    scaling = Standardise(1).fit_(torch.full((1001, 1), value))
    torch.testing.assert_close(scaling.scale, torch.ones(1))


def test_moments_are_buffers_that_carry_no_gradient():
    scaling = Standardise(2).fit_(torch.randn(10, 2, requires_grad=True))
    assert not list(scaling.parameters())
    assert not scaling.scale.requires_grad
    assert set(scaling.state_dict()) == {"mean", "scale"}


def test_refuses_what_it_cannot_fit():
    for x in (torch.zeros(1, 2), torch.zeros(5, 3)):
        with pytest.raises(ValueError, match=r"expected shape \(num, 2\)"):
            Standardise(2).fit_(x)
    with pytest.raises(ArithmeticError, match="1 of 5 vectors"):
        Standardise(2).fit_(torch.zeros(5, 2).index_fill(0, torch.tensor([3]), float("nan")))


def test_bypassing_entries_skip_the_summary():
    seen = []

    class Spy(nn.Module):
        def forward(self, context):
            seen.append(context)
            return context[..., :1]

    flow = AffineCouplingFlow(2, 3)
    context_scaling = Standardise(6).fit_(3.0 * torch.randn(20, 6))
    density = StandardisedDensity(flow, Standardise(2), context_scaling, Spy(), num_bypass=2)
    context = torch.randn(5, 6)
    encoded = density.encode(context)
    torch.testing.assert_close(seen[-1], context_scaling(context)[:, :4])
    torch.testing.assert_close(encoded[:, 1:], context_scaling(context)[:, 4:])
    assert density.context_dim == 6


def test_refuses_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="expected theta_dim 3 and context_dim 4"):
        StandardisedDensity(AffineCouplingFlow(2, 4), Standardise(3), Standardise(4))
    with pytest.raises(ValueError, match="expected theta_dim 2 and context_dim 5"):
        StandardisedDensity(AffineCouplingFlow(2, 4), Standardise(2), Standardise(4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="num_bypass"):
        StandardisedDensity(AffineCouplingFlow(2, 4), Standardise(2), Standardise(4), num_bypass=5)


def learnt(summary=None):
    """Return a flow that follows its context, standardised by draws of it."""
    flow = AffineCouplingFlow(2, 3 if summary is None else 4)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    return StandardisedDensity(flow, Standardise(2), Standardise(3).fit_(torch.randn(50, 3)), summary).double()


def test_a_flow_stays_what_it_is_when_its_contexts_get_other_scales():
    density = learnt()
    theta, context = torch.randn(20, 2).double(), 30.0 * torch.randn(20, 3).double() + 7.0
    before = density.log_prob(theta, context)
    density.rescale_context_(context)
    torch.testing.assert_close(density.encode(context).std(0), torch.ones(3).double())
    torch.testing.assert_close(density.log_prob(theta, context), before)


def test_a_flow_without_context_has_nothing_to_rescale():
    flow, theta = AffineCouplingFlow(2, 0), torch.randn(5, 2)
    flow.rescale_(torch.ones(0), torch.zeros(0))
    torch.testing.assert_close(flow.log_prob(theta, torch.zeros(5, 0)), Normal(0, 1).log_prob(theta).sum(-1))


def test_behind_a_summary_only_the_scales_change():
    density = learnt(nn.Linear(3, 4))
    weights = {name: value.clone() for name, value in density.named_parameters()}
    context = 30.0 * torch.randn(20, 3).double() + 7.0
    density.rescale_context_(context)
    torch.testing.assert_close(density.context_scaling(context).std(0), torch.ones(3).double())
    for name, value in density.named_parameters():
        assert torch.equal(value, weights[name])

"""Scales, and densities and critics behind them."""

import copy
import math

import pytest
import torch
from torch import nn

from pyro_voed.densities import AffineCouplingFlow, Standardise, StandardisedDensity, Whitening
from pyro_voed.densities.critics import JointCritic, SeparableCritic, StandardisedCritic
from tests.densities.cases import randomised


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
    assert Standardise(1).fit_(torch.full((1001, 1), value)).scale.item() == 1.0


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


class Spy(nn.Module):
    """A summary of rows alone, as many of users' are."""

    def forward(self, context):
        self.seen = context
        num, _ = context.shape
        return context[:, :1].reshape(num, 1)


@pytest.mark.parametrize("batch", [(), (5,), (4, 5), (0,)])
def test_bypassing_entries_skip_the_summary(batch):
    scaling = Standardise(6).fit_(3.0 * torch.randn(20, 6))
    density = StandardisedDensity(AffineCouplingFlow(2, 3), Standardise(2), scaling, Spy(), num_bypass=2)
    standardised, encoded = scaling(context := torch.randn(*batch, 6)), density.encode(context)
    torch.testing.assert_close(density.summary.seen, standardised[..., :4].reshape(-1, 4))
    torch.testing.assert_close(encoded, standardised[..., [0, 4, 5]])
    assert density.context_dim == 6


def test_refuses_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="expected theta_dim 3 and context_dim 4"):
        StandardisedDensity(AffineCouplingFlow(2, 4), Standardise(3), Standardise(4))
    with pytest.raises(ValueError, match="expected theta_dim 2 and context_dim 5"):
        StandardisedDensity(AffineCouplingFlow(2, 4), Standardise(2), Standardise(4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="num_bypass"):
        StandardisedDensity(AffineCouplingFlow(2, 4), Standardise(2), Standardise(4), num_bypass=5)


def behind_scales(inner, summary=None):
    scalings = Standardise(2), Whitening(3).fit_(torch.randn(50, 3))
    if isinstance(inner, AffineCouplingFlow):
        return StandardisedDensity(randomised(inner), *scalings, summary)
    return StandardisedCritic(inner, *scalings, summary, with_baseline=True)


@pytest.mark.parametrize("summary", [None, nn.Linear(3, 4)], ids=["plain", "behind a summary"])
@pytest.mark.parametrize("inner", [AffineCouplingFlow, SeparableCritic, JointCritic])
def test_scales_follow_where_draws_move_and_no_weight_changes(inner, summary):
    module = behind_scales(inner(2, 3 if summary is None else 4), summary)
    weights = {name: value.clone() for name, value in module.named_parameters()}
    theta, context = 5.0 * torch.randn(200, 2) - 1.0, 30.0 * torch.randn(200, 1) + torch.randn(200, 3)
    module.fit_scales_(theta, context)
    z = module.context_scaling(context)
    torch.testing.assert_close(torch.cov(z.mT, correction=0), torch.eye(3).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.theta_scaling(theta).std(0), torch.ones(2))
    assert all(torch.equal(value, weights[name]) for name, value in module.named_parameters())


def test_targets_follow_affine_maps_of_targets_and_contexts():
    """A density with scales of its own knows nothing of units: only the log-determinant differs."""
    theta, context = torch.randn(500, 2).double(), torch.randn(500, 3).double()
    theta = theta + context[:, :2]
    first = behind_scales(AffineCouplingFlow(2, 3)).double()
    again = copy.deepcopy(first)
    first.fit_scales_(theta, context)
    again.fit_scales_(1e3 * theta + 5.0, 1e-4 * context - 7.0)
    log_prob = again.log_prob(1e3 * theta + 5.0, 1e-4 * context - 7.0)
    torch.testing.assert_close(log_prob + 2 * math.log(1e3), first.log_prob(theta, context), rtol=1e-6, atol=1e-6)


def test_labels_stay_as_they_are():
    scaling = Standardise(2, [-1, 1])
    density = StandardisedDensity(AffineCouplingFlow(2, 3), scaling, Whitening(3))
    theta, context = torch.randint(5, (200, 2)).float(), torch.randn(200, 3)
    density.fit_scales_(theta, context)
    features = density.context_scaling(context)
    z = density.residual(scaling(theta), density.residual.prediction(features))
    assert torch.equal(z[:, 0].float(), theta[:, 0])
    assert z[:, 1].std() == pytest.approx(1.0, abs=0.05)

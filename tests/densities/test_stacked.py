"""Laws of stacked densities: each member is what it would be alone, in value, gradient, draw and training."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from pyro_voed.densities import AffineCouplingFlow, SplineCouplingFlow, StackedDensity, Standardise, StandardisedDensity
from pyro_voed.densities.stacked import member_density
from pyro_voed.estimators.learning import weights_group
from pyro_voed.training.ascent import Ascent

MEMBERS, ROWS = 4, 7


def made(flow=SplineCouplingFlow, theta_dim=3, context_dim=2):
    scaling = Standardise(theta_dim).fit_(torch.randn(20, theta_dim) * 3 + 1)
    density = StandardisedDensity(flow(theta_dim, context_dim), scaling, Standardise(context_dim))
    with torch.no_grad():
        for weight in density.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    return density


@pytest.fixture(params=[SplineCouplingFlow, AffineCouplingFlow])
def members(request):
    torch.manual_seed(0)
    # Double precision: Adam's first steps take the sign of a gradient, which rounding flips where it is nearly zero.
    return [made(request.param).double() for _ in range(MEMBERS)]


def points():
    return torch.randn(ROWS, MEMBERS, 3).double(), torch.randn(ROWS, MEMBERS, 2).double()


def test_log_densities_are_those_of_the_members(members):
    theta, context = points()
    together = StackedDensity(members).log_prob(theta, context)
    alone = torch.stack([m.log_prob(theta[:, i], context[:, i]) for i, m in enumerate(members)], -1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_member_taken_out_is_the_density_put_in(members):
    stacked = StackedDensity(members)
    for index, member in enumerate(members):
        taken = stacked.member(index).state_dict()
        for name, value in member.state_dict().items():
            assert torch.equal(taken[name], value)


def test_selected_members_keep_their_order(members):
    chosen = StackedDensity(members).select([2, 0])
    assert torch.equal(chosen.member(0).theta_scaling.mean, members[2].theta_scaling.mean)
    assert torch.equal(chosen.member(1).theta_scaling.mean, members[0].theta_scaling.mean)


def test_draws_come_from_their_own_member(members):
    """Means of 4,000 draws within five standard errors of each member's own: 12 entries, 1e-5 by chance."""
    _, context = points()
    torch.manual_seed(1)
    draws = StackedDensity(members).condition(context[0]).sample((4_000,))
    assert draws.shape == (4_000, MEMBERS, 3)
    for index, member in enumerate(members):
        own = member.condition(context[0, index]).sample((4_000,))
        error = torch.hypot(own.std(0), draws[:, index].std(0)) / 4_000**0.5
        assert ((draws[:, index].mean(0) - own.mean(0)).abs() < 5 * error).all()


def test_a_step_of_all_is_a_step_of_each(members):
    theta, context = points()
    alone = [copy.deepcopy(member) for member in members]
    stacked = StackedDensity(members)
    ascent = Ascent([weights_group(stacked, 1e-2)])
    for _ in range(3):
        assert ascent.step(stacked.log_prob(theta, context).mean())
    for index, member in enumerate(alone):
        own = Ascent([weights_group(member, 1e-2)])
        for _ in range(3):
            own.step(member.log_prob(theta[:, index], context[:, index]).mean())
        together = stacked.member(index).log_prob(theta[:, index], context[:, index])
        torch.testing.assert_close(together, member.log_prob(theta[:, index], context[:, index]), rtol=1e-3, atol=1e-3)


def test_members_climb_at_their_own_rates(members):
    theta, context = points()
    stacked = StackedDensity([members[0]] * 2)
    before = stacked.weights["density/trunk/0/weight"].detach().clone()
    ascent = Ascent([weights_group(stacked, (1e-2, 1e-3))])
    ascent.step(stacked.log_prob(theta[:, :1].expand(-1, 2, -1), context[:, :1].expand(-1, 2, -1)).mean())
    fast, slow = stacked.weights["density/trunk/0/weight"].detach() - before
    torch.testing.assert_close(slow, 0.1 * fast, rtol=1e-2, atol=1e-6)


def test_an_exploding_member_does_not_slow_the_others(members):
    theta, context = points()
    context[:, 0] *= 30.0
    stacked, calm = StackedDensity(members), StackedDensity(members[1:])
    Ascent([{**weights_group(stacked, 1e-2)}], clip_norm=0.1).step(stacked.log_prob(theta, context).mean())
    Ascent([{**weights_group(calm, 1e-2)}], clip_norm=0.1).step(calm.log_prob(theta[:, 1:], context[:, 1:]).mean())
    for key, value in calm.weights.items():
        torch.testing.assert_close(stacked.weights[key][1:], value, rtol=1e-3, atol=1e-5)


def test_rescaling_takes_each_members_own_simulations(members):
    stacked = StackedDensity(members)
    outcomes = torch.randn(50, MEMBERS, 2).double() * torch.arange(1.0, MEMBERS + 1)[:, None] + 3
    theta = torch.randn(50, MEMBERS, stacked.theta_dim).double()
    before = stacked.log_prob(theta, outcomes)
    stacked.rescale_context_(outcomes)
    for index in range(MEMBERS):
        expected = Standardise(2).double().fit_(outcomes[:, index])
        torch.testing.assert_close(stacked.member(index).context_scaling.mean, expected.mean)
        torch.testing.assert_close(stacked.member(index).context_scaling.scale, expected.scale)
    torch.testing.assert_close(stacked.log_prob(theta, outcomes), before)


def test_each_member_starts_at_its_own_draws():
    fresh = [
        StandardisedDensity(SplineCouplingFlow(3, 2), Standardise(3), Standardise(2)).double() for _ in range(MEMBERS)
    ]
    stacked = StackedDensity(fresh)
    context = torch.randn(200, MEMBERS, stacked.context_dim).double()
    theta = (
        context[..., :1] * torch.arange(1.0, MEMBERS + 1)[:, None]
        + torch.randn(200, MEMBERS, stacked.theta_dim).double()
    )
    stacked.start_(theta, context)
    for index, member in enumerate(fresh):
        member.start_(theta[:, index], context[:, index])
        own = stacked.member(index).log_prob(theta[:, index], context[:, index])
        torch.testing.assert_close(own, member.log_prob(theta[:, index], context[:, index]))
        # Predicting the first coordinate, of deviation (1 + i^2)^0.5, leaves one of 1.
        assert own.mean() > Normal(0, 1).log_prob(theta[:, index]).sum(-1).mean()


def test_members_of_other_structure_are_refused_by_name():
    with pytest.raises(ValueError, match=r"number 1 differs from the first at '.*'. Build them alike"):
        StackedDensity([made(), made(theta_dim=2)])
    with pytest.raises(ValueError, match="at least one density"):
        StackedDensity([])


def test_the_density_of_a_member_is_its_own_or_the_shared_one(members):
    assert member_density(members[0], 3) is members[0]
    assert torch.equal(member_density(StackedDensity(members), 3).theta_scaling.mean, members[3].theta_scaling.mean)


def test_frozen_summaries_stay_frozen_and_evaluation_reaches_the_members():
    summary = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).requires_grad_(False)
    flow, scalings = SplineCouplingFlow(3, 2), (Standardise(3), Standardise(2))
    stacked = StackedDensity([StandardisedDensity(flow, *scalings, summary)] * 2)
    trained = {key for key, weight in stacked.weights.items() if weight.requires_grad}
    assert trained == {key for key in stacked.weights if not key.startswith("summary")}
    stacked.eval()
    theta, context = torch.randn(50, 2, 3), torch.randn(50, 2, 2)
    with torch.no_grad():
        stacked.weights["density/gaussian/linear/weight"].fill_(1.0)
    assert torch.equal(stacked.log_prob(theta, context), stacked.log_prob(theta, context))

"""Laws of stacked densities: each member is what it would be alone, in value, gradient, draw and training."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from pyro_voed.densities import (
    AffineCouplingFlow,
    SplineCouplingFlow,
    StackedDensity,
    Standardise,
    StandardisedDensity,
    Whitening,
)
from pyro_voed.densities.stacked import member_density
from pyro_voed.training.ascent import Ascent
from tests.densities.cases import randomised

MEMBERS, ROWS = 4, 7


def made(flow=SplineCouplingFlow, theta_dim=3):
    scalings = Standardise(theta_dim).fit_(torch.randn(20, theta_dim) * 3 + 1), Standardise(2)
    # Double precision: Adam's first steps take the sign of a gradient, which rounding flips where it is nearly zero.
    return randomised(StandardisedDensity(flow(theta_dim, 2), *scalings), 0.03, torch.float64)


@pytest.fixture(params=[(SplineCouplingFlow, 3), (AffineCouplingFlow, 3), (SplineCouplingFlow, 1)], ids=str)
def members(request):
    return [made(*request.param) for _ in range(MEMBERS)]


def points(members, rows=ROWS):
    return torch.randn(rows, MEMBERS, members[0].theta_dim).double(), torch.randn(rows, MEMBERS, 2).double()


def alone(members, theta, context):
    return torch.stack([member.log_prob(theta[:, i], context[:, i]) for i, member in enumerate(members)], -1)


def climb(density, theta, context, num_steps=3, **options):
    group = {"params": list(density.parameters()), "lr": 1e-2, "members": getattr(density, "num_members", 1), **options}
    ascent = Ascent([group], clip_norm=0.1)
    for _ in range(num_steps):
        assert ascent.step(density.log_prob(theta, context).mean())


def test_members_stay_what_they_were(members):
    theta, context = points(members)
    stacked = StackedDensity(members)
    torch.testing.assert_close(stacked.log_prob(theta, context), alone(members, theta, context), rtol=1e-4, atol=1e-4)
    chosen = stacked.select([2, 0])
    for one, member in [*enumerate(members), (chosen.member(0), members[2]), (chosen.member(1), members[0])]:
        taken = member_density(stacked, one) if isinstance(one, int) else one
        assert all(map(torch.equal, taken.state_dict().values(), member.state_dict().values()))
    assert member_density(members[0], 3) is members[0]


def test_draws_come_from_their_own_member(members):
    """Means of 4,000 draws within five standard errors of each member's own: 12 entries, 1e-5 by chance."""
    _, context = points(members)
    draws = StackedDensity(members).condition(context[0]).sample((4_000,))
    assert draws.shape == (4_000, MEMBERS, members[0].theta_dim)
    for index, member in enumerate(members):
        own = member.condition(context[0, index]).sample((4_000,))
        error = torch.hypot(own.std(0), draws[:, index].std(0)) / 4_000**0.5
        assert ((draws[:, index].mean(0) - own.mean(0)).abs() < 5 * error).all()


def test_a_step_of_all_is_a_step_of_each_also_beside_one_that_explodes(members):
    theta, context = points(members)
    context[:, 0] *= 30.0
    own, stacked = copy.deepcopy(members), StackedDensity(members)
    climb(stacked, theta, context)
    for index, member in enumerate(own):
        climb(member, theta[:, index], context[:, index])
    torch.testing.assert_close(
        stacked.log_prob(theta, context)[:, 1:], alone(own, theta, context)[:, 1:], rtol=1e-3, atol=1e-3
    )


def test_members_climb_at_their_own_rates(members):
    theta, context = (values[:, :1].expand(-1, 2, -1) for values in points(members))
    stacked = StackedDensity([members[0]] * 2)
    before = stacked.weights["density/trunk/0/weight"].detach().clone()
    climb(stacked, theta, context, 1, factors=torch.tensor([1.0, 0.1]))
    fast, slow = stacked.weights["density/trunk/0/weight"].detach() - before
    torch.testing.assert_close(slow, 0.1 * fast, rtol=1e-2, atol=1e-6)


def test_scales_are_of_each_members_own_simulations():
    fresh = [StandardisedDensity(SplineCouplingFlow(3, 2), Standardise(3), Whitening(2)) for _ in range(MEMBERS)]
    sizes = torch.arange(1.0, MEMBERS + 1)[:, None]
    context = torch.randn(200, MEMBERS, 2) * sizes + 3
    theta = context[..., :1] * sizes + torch.randn(200, MEMBERS, 3)
    stacked = StackedDensity(fresh)
    stacked.fit_scales_(theta, context)
    log_prob = stacked.log_prob(theta, context)
    # Predicting the first coordinate leaves a deviation of 1.
    assert (log_prob.mean(0) > Normal(0, 1).log_prob(theta).sum(-1).mean(0)).all()
    for index, member in enumerate(fresh):
        member.fit_scales_(theta[:, index], context[:, index])
        assert torch.equal(_buffers(member), _buffers(stacked.member(index)))
        torch.testing.assert_close(member.log_prob(theta[:, index], context[:, index]), log_prob[:, index])


def _buffers(density):
    return torch.cat([value.flatten() for value in density.buffers()])


def test_members_of_other_structure_are_refused_by_name():
    with pytest.raises(ValueError, match=r"number 1 differs from the first at '.*'. Build them alike"):
        StackedDensity([made(), made(theta_dim=2)])
    with pytest.raises(ValueError, match="at least one density"):
        StackedDensity([])


def test_frozen_summaries_stay_frozen_and_evaluation_reaches_the_members():
    summary = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).requires_grad_(False)
    density = randomised(StandardisedDensity(SplineCouplingFlow(3, 2), Standardise(3), Standardise(2), summary))
    stacked = StackedDensity([density] * 2)
    trained = {key for key, weight in stacked.weights.items() if weight.requires_grad}
    assert trained == {key for key in stacked.weights if not key.startswith("summary")}
    theta, context = torch.randn(50, 2, 3), torch.randn(50, 2, 2)
    assert not torch.equal(stacked.log_prob(theta, context), stacked.log_prob(theta, context))
    stacked.eval()
    assert torch.equal(stacked.log_prob(theta, context), stacked.log_prob(theta, context))

"""Laws of standardised critics."""

import pytest
import torch
from torch import nn

from pyro_voed.densities import Standardise
from pyro_voed.densities.critics import JointCritic, SeparableCritic, StandardisedCritic

ARCHITECTURES = [SeparableCritic, JointCritic]


def standardised(critic, summary=None):
    scaling = Standardise(3).fit_(torch.randn(50, 3))
    return StandardisedCritic(critic, Standardise(2), scaling, summary, with_baseline=True).double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_critic_stays_what_it_is_when_its_contexts_get_other_scales(architecture):
    critic = standardised(architecture(2, 3))
    theta, context = torch.randn(6, 2).double(), 30.0 * torch.randn(20, 3).double() + 7.0
    before = critic(theta, context), critic.log_baseline(context)
    critic.rescale_context_(context)
    torch.testing.assert_close(critic.encode(context).std(0), torch.ones(3).double())
    torch.testing.assert_close((critic(theta, context), critic.log_baseline(context)), before)


class OwnCritic(nn.Module):
    def forward(self, theta, context):
        return theta.sum(-1) + context.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("critic", "summary"), [(SeparableCritic(2, 4), nn.Linear(3, 4)), (OwnCritic(), None)], ids=["summary", "own"]
)
def test_where_it_cannot_only_the_scales_change(critic, summary):
    """Behind a summary, and where a user's critic does not say how: its own weights stay as they are."""
    standardised_critic = standardised(critic, summary)
    weights = {name: value.clone() for name, value in critic.named_parameters()}
    context = 30.0 * torch.randn(20, 3).double() + 7.0
    standardised_critic.rescale_context_(context)
    torch.testing.assert_close(standardised_critic.context_scaling(context).std(0), torch.ones(3).double())
    assert all(torch.equal(value, weights[name]) for name, value in critic.named_parameters())

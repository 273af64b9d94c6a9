"""Critics score all pairs of targets and contexts."""

import pytest
import torch

from pyro_voed.densities.critics import JointCritic
from tests.densities.cases import ARCHITECTURES


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_critic_scores_all_pairs_of_each_design(make):
    critic = make(2, 3)
    theta, context = torch.randn(5, 4, 2), torch.randn(6, 4, 3)
    scores = critic(theta, context)
    assert scores.shape == (6, 5, 4)
    torch.testing.assert_close(scores[2, 3, 1], critic(theta[3:4, 1:2], context[2:3, 1:2])[0, 0, 0])


def test_chunks_do_not_change_scores():
    critic = JointCritic(1, 1, max_pairs=7)
    theta, context = torch.randn(9, 1), torch.randn(8, 1)
    with_gradients = critic(theta, context)
    with torch.no_grad():
        torch.testing.assert_close(critic(theta, context), with_gradients)

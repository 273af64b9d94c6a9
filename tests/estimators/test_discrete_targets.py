"""Estimates of what is learnt about discrete and mixed targets, against exact sums.

Each is compared at 4 standard errors to one side: an exact bound exceeds that with probability 3e-5.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Fresh, eig_flow, eig_nmc, eig_pce
from pyro_voed.problems import finite

SIDE = 4.0


def learnt(model, num_steps, num_samples=5_000):
    training = Fresh(num_steps=num_steps, learning_rate=1e-2)
    return eig_flow(model, "y", training=training, num_samples=num_samples, seed=0)


def entropy(probabilities):
    return torch.special.entr(probabilities).sum(-1)


def test_one_binary_target():
    result = learnt(finite.finite(), 200, 10_000)
    assert abs(result.eig - finite.DEFAULT_EIG) <= SIDE * result.standard_error
    # The classifier is the posterior: 0.4 (xi + 1) / (...) by Bayes's rule.
    success, prior = torch.tensor([0.25, 0.75]), torch.tensor([0.6, 0.4])
    for y, likelihood in ((0.0, 1 - success), (1.0, success)):
        probability = result.density.log_prob(torch.tensor([[1.0]]), torch.tensor([[y]])).exp().item()
        assert probability == pytest.approx((prior * likelihood / (prior @ likelihood))[1].item(), abs=0.03)


def two_kinds():
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * (kind + 1.0) + 2.0 * kind, 1.0))


def test_mixed_targets_agree_with_nested_estimates():
    y, kind = torch.linspace(-25.0, 30.0, 20_001).double(), torch.arange(3.0).double()
    parts = dist.Normal(2.0 * kind, (1 + (kind + 1) ** 2).sqrt()).log_prob(y[:, None]).exp()
    outcome = parts @ torch.tensor([0.2, 0.3, 0.5]).double()  # a mixture of three Gaussians
    exact = torch.trapezoid(torch.special.entr(outcome), y).item() - 0.5 * math.log(2 * math.pi * math.e)
    flow = learnt(two_kinds, 150, 4_000)
    upper, lower = (nested(two_kinds, "y", num_outer_samples=3_000, seed=0) for nested in (eig_nmc, eig_pce))
    assert exact - 0.06 - SIDE * flow.standard_error <= flow.eig <= exact + SIDE * flow.standard_error
    assert lower.eig <= exact + SIDE * lower.standard_error
    assert upper.eig >= exact - SIDE * upper.standard_error
    assert max(abs(upper.eig - exact), abs(lower.eig - exact)) <= 0.02 + SIDE * upper.standard_error


def discrimination():
    """Which of three models made two counts?"""
    model = pyro.sample("model", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    with pyro.plate("days", 2):
        pyro.sample("y", dist.Binomial(4, (1.0 + 2.0 * model) / 6.0))


def discrimination_joint():
    """Probabilities of model and outcome, `(3, 25)`."""
    success = torch.tensor([[1.0], [3.0], [5.0]]).double() / 6
    one = dist.Binomial(4, success).log_prob(torch.arange(5.0).double()).exp()
    both = (one[:, :, None] * one[:, None, :]).flatten(1)
    return torch.tensor([[0.5], [0.3], [0.2]]).double() * both


def exclusive():
    """Two switches; the outcome tells whether they differ, and nearly nothing about either alone."""
    first = pyro.sample("first", dist.Bernoulli(0.4))
    second = pyro.sample("second", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * (first != second)))


def exclusive_joint():
    """Probabilities of the pair and the outcome, `(4, 2)`."""
    rows = []
    for first, second in itertools.product((0, 1), repeat=2):
        success, prior = 0.1 + 0.8 * (first != second), (0.4 if first else 0.6) * 0.5
        rows.append([prior * (1 - success), prior * success])
    return torch.tensor(rows).double()


@pytest.mark.parametrize(
    ("model", "joint"),
    [(discrimination, discrimination_joint()), (exclusive, exclusive_joint())],
    ids=["which model", "two targets in chain-rule order"],
)
def test_discrete_targets_of_discrete_outcomes(model, joint):
    result = learnt(model, 200)
    exact = (entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.flatten())).item()
    assert exact - 0.02 - SIDE * result.standard_error <= result.eig <= exact + SIDE * result.standard_error
    assert result.eig < entropy(joint.sum(1))

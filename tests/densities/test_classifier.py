"""Laws of discrete and mixed densities, and of the estimates made with them.

Frequencies and estimates are compared in standard errors: an exact one exceeds `Z_MAX` = 4.5 with probability 7e-6.
"""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import eig_flow, eig_nmc, eig_pce
from pyro_voed.densities import Classifier, MixedDensity, SplineCouplingFlow, as_density
from pyro_voed.problems import finite

Z_MAX = 4.5
SIDE = 4.0
VALUES = [torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 2.0, 5.0])]
FREQUENCIES = [torch.tensor([0.3, 0.7]), torch.tensor([0.2, 0.3, 0.5])]
CONTEXT_DIM = 2


def randomised(density, size=0.5):
    """Away from its start, where the heads ignore what they are given."""
    with torch.no_grad():
        for weight in density.parameters():
            weight.add_(size * torch.randn_like(weight))
    return density


def classifier(context_dim=CONTEXT_DIM):
    return randomised(Classifier(VALUES, context_dim, hidden_dim=8))


def mixed(context_dim=CONTEXT_DIM):
    inner = SplineCouplingFlow(1, context_dim + 5, num_transforms=1, hidden_dim=8)
    # The continuous entry stands between the discrete ones.
    # Larger weights make peaks too narrow for a grid.
    return randomised(MixedDensity(classifier(context_dim), inner, torch.tensor([True, False, True])), 0.2)


CASES = {"classifier": classifier, "mixed": mixed}
TABLE = torch.cartesian_prod(*VALUES)  # (6, 2), all discrete vectors


@pytest.mark.parametrize("context_dim", [0, 2])
def test_probabilities_sum_to_one(context_dim):
    density, context = classifier(context_dim), torch.randn(5, context_dim)
    log_prob = density.log_prob(TABLE[:, None, :], context)
    assert log_prob.shape == (6, 5)
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(5))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_mixed_density_sums_and_integrates_to_one(context_dim):
    density, context = mixed(context_dim).double(), torch.randn(2, context_dim).double()
    grid = torch.linspace(-40.0, 40.0, 16_001).double()
    column = lambda value: value.double().expand(len(grid))  # noqa: E731
    theta = torch.stack([torch.stack([column(first), grid, column(last)], -1) for first, last in TABLE])
    log_prob = density.log_prob(theta[:, :, None, :], context)  # (6, grid, 2)
    total = torch.trapezoid(log_prob.exp(), grid, dim=1).sum(0)
    torch.testing.assert_close(total, torch.ones(2).double(), atol=2e-3, rtol=0)


def test_it_starts_at_the_frequencies_whatever_the_context():
    density = Classifier(VALUES, CONTEXT_DIM, frequencies=FREQUENCIES)
    expected = (FREQUENCIES[0][:, None] * FREQUENCIES[1]).flatten()
    for context in torch.randn(3, CONTEXT_DIM):
        torch.testing.assert_close(density.log_prob(TABLE, context).exp(), expected)
    equal = Classifier(VALUES, CONTEXT_DIM).log_prob(TABLE, torch.zeros(CONTEXT_DIM))
    torch.testing.assert_close(equal.exp(), torch.full((6,), 1 / 6))


def test_draws_come_with_their_probabilities():
    density, context = classifier(), torch.randn(CONTEXT_DIM)
    draws = density.condition(context).sample((20_000,))
    expected = density.log_prob(TABLE, context).exp()
    for vector, probability in zip(TABLE, expected.tolist(), strict=True):
        share = (draws == vector).all(-1).double().mean().item()
        assert abs(share - probability) <= Z_MAX * math.sqrt(probability * (1 - probability) / 20_000)
    assert torch.isfinite(density.log_prob(draws, context)).all()


def test_mixed_draws_come_from_the_density():
    density, context = mixed(), torch.randn(CONTEXT_DIM)
    draws = density.condition(context).sample((20_000,))
    assert draws.shape == (20_000, 3)
    probabilities = density.classifier.log_prob(TABLE, context).exp()
    for vector, probability in zip(TABLE, probabilities.tolist(), strict=True):
        here = (draws[:, ::2] == vector).all(-1)
        assert abs(here.double().mean() - probability) <= Z_MAX * math.sqrt(probability * (1 - probability) / 20_000)
        given = torch.cat([context, density._encoded(vector)])
        inner = density.density.condition(given).sample((20_000,))[:, 0]
        own = draws[here, 1]
        error = math.hypot(own.std() / math.sqrt(len(own)), inner.std() / math.sqrt(20_000))
        assert abs(own.mean() - inner.mean()) <= Z_MAX * error


def test_other_values_have_no_probability():
    log_prob = classifier().log_prob(torch.tensor([[0.0, 2.0], [0.5, 2.0], [0.0, 3.0]]), torch.zeros(CONTEXT_DIM))
    assert log_prob[0].isfinite()
    assert (log_prob[1:] == -torch.inf).all()
    other = torch.tensor([[0.0, 0.3, 2.0], [0.0, 0.3, 3.0]])
    log_prob = mixed().log_prob(other, torch.zeros(CONTEXT_DIM))
    assert log_prob[0].isfinite()
    assert log_prob[1] == -torch.inf


@pytest.mark.parametrize("name", CASES)
def test_batches_broadcast(name):
    density = CASES[name]()
    context = torch.randn(4, 1, CONTEXT_DIM)
    draws = density.condition(context).sample((3,))
    assert draws.shape == (3, 4, 1, density.theta_dim)
    log_prob = density.log_prob(draws[:, :, :, :], context)
    assert log_prob.shape == (3, 4, 1)
    torch.testing.assert_close(log_prob[2, 1, 0], density.log_prob(draws[2, 1, 0], context[1, 0]))
    torch.testing.assert_close(density.condition(context).log_prob(draws), log_prob)
    torch.testing.assert_close(density(draws, context), log_prob)


@pytest.mark.parametrize("name", CASES)
def test_it_reads_the_context(name):
    density = CASES[name]()
    theta = density.condition(torch.zeros(CONTEXT_DIM)).sample((5,))
    assert (density.log_prob(theta, torch.zeros(CONTEXT_DIM)) != density.log_prob(theta, torch.ones(CONTEXT_DIM))).all()


def test_later_entries_see_earlier_ones():
    log_prob = classifier().log_prob(TABLE, torch.zeros(CONTEXT_DIM)).reshape(2, 3)
    given = log_prob - log_prob.logsumexp(1, keepdim=True)
    assert (given[0] - given[1]).abs().max() > 1e-3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda density: pickle.loads(pickle.dumps(density))])
@pytest.mark.parametrize("name", CASES)
def test_copies_are_equal_and_apart(name, duplicate):
    density = CASES[name]()
    context = torch.randn(7, CONTEXT_DIM)
    theta = density.condition(context).sample()
    twin = duplicate(density)
    before = density.log_prob(theta, context)
    assert torch.equal(twin.log_prob(theta, context), before)
    randomised(twin)
    assert torch.equal(density.log_prob(theta, context), before)


@pytest.mark.parametrize("name", CASES)
def test_they_fulfil_the_contract_without_gradients_of_draws(name):
    density = CASES[name]()
    assert as_density(density, density.theta_dim, CONTEXT_DIM) is density
    conditioned = density.condition(torch.zeros(CONTEXT_DIM))
    assert not conditioned.has_rsample
    with pytest.raises(NotImplementedError, match="without gradients"):
        conditioned.rsample()
    draws, context = conditioned.sample((2,)).double(), torch.zeros(CONTEXT_DIM).double()
    assert density.double().log_prob(draws, context).dtype == torch.float64


@pytest.mark.parametrize("values", [[], [torch.zeros(2, 2)], [torch.zeros(0)]])
def test_wrong_values_are_refused(values):
    with pytest.raises(ValueError, match="one 1-d tensor of values"):
        Classifier(values, 1)


def test_a_value_of_frequency_zero_is_impossible_rather_than_undefined():
    density = Classifier([torch.tensor([0.0, 1.0])], 1, frequencies=[torch.tensor([0.0, 1.0])])
    log_prob = density.log_prob(torch.tensor([[0.0], [1.0]]), torch.zeros(1))
    assert log_prob.tolist() == [-math.inf, 0.0]


# --- estimates ------------------------------------------------------------------------------------------------------


def test_the_bound_of_one_binary_target():
    result = eig_flow(finite.finite(), "y", num_steps=200, learning_rate=1e-2, num_samples=10_000, seed=0)
    assert abs(result.eig - finite.DEFAULT_EIG) <= SIDE * result.standard_error
    # The classifier is the posterior: 0.4 (xi + 1) / (...) by Bayes's rule.
    for y in (0.0, 1.0):
        with torch.no_grad():
            learnt = result.density.log_prob(torch.tensor([[1.0]]), torch.tensor([[y]])).exp().item()
        success = torch.tensor([0.25, 0.75])
        likelihood = success if y else 1 - success
        exact = (0.4 * likelihood[1] / (0.6 * likelihood[0] + 0.4 * likelihood[1])).item()
        assert learnt == pytest.approx(exact, abs=0.03)


def two_kinds():
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * (kind + 1.0) + 2.0 * kind, 1.0))


def two_kinds_eig():
    """A mixture of three Gaussians less the noise."""
    y = torch.linspace(-25.0, 30.0, 20_001).double()
    density = sum(
        weight * dist.Normal(2.0 * kind, math.sqrt(1 + (kind + 1) ** 2)).log_prob(y).exp()
        for kind, weight in enumerate((0.2, 0.3, 0.5))
    )
    return torch.trapezoid(torch.special.entr(density), y).item() - 0.5 * math.log(2 * math.pi * math.e)


def test_mixed_targets_agree_with_nested_estimates():
    flow = eig_flow(two_kinds, "y", num_steps=250, learning_rate=1e-2, num_samples=4_000, seed=0)
    upper, lower = eig_nmc(two_kinds, "y", seed=0), eig_pce(two_kinds, "y", seed=0)
    exact = two_kinds_eig()
    assert exact - 0.06 - SIDE * flow.standard_error <= flow.eig <= exact + SIDE * flow.standard_error
    assert lower.eig <= exact + SIDE * lower.standard_error
    assert upper.eig >= exact - SIDE * upper.standard_error
    assert max(abs(upper.eig - exact), abs(lower.eig - exact)) <= 0.02 + SIDE * upper.standard_error


def discrimination():
    """Which of three models made two counts?"""
    model = pyro.sample("model", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    rate = 1.0 + 2.0 * model
    with pyro.plate("days", 2):
        pyro.sample("y", dist.Binomial(4, rate / 6.0))


def discrimination_eig():
    prior = torch.tensor([0.5, 0.3, 0.2]).double()
    success = torch.tensor([[1.0], [3.0], [5.0]]).double() / 6
    of_one = dist.Binomial(4, success).log_prob(torch.arange(5.0).double()).exp()
    both = torch.stack([torch.outer(row, row).flatten() for row in of_one])  # (model, outcome)
    entropy = lambda p: torch.special.entr(p).sum(-1)  # noqa: E731
    return (entropy(prior @ both) - prior @ entropy(both)).item()


def test_model_discrimination():
    result = eig_flow(discrimination, "y", num_steps=150, learning_rate=1e-2, num_samples=5_000, seed=0)
    exact = discrimination_eig()
    assert exact - 0.02 - SIDE * result.standard_error <= result.eig <= exact + SIDE * result.standard_error
    assert result.eig < math.log(3)


def test_two_discrete_targets_are_learnt_in_chain_rule_order():
    def model():
        first = pyro.sample("first", dist.Bernoulli(0.4))
        second = pyro.sample("second", dist.Bernoulli(0.5))
        # The outcome tells whether they differ, and of neither alone much.
        pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * (first != second)))

    result = eig_flow(model, "y", num_steps=200, learning_rate=1e-2, num_samples=5_000, seed=0)
    joint = torch.zeros(2, 2, 2).double()
    for first, second, y in itertools.product((0, 1), repeat=3):
        success = 0.1 + 0.8 * (first != second)
        joint[first, second, y] = (0.4 if first else 0.6) * 0.5 * (success if y else 1 - success)
    entropy = lambda p: torch.special.entr(p).sum()  # noqa: E731
    exact = (entropy(joint.sum((0, 1))) + entropy(joint.sum(2)) - entropy(joint)).item()
    assert exact - 0.02 - SIDE * result.standard_error <= result.eig <= exact + SIDE * result.standard_error

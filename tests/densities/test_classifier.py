"""Laws of discrete and mixed densities; those of all densities are in `test_density_laws`.

Frequencies are compared in standard errors: an exact one exceeds `Z_MAX` = 4.5 with probability 7e-6.
"""

import math

import pytest
import torch

from pyro_voed.densities import Classifier
from tests.densities import cases
from tests.densities.cases import CONTEXT_DIM, VALUES, randomised

Z_MAX = 4.5
TABLE = torch.cartesian_prod(*VALUES)  # (6, 2), all discrete vectors
NUM_DRAWS = 20_000


def classifier(context_dim=CONTEXT_DIM):
    return randomised(cases.classifier(context_dim), 0.5)


def mixed(context_dim=CONTEXT_DIM):
    return randomised(cases.mixed(context_dim), 0.2)  # larger weights make peaks too narrow for a grid


def is_frequency(hits, probability):
    return abs(hits.double().mean() - probability) <= Z_MAX * math.sqrt(probability * (1 - probability) / len(hits))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_probabilities_sum_to_one(context_dim):
    log_prob = classifier(context_dim).log_prob(TABLE[:, None, :], torch.randn(5, context_dim))
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(5))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_mixed_density_sums_and_integrates_to_one(context_dim):
    density, context = mixed(context_dim).double(), torch.randn(2, context_dim).double()
    grid = torch.linspace(-40.0, 40.0, 16_001).double()
    table = TABLE.double()[:, None].expand(-1, len(grid), -1)
    theta = torch.stack([table[..., 0], grid.expand(6, -1), table[..., 1]], -1)
    log_prob = density.log_prob(theta[:, :, None, :], context)  # (6, grid, 2)
    total = torch.trapezoid(log_prob.exp(), grid, dim=1).sum(0)
    torch.testing.assert_close(total, torch.ones(2).double(), atol=2e-3, rtol=0)


def test_it_starts_at_the_frequencies_for_every_context():
    frequencies = [torch.tensor([0.3, 0.7]), torch.tensor([0.2, 0.3, 0.5])]
    context = torch.randn(6, CONTEXT_DIM)
    started = Classifier(VALUES, CONTEXT_DIM, frequencies=frequencies).log_prob(TABLE, context)
    torch.testing.assert_close(started.exp(), torch.outer(*frequencies).flatten())
    torch.testing.assert_close(Classifier(VALUES, CONTEXT_DIM).log_prob(TABLE, context).exp(), torch.full((6,), 1 / 6))


def test_a_value_of_frequency_zero_is_impossible_rather_than_undefined():
    density = Classifier([torch.tensor([0.0, 1.0])], 1, frequencies=[torch.tensor([0.0, 1.0])])
    assert density.log_prob(torch.tensor([[0.0], [1.0]]), torch.zeros(1)).tolist() == [-math.inf, 0.0]


def test_draws_come_with_their_probabilities():
    density, context = classifier(), torch.randn(CONTEXT_DIM)
    draws = density.condition(context).sample((NUM_DRAWS,))
    for vector, probability in zip(TABLE, density.log_prob(TABLE, context).exp().tolist(), strict=True):
        assert is_frequency((draws == vector).all(-1), probability)


def test_mixed_draws_come_from_the_density():
    density, context = mixed(), torch.randn(CONTEXT_DIM)
    draws = density.condition(context).sample((NUM_DRAWS,))
    probabilities = density.classifier.log_prob(TABLE, context).exp()
    for vector, probability in zip(TABLE, probabilities.tolist(), strict=True):
        here = (draws[:, ::2] == vector).all(-1)
        assert is_frequency(here, probability)
        inner = density.density.condition(torch.cat([context, density._encoded(vector)])).sample((NUM_DRAWS,))[:, 0]
        own = draws[here, 1]
        error = math.hypot(own.std() / math.sqrt(len(own)), inner.std() / math.sqrt(NUM_DRAWS))
        assert abs(own.mean() - inner.mean()) <= Z_MAX * error


def test_other_values_have_no_probability():
    entries = torch.tensor([[0.0, 2.0], [0.5, 2.0], [0.0, 3.0]])
    between = torch.cat([entries[:, :1], torch.full((3, 1), 0.3), entries[:, 1:]], -1)
    for density, theta in ((classifier(), entries), (mixed(), between)):
        log_prob = density.log_prob(theta, torch.zeros(CONTEXT_DIM))
        assert log_prob.isfinite().tolist() == [True, False, False]
        assert (log_prob[1:] == -torch.inf).all()


def test_later_entries_see_earlier_ones():
    log_prob = classifier().log_prob(TABLE, torch.zeros(CONTEXT_DIM)).reshape(2, 3)
    given = log_prob - log_prob.logsumexp(1, keepdim=True)
    assert (given[0] - given[1]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [classifier, mixed])
def test_draws_have_no_gradients_and_say_so(make):
    conditioned = make().condition(torch.zeros(CONTEXT_DIM))
    assert not conditioned.has_rsample
    with pytest.raises(NotImplementedError, match="without gradients"):
        conditioned.rsample()


@pytest.mark.parametrize("values", [[], [torch.zeros(2, 2)], [torch.zeros(0)]])
def test_wrong_values_are_refused(values):
    with pytest.raises(ValueError, match="one 1-d tensor of values"):
        Classifier(values, 1)

"""All pairs of outcomes and inner draws score as pair by pair, and their sums are those of the pairs."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, sample_joint
from pyro_voed.experiment import pairs
from pyro_voed.experiment.packing import pack_run
from pyro_voed.experiment.pairs import log_likelihood_of_pairs, log_sums, normal_pairs, pairwise_log_density
from pyro_voed.experiment.programs import run_rows
from pyro_voed.experiment.scoring import log_joint, outcome_log_likelihood
from tests.experiment.cases import CLOSE, EXPLICIT, both_ways, explicit, masked, moving_support, normal

NORMAL = {"scalar design", "design in a plate", "scalar design beside a plate", "matrix design", "dependent bounds"}
NORMAL |= {"michaelis_menten", "nested plates", "simplex", "discrete target", "normals of many scales"}


pytestmark = pytest.mark.usefixtures("unvalidated")


def inner_run(experiment, num_rows):
    """A run, and the outcomes that it made."""
    run = run_rows(experiment.program, num_rows, experiment.shapes, designs=experiment.design_values)
    return run, {site.name: run.value(site.name) for site in experiment.observations}


@both_ways
@explicit
def test_all_pairs_score_as_pair_by_pair(case, vectorize):
    experiment = Experiment(*case, vectorize=vectorize)
    outcomes = sample_joint(experiment, 5)
    run, own = inner_run(experiment, 7)
    theta = pack_run(experiment, run, torch.Size([7]), False).theta
    observed = {site.name: outcomes.values[site.name] for site in experiment.observations}
    found = log_likelihood_of_pairs(experiment, experiment.design_values, observed, run, 7)
    repeated = {site: value.repeat_interleave(7, 0) for site, value in observed.items()}
    _, one_by_one = log_joint(experiment, theta.repeat(5, 1), repeated, experiment.design_values)
    # Pairs are in the outcome's own coordinates, the others in packed ones.
    torch.testing.assert_close(found, one_by_one.reshape(5, 7) - outcomes.outcome_log_det[:, None], **CLOSE)
    diagonal = log_likelihood_of_pairs(experiment, experiment.design_values, own, run, 7).diagonal()
    torch.testing.assert_close(diagonal, outcome_log_likelihood(run, experiment), **CLOSE)


@pytest.mark.parametrize("omit_own", [True, False])
@pytest.mark.parametrize("name", EXPLICIT)
def test_sums_in_blocks_are_those_of_the_pairs(name, omit_own, monkeypatch):
    monkeypatch.setattr(pairs, "NORMAL_PAIRS", (3, 5))
    experiment = Experiment(*EXPLICIT[name])
    run, outcomes = inner_run(experiment, 11)
    plain = not experiment.linked_outcomes and normal_pairs(experiment.observations, run) is not None
    assert plain is (name in NORMAL), "only plain normals are normal pairs"
    each = log_likelihood_of_pairs(experiment, experiment.design_values, outcomes, run, 11).double()
    if omit_own:
        each.fill_diagonal_(-math.inf)
    # Where outcomes are not normal, memory for four pairs at a time or so.
    total = log_sums(experiment, experiment.design_values, outcomes, run, 2_000, omit_own=omit_own)
    torch.testing.assert_close(total, each.logsumexp(-1).float(), **CLOSE)


def test_normal_pairs_keep_their_digits_far_from_zero():
    experiment = Experiment(lambda: normal("y", normal("theta", 1e4, 1e3), 0.1), "y")
    run, outcomes = inner_run(experiment, 50)
    exact = dist.Normal(run.value("theta").double(), 0.1).log_prob(outcomes["y"].double()[:, None])
    total = log_sums(experiment, {}, outcomes, run)
    torch.testing.assert_close(total.double(), exact.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_outcomes_outside_the_support_have_no_density():
    experiment = Experiment(moving_support, "y")
    run = run_rows(experiment.program, 3, experiment.shapes, row_values={"theta": torch.tensor([0.0, 0.0, 2.0])})
    found = pairwise_log_density(experiment.observations, {"y": torch.tensor([0.2, 0.9, 0.9])}, run)
    assert found.tolist() == [[0.0, 0.0, -math.inf], [-math.inf] * 3, [-math.inf] * 3]


def test_what_is_not_measured_scores_nothing():
    experiment = Experiment(masked, "y")
    outcomes = torch.randn(2, 3)
    other = outcomes.clone()
    other[:, 1] = 1e6
    run, _ = inner_run(experiment, 4)
    first, second = (pairwise_log_density(experiment.observations, {"y": y}, run) for y in (outcomes, other))
    torch.testing.assert_close(first, second)

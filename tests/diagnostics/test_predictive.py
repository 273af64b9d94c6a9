"""Posterior predictive checks against closed forms; thresholds: see `cases`."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Fresh
from pyro_voed.diagnostics.predictive import _place, posterior_predictive_check
from pyro_voed.estimators import eig_flow
from pyro_voed.inference import flow_posterior
from pyro_voed.problems.linear_gaussian import linear_gaussian
from tests.diagnostics.cases import THRESHOLD


@pytest.fixture(scope="module")
def trained():
    return eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=300), seed=0)


OUTCOME = torch.tensor([1.0, 2.0, 1.5])


def test_predictive_outcomes_are_those_of_the_posterior(trained):
    # y = X theta + unit noise: the mean of each outcome is X times that of theta, its variance the noise's larger.
    statistics = {f"y[{i}]": lambda outcome, i=i: outcome["y"][:, i] for i in range(3)}
    check = posterior_predictive_check(trained, OUTCOME, statistics, 4_000, seed=0)
    design = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    signal = flow_posterior(trained, OUTCOME, 4_000, seed=1).flat("theta") @ design.T
    for drawn, exact in ((check.draws, signal), (check.draws.square(), signal.square() + 1)):
        error = torch.hypot(drawn.std(0), exact.std(0)) / math.sqrt(4_000)
        assert ((drawn.mean(0) - exact.mean(0)).abs() < THRESHOLD * error).all()
    assert torch.equal(check.observed, OUTCOME.double())
    assert check.names == ("y[0]", "y[1]", "y[2]")


def test_an_outcome_the_model_cannot_make_is_found(trained):
    def difference(outcome):  # of two measurements of one coefficient: noise alone, N(0, 2)
        return outcome["y"][:, 1] - outcome["y"][:, 2]

    odd = torch.tensor([0.0, 4.0, -4.0])
    check = posterior_predictive_check(trained, odd, difference, 2_000, seed=0)
    assert check.p_values < 0.01
    assert check.quantile > 0.99
    usual = posterior_predictive_check(trained, OUTCOME, difference, 2_000, seed=0)
    exact = torch.special.ndtr(torch.tensor(0.5 / math.sqrt(2.0)))
    assert abs(usual.quantile - exact) < THRESHOLD * usual.quantile_error
    assert abs(usual.p_values - 2 * (1 - exact)) < 2 * THRESHOLD * usual.quantile_error


def test_p_values_of_exchangeable_statistics_are_uniform():
    draws = torch.randn(99, 4_000).double()
    p_values = _place(("t",) * 4_000, torch.randn(4_000).double(), draws).p_values
    for level in (0.02, 0.1, 0.5):
        assert abs((p_values <= level + 1e-9).double().mean() - level) < THRESHOLD * math.sqrt(level / 4_000)


def test_ties_count_half():
    placed = _place(("t",), torch.zeros(1).double(), torch.tensor([[-1.0], [0.0], [0.0], [1.0]]).double())
    assert placed.quantile.item() == 0.5
    assert placed.p_values.item() == 1.0


def test_predictive_checks_keep_seeds_and_the_callers_stream(trained):
    total = lambda outcome: outcome["y"].sum(-1)  # noqa: E731
    state = torch.get_rng_state()
    first, second = (posterior_predictive_check(trained, OUTCOME, total, 50, seed=2) for _ in range(2))
    assert torch.equal(first.draws, second.draws)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = [posterior_predictive_check(trained, OUTCOME, total, 50).draws for _ in range(2)]
    assert not torch.equal(*fresh)
    assert str(first).splitlines()[1].startswith("statistic  observed 4.5, predicted")


REFUSED = {
    "statistic": ({"mean": 3.0}, TypeError),
    "expected at least one": ({}, ValueError),
    "expected it to return a tensor": (lambda outcome: 1.0, TypeError),
    r"shape \(1,\), got \(1, 3\)": (lambda outcome: outcome["y"], ValueError),
    "not finite": (lambda outcome: outcome["y"][:, 0] / 0.0, ArithmeticError),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_statistics_are_refused(trained, message):
    statistic, error = REFUSED[message]
    with pytest.raises(error, match=message):
        posterior_predictive_check(trained, OUTCOME, statistic, 50, seed=0)


def test_deterministic_targets_cannot_be_simulated_from():
    def model():
        root = pyro.sample("root", dist.Normal(0.0, 1.0))
        square = pyro.deterministic("square", root**2)
        pyro.sample("y", dist.Normal(square, 1.0))

    result = eig_flow(Experiment(model, "y", "square", prior_entropy=1.0), training=Fresh(num_steps=2), seed=0)
    with pytest.raises(NotImplementedError, match=r"\['square'\] are deterministic"):
        posterior_predictive_check(result, torch.tensor(1.0), lambda outcome: outcome["y"], 50)


def test_each_member_of_a_batch_is_simulated_at_its_own_design():
    designs = {"xi": torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])}
    result = eig_flow(linear_gaussian(), "y", "theta", designs=designs, training=Fresh(num_steps=50), seed=0)
    check = posterior_predictive_check(
        result, torch.zeros(3), lambda outcome: outcome["y"][:, 0], 4_000, design_index=0, seed=0
    )
    # Without a design there is noise alone, N(0, 1), whatever the targets are.
    assert abs(check.draws.mean()) < THRESHOLD / math.sqrt(4_000)
    assert abs(check.draws.var() - 1.0) < THRESHOLD * math.sqrt(2 / 4_000)

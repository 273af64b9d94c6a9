"""Given values score as the draws that they are: log densities put together by hand agree with the simulator's own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_voed import Experiment, sample_joint
from pyro_voed.experiment.scoring import log_joint
from pyro_voed.problems import linear_gaussian
from tests.experiment.cases import CLOSE, both_ways, discrete_outcome, explicit, linked, masked, moving_support, normal

pytestmark = pytest.mark.usefixtures("unvalidated")


@both_ways
@explicit
def test_the_generating_draws_score_as_when_they_were_drawn(case, vectorize):
    experiment = Experiment(*case, vectorize=vectorize)
    sample = sample_joint(experiment, 60, likelihood=True)
    log_prior, log_likelihood = log_joint(experiment, sample.theta, sample.values, experiment.design_values)
    assert log_prior.shape == log_likelihood.shape == (60,)
    torch.testing.assert_close(log_prior, sample.log_prior, **CLOSE)
    torch.testing.assert_close(log_likelihood, sample.log_likelihood, **CLOSE)


@pytest.mark.parametrize("own", [True, False], ids=["own design", "another"])
def test_the_closed_form_of_a_gaussian(own):
    experiment = Experiment(linear_gaussian.linear_gaussian(), "y")
    theta, y = torch.randn(20, 2), torch.randn(20, 3)
    design = experiment.design_values["xi"] if own else torch.randn(3, 2)
    log_prior, log_likelihood = log_joint(experiment, theta, {"y": y}, {"xi": design})
    prior = dist.Normal(0.0, torch.tensor(linear_gaussian.DEFAULT_PRIOR_SCALES)).log_prob(theta).sum(-1)
    torch.testing.assert_close(log_prior, prior)
    torch.testing.assert_close(log_likelihood, dist.Normal(theta @ design.T, 1.0).log_prob(y).sum(-1))


def test_a_positive_target_is_scored_in_its_packed_coordinates():
    experiment = Experiment(discrete_outcome, "y")
    theta = torch.linspace(-2.0, 2.0, 9)[:, None]
    log_prior, _ = log_joint(experiment, theta, {"y": torch.ones(9)}, {})
    torch.testing.assert_close(log_prior, dist.Gamma(3.0, 1.0).log_prob(theta[:, 0].exp()) + theta[:, 0])
    # A density of the packed coordinate: it integrates to one there.
    grid = torch.linspace(-12.0, 4.0, 4_001)[:, None]
    density = log_joint(experiment, grid, {"y": torch.ones(4_001)}, {})[0].exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "theta", "y", "expected"),
    [
        (moving_support, [0.0, 0.0, 2.0], [0.2, 0.9, 0.9], [0.0, -math.inf, -math.inf]),
        (discrete_outcome, [0.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [-math.inf, -math.inf, -2.0]),
    ],
    ids=["outside the support", "no count"],
)
def test_what_cannot_be_drawn_has_no_density(model, theta, y, expected):
    _, log_likelihood = log_joint(Experiment(model, "y"), torch.tensor(theta)[:, None], {"y": torch.tensor(y)}, {})
    assert log_likelihood.tolist() == expected


def test_what_is_not_measured_scores_nothing():
    experiment = Experiment(masked, "y")
    outcomes = torch.randn(2, 3)
    other = outcomes.clone()
    other[:, 1] = 1e6
    first, second = (log_joint(experiment, torch.zeros(2, 1), {"y": y}, {})[1] for y in (outcomes, other))
    torch.testing.assert_close(first, second)


def test_a_replaced_prior_is_the_one_that_scores():
    experiment = Experiment(linked, ["y", "z"], prior=lambda: normal("theta", 0.5, 2.0))
    sample = sample_joint(experiment, 20)
    log_prior, _ = log_joint(experiment, sample.theta, sample.values, {})
    torch.testing.assert_close(log_prior, dist.Normal(0.5, 2.0).log_prob(sample.theta[:, 0]))


def test_an_automatic_guide_as_prior_cannot_score_and_is_refused():
    guide = AutoDiagonalNormal(pyro.condition(linked, data={"y": torch.tensor(0.0), "z": torch.tensor(1.0)}))
    guide()
    experiment = Experiment(linked, ["y", "z"], prior=guide)
    sample = sample_joint(experiment, 20, likelihood=True)
    with pytest.raises(NotImplementedError, match="auxiliary sites"):
        log_joint(experiment, sample.theta, sample.values, {})

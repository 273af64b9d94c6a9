"""Given values score as the draws that they are: log densities put together by hand agree with the simulator's own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_voed import resolve, sample_joint
from pyro_voed.estimators import nested
from pyro_voed.experiment.programs import run_rows
from pyro_voed.experiment.scoring import log_joint, normal_pairs, outcome_log_likelihood, pairwise_log_likelihood
from pyro_voed.experiment.simulate import pack_run
from pyro_voed.problems import finite, linear_gaussian, michaelis_menten


def in_plates():
    with pyro.plate("people", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, torch.tensor([0.5, 1.0, 2.0])))
        pyro.sample("y", dist.Normal(theta, 1.0))


def nested_plates():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 2, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("people", 3, dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0))


def positive():
    rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.LogNormal(rate.log(), scale))


def simplex():
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("y", dist.Normal(shares, 0.3).to_event(1))


def dependent_support():
    upper = pyro.sample("upper", dist.Uniform(0.5, 2.0))
    place = pyro.sample("place", dist.Uniform(0.0, upper))
    pyro.sample("y", dist.Normal(upper + place, 0.3))


def discrete_outcome():
    theta = pyro.sample("theta", dist.Gamma(3.0, 1.0))
    pyro.sample("y", dist.Poisson(2.0 * theta))


def discrete_target():
    coin = pyro.sample("coin", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta * (coin + 1.0), 1.0))


def masked():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0))
    with pyro.plate("measurements", 3), pyro.poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("y", dist.Normal(theta, 1.0))


def masked_counts():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0))
    with pyro.plate("measurements", 4), pyro.poutine.mask(mask=torch.tensor([True, False, True, False])):
        pyro.sample("y", dist.Poisson(theta.exp()))


def correlated():
    theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]])))
    pyro.sample("y", dist.MultivariateNormal(theta, torch.tensor([[1.0, -0.3], [-0.3, 0.5]])))


def two_kinds():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0))
    pyro.sample("z", dist.Bernoulli(logits=theta))


def moving_support():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Uniform(theta - 0.5, theta + 0.5))


def linked():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    first = pyro.sample("y", dist.Normal(theta, 1.0))
    pyro.sample("z", dist.Normal(theta + 0.8 * first, 1.0))


def own_scales():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    theta = pyro.sample("theta", dist.Normal(torch.tensor([5.0, -2.0]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(theta, scale.unsqueeze(-1) * torch.tensor([1.0, 0.1])).to_event(1))
    pyro.sample("z", dist.Normal(theta[..., 0], 2.0))


CASES = {
    "linear_gaussian": (linear_gaussian.linear_gaussian(), "y"),
    "michaelis_menten": (michaelis_menten.michaelis_menten(), "y"),
    "finite": (finite.finite(), "y"),
    "plates": (in_plates, "y"),
    "nested plates": (nested_plates, "y"),
    "positive": (positive, "y"),
    "simplex": (simplex, "y"),
    "dependent support": (dependent_support, "y"),
    "discrete outcome": (discrete_outcome, "y"),
    "discrete target": (discrete_target, "y"),
    "masked": (masked, "y"),
    "masked counts": (masked_counts, "y"),
    "correlated": (correlated, "y"),
    "two kinds of outcome": (two_kinds, ["y", "z"]),
    "moving support": (moving_support, "y"),
    "normals of many scales": (own_scales, ["y", "z"]),
    "linked outcomes": (linked, ["y", "z"]),
}


@pytest.fixture(autouse=True)
def _unvalidated(clean_process):
    # As in every estimator: with validation torch refuses to score what lies outside a support.
    with pyro.validation_enabled(False):
        yield


WAYS = [pytest.param(True, id="vectorised"), pytest.param(False, id="one by one")]
UNLINKED = [name for name in CASES if name != "linked outcomes"]
CLOSE = {"rtol": 2e-4, "atol": 2e-4}
"""Coordinates are mapped there and back in single precision."""


@pytest.mark.parametrize("vectorize", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_the_generating_draws_score_as_when_they_were_drawn(name, vectorize):
    experiment = resolve(*CASES[name], vectorize=vectorize)
    sample = sample_joint(experiment, 60, likelihood=True)
    log_prior, log_likelihood = log_joint(experiment, sample.theta, sample.values, experiment.design_values)
    assert log_prior.shape == log_likelihood.shape == (60,)
    torch.testing.assert_close(log_prior, sample.log_prior, **CLOSE)
    torch.testing.assert_close(log_likelihood, sample.log_likelihood, **CLOSE)


@pytest.mark.parametrize("vectorize", WAYS)
@pytest.mark.parametrize("name", UNLINKED)
def test_all_pairs_score_as_pair_by_pair(name, vectorize):
    experiment = resolve(*CASES[name], vectorize=vectorize)
    outcomes = sample_joint(experiment, 5)
    run = run_rows(experiment.program, 7, experiment.shapes, designs=experiment.design_values)
    theta = pack_run(experiment, run, torch.Size([7]), False).theta
    pairs = pairwise_log_likelihood(experiment, outcomes.values, run)
    repeated = {site: value.repeat_interleave(7, 0) for site, value in outcomes.values.items()}
    _, one_by_one = log_joint(experiment, theta.repeat(5, 1), repeated, experiment.design_values)
    # Pairs are in the outcome's own coordinates, the others in packed ones.
    expected = one_by_one.reshape(5, 7) - outcomes.outcome_log_det[:, None]
    torch.testing.assert_close(pairs, expected, **CLOSE)


@pytest.mark.parametrize("name", UNLINKED)
def test_the_diagonal_of_the_pairs_is_the_run_itself(name):
    experiment = resolve(*CASES[name])
    run = run_rows(experiment.program, 6, experiment.shapes, designs=experiment.design_values)
    outcomes = {site.name: run.value(site.name) for site in experiment.observations}
    diagonal = pairwise_log_likelihood(experiment, outcomes, run).diagonal()
    torch.testing.assert_close(diagonal, outcome_log_likelihood(run, experiment), **CLOSE)


NORMAL = ["linear_gaussian", "michaelis_menten", "plates", "nested plates", "simplex", "dependent support"]
NORMAL += ["discrete target", "normals of many scales"]


@pytest.mark.parametrize("own", ["omitted", "counted", "foreign"])
@pytest.mark.parametrize("name", NORMAL)
def test_normal_pairs_sum_in_blocks_as_one_by_one(name, own, monkeypatch):
    monkeypatch.setattr(nested, "NORMAL_PAIRS", (3, 5))
    experiment = resolve(*CASES[name])
    run = run_rows(experiment.program, 11, experiment.shapes, designs=experiment.design_values)
    outcomes = {site.name: run.value(site.name) for site in experiment.observations}
    assert normal_pairs(experiment, run) is not None
    pairs = pairwise_log_likelihood(experiment, outcomes, run).double()
    if own == "omitted":
        pairs.fill_diagonal_(-math.inf)
    expected = pairs.logsumexp(-1) - math.log(10 if own == "omitted" else 11)
    total = nested.log_marginal(experiment, experiment.design_values, outcomes, run, own=own)
    torch.testing.assert_close(total, expected.float(), **CLOSE)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(NORMAL)))
def test_only_plain_normals_are_normal_pairs(name):
    experiment = resolve(*CASES[name])
    assert (
        normal_pairs(experiment, run_rows(experiment.program, 4, experiment.shapes, designs=experiment.design_values))
        is None
    )


def test_normal_pairs_keep_their_digits_far_from_zero():
    def model():
        theta = pyro.sample("theta", dist.Normal(1e4, 1e3))
        pyro.sample("y", dist.Normal(theta, 0.1))

    experiment = resolve(model, "y")
    run = run_rows(experiment.program, 50, experiment.shapes)
    outcomes = {"y": run.value("y")}
    exact = dist.Normal(run.value("theta").double(), 0.1).log_prob(outcomes["y"].double()[:, None])
    total = nested.log_marginal(experiment, {}, outcomes, run)
    torch.testing.assert_close(total.double(), exact.logsumexp(-1) - math.log(50), rtol=1e-4, atol=1e-4)


def test_the_closed_form_of_a_gaussian():
    experiment = resolve(linear_gaussian.linear_gaussian(), "y")
    theta, y = torch.randn(20, 2), torch.randn(20, 3)
    log_prior, log_likelihood = log_joint(experiment, theta, {"y": y}, experiment.design_values)
    prior = dist.Normal(0.0, torch.tensor(linear_gaussian.DEFAULT_PRIOR_SCALES)).log_prob(theta).sum(-1)
    mean = theta @ experiment.design_values["xi"].T
    torch.testing.assert_close(log_prior, prior)
    torch.testing.assert_close(log_likelihood, dist.Normal(mean, 1.0).log_prob(y).sum(-1))


def test_a_positive_target_is_scored_in_its_packed_coordinates():
    experiment = resolve(discrete_outcome, "y")
    theta = torch.linspace(-2.0, 2.0, 9)[:, None]
    log_prior, _ = log_joint(experiment, theta, {"y": torch.ones(9)}, {})
    torch.testing.assert_close(log_prior, dist.Gamma(3.0, 1.0).log_prob(theta[:, 0].exp()) + theta[:, 0])
    # A density of the packed coordinate: it integrates to one there.
    grid = torch.linspace(-12.0, 4.0, 4_001)[:, None]
    density = log_joint(experiment, grid, {"y": torch.ones(4_001)}, {})[0].exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


def test_outcomes_outside_the_support_have_no_density():
    experiment = resolve(moving_support, "y")
    theta = torch.tensor([[0.0], [0.0], [2.0]])
    outcomes = {"y": torch.tensor([0.2, 0.9, 0.9])}
    _, log_likelihood = log_joint(experiment, theta, outcomes, {})
    run = run_rows(experiment.program, 3, experiment.shapes, row_values={"theta": theta[:, 0]})
    pairs = pairwise_log_likelihood(experiment, outcomes, run)
    assert log_likelihood.tolist() == [0.0, -math.inf, -math.inf]
    assert pairs.tolist() == [[0.0, 0.0, -math.inf], [-math.inf] * 3, [-math.inf] * 3]


def test_a_count_that_is_none_has_no_mass():
    experiment = resolve(discrete_outcome, "y")
    _, log_likelihood = log_joint(experiment, torch.zeros(3, 1), {"y": torch.tensor([-1.0, 0.5, 0.0])}, {})
    assert log_likelihood.tolist() == [-math.inf, -math.inf, -2.0]


def test_what_is_not_measured_scores_nothing():
    experiment = resolve(masked, "y")
    outcomes = torch.randn(2, 3)
    other = outcomes.clone()
    other[:, 1] = 1e6
    run = run_rows(experiment.program, 4, experiment.shapes)
    pairs = lambda y: pairwise_log_likelihood(experiment, {"y": y}, run)  # noqa: E731
    rows = lambda y: log_joint(experiment, torch.zeros(2, 1), {"y": y}, {})[1]  # noqa: E731
    for score in (pairs, rows):
        torch.testing.assert_close(score(outcomes), score(other))


def test_designs_change_the_score():
    experiment = resolve(linear_gaussian.linear_gaussian(), "y")
    theta, y, design = torch.randn(4, 2), torch.randn(4, 3), torch.randn(3, 2)
    _, log_likelihood = log_joint(experiment, theta, {"y": y}, {"xi": design})
    torch.testing.assert_close(log_likelihood, dist.Normal(theta @ design.T, 1.0).log_prob(y).sum(-1))


def test_a_replaced_prior_is_the_one_that_scores():
    def prior():
        pyro.sample("theta", dist.Normal(0.5, 2.0))

    experiment = resolve(two_kinds, ["y", "z"], prior=prior)
    sample = sample_joint(experiment, 20)
    log_prior, _ = log_joint(experiment, sample.theta, sample.values, {})
    torch.testing.assert_close(log_prior, dist.Normal(0.5, 2.0).log_prob(sample.theta[:, 0]))


def test_an_automatic_guide_as_prior_cannot_score_and_is_refused():
    guide = AutoDiagonalNormal(pyro.condition(two_kinds, data={"y": torch.tensor(0.0), "z": torch.tensor(1.0)}))
    guide()
    experiment = resolve(two_kinds, ["y", "z"], prior=guide)
    sample = sample_joint(experiment, 20, likelihood=True)
    with pytest.raises(NotImplementedError, match="auxiliary sites"):
        log_joint(experiment, sample.theta, sample.values, {})

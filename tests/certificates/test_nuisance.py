"""Certificates of models with nuisance sites: two sides of values known in closed form or by quadrature.

A 95 % interval is missed by an exact method once in twenty. Single intervals below are asked for at 99.99 %, so that
one of the six misses by chance six times in 10,000.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Fresh, certify, eig_flow
from pyro_voed.problems.linear_gaussian import dependent_nuisance
from tests.estimators.test_nested import CASES, two_regressions, two_regressions_eig

SURE = 0.9999
SHORT = {"training": Fresh(num_steps=300), "seed": 0, "progress": False}


def trained(model, observations="y", targets="theta", **options):
    return eig_flow(model, observations, targets, certify=True, **{**SHORT, **options})


@pytest.mark.parametrize(
    "name",
    [
        *("dependent nuisance", "coins"),
        # The last takes two million simulations, its targets' density being an average over runs of its own.
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("plated", "sampled after", "in between")),
    ],
)
def test_intervals_hold_the_exact_value(name):
    model, observations, targets, exact = CASES[name]
    result = certify(trained(model, observations, targets), confidence=SURE, seed=1)
    low, high = result.interval.tolist()
    assert low <= exact <= high
    assert result.certificate.certified
    assert high - low <= 0.12


def test_an_interval_of_a_choice_between_models():
    exact, error = two_regressions_eig()
    result = certify(trained(two_regressions, targets="quadratic"), confidence=SURE, seed=1)
    low, high = result.interval.tolist()
    assert low - 4 * error <= exact <= high + 4 * error
    assert high <= math.log(2.0) + 0.02


def with_design():
    xi = pyro.param("xi", torch.tensor(1.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    u = pyro.sample("u", dist.Gamma(2.0, 2.0))
    pyro.sample("y", dist.Normal(xi * theta * u, 0.5))


@pytest.mark.slow
def test_several_designs_share_one_density_of_the_nuisance():
    designs = {"xi": torch.tensor([0.0, 1.0, 3.0])}
    result = trained(with_design, designs=designs)
    assert result.interval.shape == (2, 3)
    assert result.interval[0, 0] <= 0.0 <= result.interval[1, 0], "nothing is learned at 0"
    alone = [trained(with_design, designs={"xi": xi}) for xi in designs["xi"][1:]]
    for index, other in enumerate(alone, 1):
        # Both hold the same value, each at 95 %: by chance they are disjoint less than once in 400.
        assert result.interval[0, index] <= other.interval[1]
        assert other.interval[0] <= result.interval[1, index]


def test_what_was_not_learned_is_named():
    plain = eig_flow(dependent_nuisance(), "y", "theta", **SHORT)
    with pytest.raises(NotImplementedError, match=r"density of the nuisance sites.*eig_flow\(..., certify=True\)"):
        certify(plain)


def endless():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    count = pyro.sample("count", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(theta + count, 1.0))


def test_nuisance_that_no_density_can_stand_for_is_refused_before_training():
    experiment = Experiment(endless, "y", "theta")
    spent = experiment.num_calls
    with pytest.raises(NotImplementedError, match=r"certify learns a density of the nuisance sites, and \['count'\]"):
        trained(experiment, None, None)
    assert experiment.num_calls == spent


def random_effects():
    """One reading in each of four groups, whose effects are nuisance: the total is normal."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 4):
        effect = pyro.sample("effect", dist.Normal(0.0, 0.7))
        pyro.sample("y", dist.Normal(theta + effect, 0.5))


COVERED = {
    "random effects": (random_effects, "theta", lambda: 0.5 * math.log1p(4.0 / (0.49 + 0.25))),
    "two regressions": (two_regressions, "quadratic", lambda: two_regressions_eig(4_000_000)[0]),
}


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("name", COVERED)
def test_intervals_hold_as_often_as_they_say(name):
    """At least 182 of 200; an exact 95 % interval fails that six times in 1,000."""
    model, target, exact = COVERED[name]
    value, result = exact(), trained(model, targets=target, training=Fresh())
    found = [certify(result, seed=seed).interval for seed in range(200)]
    assert sum(bool(low <= value <= high) for low, high in found) >= 182

"""The marginal bound's own ways: the mass function of discrete outcomes, dequantisation, guides of the outcome."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Fresh, eig_marginal
from pyro_voed.densities import SplineCouplingFlow
from pyro_voed.problems.finite import DEFAULT_EIG, finite
from tests.closed_forms import gain_eig, scalar
from tests.estimators.cases import CASES, Case, estimate, on_its_side

FITTED = Fresh(num_steps=300, learning_rate=0.02)


def test_mass_function_and_dequantisation_are_both_upper():
    case = CASES["Poisson"]
    by_mass, spread = estimate("marginal", case), estimate("marginal", case, dequantise=True)
    assert by_mass.history is None
    assert spread.history is not None
    # The averaged mass function is exact but for its ten thousand draws.
    on_its_side(by_mass, case.exact, 0.01)
    on_its_side(spread, case.exact, 0.15)


def positive(name, start):
    return pyro.param(name, torch.tensor(start), constraint=constraints.positive)


def gaussian_guide():
    pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.5)), positive("scale", 1.0)))


def log_normal_guide():
    pyro.sample("y", dist.LogNormal(pyro.param("loc", torch.tensor(0.1)), positive("scale", 1.5)))


def designed_guide():
    pyro.sample("y", dist.Normal(0.0, (pyro.param("xi", torch.tensor(1.5)) ** 2 + positive("noise", 0.5)).sqrt()))


def bernoulli_guide():
    pyro.sample("y", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))


# A Gaussian family holds the marginal N(0, 1 + 1.5 ** 2), its exponential that of a positive outcome, in the same
# coordinates; one that reads the design holds that of every design.
FAMILIES = {
    "Gaussian": (CASES["scalar"], gaussian_guide, None, 0.05),
    "positive": (CASES["positive outcome"], log_normal_guide, None, 0.05),
    "over designs": (Case(scalar, gain_eig([0.5, 2.0])), designed_guide, {"xi": torch.tensor([0.5, 2.0])}, 0.03),
    "discrete": (Case(finite(), DEFAULT_EIG), bernoulli_guide, None, 0.005),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_guide_is_fitted_to_the_outcome(name):
    case, guide, designs, gap = FAMILIES[name]
    result = estimate("marginal", case, guide=guide, designs=designs, training=FITTED, num_samples=10_000)
    on_its_side(result, case.exact, gap)
    if name == "Gaussian":
        assert result.density.values()["scale"].item() == pytest.approx(math.sqrt(3.25), rel=0.1)
    assert list(pyro.get_param_store().keys()) == []
    with pytest.raises(ValueError, match="describes the outcome"):
        result.density.condition_on(torch.tensor(1.0))


def another_site():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guide": another_site}, r"guide.*\['y'\].*\['z'\]"),
        ({"guide": lambda: pyro.sample("y", dist.Normal(0.0, 1.0))}, "guide.*nothing to learn"),
        ({"guide": gaussian_guide, "density": SplineCouplingFlow(1, 0)}, "not both"),
    ],
)
def test_wrong_guides_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        eig_marginal(scalar, "y", **options)

"""Sums are exact, to the rounding of single precision (1e-5), and refuse what they cannot hold."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import eig_exact
from pyro_voed.problems.finite import exact_eig, finite
from tests.closed_forms import poisson, scalar

DESIGNS = torch.tensor([[0.0, 0.3], [0.5, 1.0]])


def test_it_is_the_closed_form_at_every_design():
    result = eig_exact(finite(), "y", designs={"xi": DESIGNS})
    torch.testing.assert_close(result.eig.double(), exact_eig(DESIGNS), rtol=0, atol=1e-5)
    assert result.bound == "exact"
    assert (result.standard_error == 0).all()
    assert "(exact, eig_exact)" in str(result)
    # The seed serves the checks of the model alone.
    assert torch.equal(eig_exact(finite(), "y", designs={"xi": DESIGNS}, seed=3).eig, result.eig)


def assay():
    """Two infections, one of which makes the other likelier, a false reader, and two readings."""
    xi = pyro.param("xi", torch.tensor(0.7), constraint=constraints.unit_interval)
    first = pyro.sample("first", dist.Bernoulli(0.3))
    second = pyro.sample(
        "second", dist.Categorical(torch.stack([0.5 - 0.2 * first, 0.3 + 0.0 * first, 0.2 + 0.2 * first], -1))
    )
    false = pyro.sample("false", dist.Bernoulli(0.2))
    rate = (0.1 + 0.6 * xi * first + 0.1 * second) * (1 - false) + 0.5 * false
    pyro.sample("y", dist.Binomial(2, rate))


def by_hand(xi):
    """The same in plain Python."""
    joint = {}
    for first, second, false, y in itertools.product((0, 1), (0, 1, 2), (0, 1), (0, 1, 2)):
        prior = (0.3 if first else 0.7) * (0.5 - 0.2 * first, 0.3, 0.2 + 0.2 * first)[second] * (0.2 if false else 0.8)
        rate = 0.5 if false else 0.1 + 0.6 * xi * first + 0.1 * second
        mass = prior * math.comb(2, y) * rate**y * (1 - rate) ** (2 - y)
        joint[(first, second), y] = joint.get(((first, second), y), 0.0) + mass
    theta, outcome = {}, {}
    for (t, y), mass in joint.items():
        theta[t], outcome[y] = theta.get(t, 0.0) + mass, outcome.get(y, 0.0) + mass
    return sum(mass * math.log(mass / (theta[t] * outcome[y])) for (t, y), mass in joint.items())


def test_nuisance_sites_are_summed_over():
    xi = torch.tensor([0.0, 0.4, 1.0])
    result = eig_exact(assay, "y", ["first", "second"], designs={"xi": xi})
    assert result.eig.tolist() == pytest.approx([by_hand(value) for value in xi.tolist()], abs=1e-5)


def test_many_states_and_designs_are_quick():
    def grid():
        xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.unit_interval)
        place = pyro.sample("place", dist.Categorical(torch.ones(15_000)))
        pyro.sample("y", dist.Bernoulli(torch.sigmoid(10.0 * (place / 15_000 - xi))))

    result = eig_exact(grid, "y", designs={"xi": torch.linspace(0.0, 1.0, 100)})
    place = torch.arange(15_000).double() / 15_000
    chance = torch.sigmoid(10.0 * (place - 0.5))
    entropy = lambda p: torch.special.entr(p) + torch.special.entr(1 - p)  # noqa: E731
    middle = 0.5 * (result.eig[49] + result.eig[50])
    assert middle.item() == pytest.approx((entropy(chance.mean()) - entropy(chance).mean()).item(), abs=1e-4)
    assert result.eig[49:51].tolist() == pytest.approx([result.eig.max().item()] * 2, abs=1e-5)


def many():
    pyro.sample("y", dist.Bernoulli(pyro.sample("theta", dist.Bernoulli(torch.full((25,), 0.5)).to_event(1)).mean(-1)))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (scalar, NotImplementedError, r"\['theta', 'y'\] have other values"),
        (poisson, NotImplementedError, "Use eig_nmc"),
        (many, NotImplementedError, "states times outcomes are 6.71e"),
    ],
)
def test_what_cannot_be_listed_is_refused(model, error, words):
    with pytest.raises(error, match=words):
        eig_exact(model, "y")

"""Exchanges: menus with forbidden rows, whole numbers, allocations; noise; starts; refusals."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import allocation, eig_nmc, search_exchange, search_grid


def regression():
    """Three rows of two entries."""
    xi = pyro.param("xi", torch.tensor([[0.9, 0.1], [0.8, 0.0], [0.7, 0.2]]))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), torch.tensor([1.0, 1.5])).to_event(1))
    return pyro.sample("y", dist.Normal((xi @ theta.unsqueeze(-1)).squeeze(-1), 1.0).to_event(1))


def exact_eig(xi):
    spread = torch.diag(torch.tensor([1.0, 1.5]) ** 2)
    return 0.5 * torch.logdet(torch.eye(3) + xi @ spread @ xi.mT)


MENU = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7], [0.5, 0.5]])
ALL = {"xi": torch.stack([torch.stack(rows) for rows in itertools.product(MENU, repeat=3)])}


def distinct(designs):
    return len(designs["xi"].unique(dim=0)) == 3


@pytest.mark.parametrize("allowed", [None, distinct], ids=["all", "no row twice"])
def test_the_best_of_all_designs_from_a_menu_is_found_without_looking_at_all(own_estimator, allowed):
    calls = []
    estimator = own_estimator(regression, exact_eig, 1e-3, calls=calls)
    found = search_exchange(estimator, {"xi": MENU}, allowed=allowed, starts=2, seed=0)
    looked = sum(designs["xi"].shape[0] for designs in calls if designs and designs["xi"].dim() == 3)
    values = [exact_eig(xi) for xi in ALL["xi"] if allowed is None or distinct({"xi": xi})]
    assert max(values) - exact_eig(found.designs["xi"]) < 1e-3
    assert looked < len(ALL["xi"])
    assert all(any(torch.equal(row, option) for option in MENU) for row in found.designs["xi"])
    assert all(allowed is None or distinct({"xi": xi}) for xi in found.path["xi"])
    assert found.history.stop_reason == "converged"
    assert found.start_eigs.shape == (2,)
    if allowed is not None:
        grid = search_grid(estimator, ALL, allowed=allowed, seed=0)
        assert grid.candidates.eig.shape == (60,)
        assert grid.eig == pytest.approx(found.eig.item(), abs=0.01)


def arms():
    """Subjects of three arms with known variances: one normal outcome each, so the counts divide the variance."""
    n = pyro.param("n", torch.tensor([4.0, 4.0, 4.0]), constraint=constraints.nonnegative)
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    precision = n / torch.tensor([1.0, 4.0, 9.0])
    return pyro.sample("y", dist.Normal(precision.sqrt() * theta, 1.0).to_event(1))


def arms_eig(n):
    return 0.5 * torch.log1p(n / torch.tensor([1.0, 4.0, 9.0])).sum(-1)


@pytest.mark.parametrize("total", [3, 30])
def test_subjects_are_allocated_exactly(own_estimator, total):
    found = search_exchange(own_estimator(arms, arms_eig, 1e-5), {"n": allocation(total)}, seed=0)
    own = found.designs["n"]
    counts = torch.tensor([(a, b, total - a - b) for a in range(total + 1) for b in range(total + 1 - a)]).float()
    torch.testing.assert_close(arms_eig(own), arms_eig(counts).max())  # two of 496 may be equally good
    assert torch.equal(found.path["n"].sum(-1), torch.full((len(found.path["n"]),), float(total)))
    assert own.min() == 0 or torch.equal(pyro.param("n").detach().round(), own)


def test_whole_numbers_are_bought_at_a_price(own_estimator):
    def cost(designs):
        return 0.02 * designs["n"].sum()

    found = search_exchange(own_estimator(arms, arms_eig, 1e-6), {"n": torch.arange(31)}, cost=cost, seed=0)
    # Separately 0.5 log(1 + n / v) - 0.02 n is largest at 25 - v, as a whole number too.
    assert found.designs["n"].tolist() == [24.0, 21.0, 16.0]


def test_noise_alone_moves_nothing_far_and_rounds_are_limited(own_estimator):
    flat = own_estimator(arms, lambda n: 0.0 * n.sum(-1), 1.0)
    found = search_exchange(flat, {"n": allocation(12)}, max_rounds=8, seed=0)
    assert len(found.path["n"]) <= 9
    steep = own_estimator(arms, arms_eig, 0.05)
    noisy = search_exchange(steep, {"n": allocation(30)}, seed=0)
    assert arms_eig(noisy.designs["n"]) > arms_eig(torch.tensor([10.0, 10.0, 10.0])) - 0.05


def test_an_estimator_of_the_library_is_searched():
    def estimator(designs):
        return eig_nmc(regression, "y", "theta", designs=designs, num_outer_samples=300)

    found = search_exchange(estimator, {"xi": MENU}, seed=0)
    assert max(exact_eig(xi) for xi in ALL["xi"]) - exact_eig(found.designs["xi"]) < 0.1


WRONG = {
    "no choices": ({}, {}, TypeError, "choices: expected a dict"),
    "words": ({"xi": ["a"]}, {}, TypeError, "expected options as numbers"),
    "one number": ({"xi": 1.0}, {}, ValueError, "expected options"),
    "another shape": ({"xi": torch.ones(3, 3)}, {}, ValueError, "expected options .num_options, .shape of an entry"),
    "an unknown design": ({"time": [1.0]}, {}, ValueError, "no design called"),
    "nothing allowed": ({"xi": MENU}, {"allowed": lambda designs: False}, ValueError, "allowed: it refuses the stored"),
    "no starts": ({"xi": MENU}, {"starts": 0}, ValueError, "starts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_choices_are_refused(own_estimator, name):
    choices, options, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        search_exchange(own_estimator(regression, exact_eig, 0.1), choices, **options)


def test_choices_outside_constraints_are_refused(own_estimator):
    estimator = own_estimator(arms, arms_eig, 0.1)
    with pytest.raises(ValueError, match="violate the design's constraint"):
        search_exchange(estimator, {"n": [-1.0, 2.0]})
    with pytest.raises(ValueError, match="total"):
        allocation(0)
    with pytest.raises(ValueError, match="refuses all of the 2"):
        search_grid(estimator, {"n": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]}, allowed=lambda designs: math.inf < 0)

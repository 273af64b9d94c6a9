"""Information less cost, and information per cost, in every search."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import (
    Fresh,
    load,
    optimise_design,
    per_cost,
    save,
    search_exchange,
    search_grid,
    search_random,
    search_spsa,
)
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.design.cost import as_cost


def scaled():
    """Information 0.5 log(1 + xi squared)."""
    xi = pyro.param("xi", torch.tensor(1.0), constraint=constraints.interval(0.0, 8.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def eig(xi):
    return 0.5 * torch.log1p(xi.square())


def price(designs):
    return 0.2 * designs["xi"]


def rent(designs):
    return 1.0 + designs["xi"]


GRID = torch.linspace(0.0, 8.0, 801)
# xi / (1 + xi^2) = 0.2 at 4.79; the ratio is largest at about 2.3.
WORTH = {"less": (price, eig(GRID) - 0.2 * GRID), "per": (per_cost(rent), eig(GRID) / (1.0 + GRID))}
SEARCHES = {
    "grid": lambda f, cost: search_grid(f, {"xi": GRID[::10]}, cost=cost, seed=0),
    "random": lambda f, cost: search_random(f, 200, cost=cost, seed=0),
    "exchange": lambda f, cost: search_exchange(f, {"xi": GRID[::10]}, cost=cost, seed=0),
    "SPSA": lambda f, cost: search_spsa(f, num_steps=200, cost=cost, seed=0),
    "SPSA in one call": lambda f, cost: search_spsa(f, num_steps=200, cost=cost, common_random_numbers=False, seed=0),
}


def climbed(estimator, cost):
    return optimise_design(
        scaled,
        "y",
        "theta",
        cost=cost,
        density=lambda theta_dim, context_dim: AffineCouplingFlow(
            theta_dim, context_dim, num_transforms=1, hidden_dim=8
        ),
        training=Fresh(300, batch_size=128, learning_rate=1e-2, design_learning_rate=0.1),
        starts={"xi": torch.tensor([6.0])},
        num_samples=1_000,
        progress=False,
        seed=0,
    )


@pytest.mark.parametrize("kind", WORTH)
@pytest.mark.parametrize("name", [*SEARCHES, "by gradient"])
def test_the_design_that_is_worth_most_is_found_and_its_cost_told(own_estimator, name, kind):
    cost, worth = WORTH[kind]
    result = {**SEARCHES, "by gradient": climbed}[name](own_estimator(scaled, eig, 1e-4), cost)
    xi = result.designs["xi"]
    own = eig(xi) - 0.2 * xi if kind == "less" else eig(xi) / (1.0 + xi)
    assert worth.max() - own < 0.01
    torch.testing.assert_close(result.cost, 0.2 * xi if kind == "less" else 1.0 + xi)
    torch.testing.assert_close(result.worth, result.eig - result.cost if kind == "less" else result.eig / result.cost)
    assert f"cost {result.cost.item():.4g}" in str(result)
    if name in ("grid", "random"):
        assert result.candidate_worth.argmax() != result.candidates.eig.argmax()


def test_gradients_are_those_of_the_worth():
    xi = torch.tensor([0.7, 2.0], requires_grad=True)
    for cost, factor in ((as_cost(price), torch.ones(2)), (per_cost(rent), 1.0 + xi.detach())):
        terms = eig(xi) + torch.tensor([[-0.1], [0.1]])  # two draws, two starts
        costs = torch.stack([cost.at({"xi": one}) for one in xi])
        charged = cost.charged(terms, costs)
        torch.testing.assert_close(charged.mean(0), cost.worth(eig(xi), costs))
        (expected,) = torch.autograd.grad(cost.worth(eig(xi), costs).sum(), xi, retain_graph=True)
        (found,) = torch.autograd.grad(charged.mean(0).sum(), xi)
        torch.testing.assert_close(found, factor * expected)


WRONG = {
    "no function": (2.0, TypeError, "cost: expected a function"),
    "several numbers": (lambda designs: torch.ones(2), TypeError, "cost: expected a function from one design"),
    "no number": (lambda designs: math.nan, ValueError, "cost: expected a finite number"),
    "nothing to divide by": (per_cost(lambda designs: 0.0), ValueError, "above 0, to divide by"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_costs_are_refused(own_estimator, name):
    cost, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        search_grid(own_estimator(scaled, eig, 0.1), {"xi": GRID[:3]}, cost=cost)
    with pytest.raises(error, match=words):
        climbed(None, cost)


def test_costs_are_saved(own_estimator, tmp_path):
    result = search_grid(own_estimator(scaled, eig, 0.1), {"xi": GRID[::100]}, cost=price, seed=0)
    save(result, tmp_path / "result.pt")
    again = load(tmp_path / "result.pt")
    assert (again.cost, again.worth) == (result.cost, result.worth)

"""Exchanges of entries: a stand-in that is exact where all is Gaussian, ways out of traps, and what they keep to."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyro_voed import Experiment, min_gap
from pyro_voed.design.cost import as_cost
from pyro_voed.design.projection import Projection
from pyro_voed.design.swaps import NEIGHBOURS, SIMULATIONS, _neighbour, _told, can_swap, swapped

NOISE = 0.3


def parabola():
    """Four measurements of a parabola on (-1, 1), of which the value at 1.2 is to be told."""
    xi = pyro.param("xi", torch.tensor([-1.0, -0.27, 0.99, 0.99]), constraint=constraints.interval(-1.0, 1.0))
    value = pyro.sample("value", dist.Normal(0.0, 1.0))
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    away = xi - 1.2
    mean = value.unsqueeze(-1) + slopes[..., :1] * away + slopes[..., 1:] * away.square()
    return pyro.sample("y", dist.Normal(mean, NOISE).to_event(1))


def exact(xi):
    powers = torch.stack([(xi - 1.2) ** k for k in range(3)], -1)
    both, others = (p @ p.mT + NOISE**2 * torch.eye(4) for p in (powers, powers[..., 1:]))
    return 0.5 * (torch.logdet(both) - torch.logdet(others))


def laid_out(model, num=2, **options):
    experiment = Experiment(model, "y", **options)
    rows = {site.name: site.value.expand(num, *site.value.shape) for site in experiment.designs}
    return experiment.laid_out(rows), {site.name: site.value for site in experiment.designs}


def test_the_stand_in_is_the_information_of_a_gaussian_experiment():
    experiment, _ = laid_out(parabola, target_labels="value")
    designs = 2 * torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) - 1
    errors = torch.stack([_told(experiment, {"xi": designs}) - exact(designs) for _ in range(20)])
    # The logarithm of a variance from n normal residuals has a standard deviation of sqrt(2 / n); two such, halved.
    each = (1.0 / SIMULATIONS) ** 0.5
    assert errors.std() < 2 * each
    assert abs(errors.mean()) < 4 * each / 20**0.5 + 0.01  # a ridge, and squares of no use, cost a little


def test_a_search_leaves_the_trap_that_gradients_do_not():
    experiment, start = laid_out(parabola, target_labels="value")
    trap = exact(start["xi"])
    assert trap < 1.37
    ends = []
    for seed in range(4):
        torch.manual_seed(seed)
        ends.append(exact(swapped(experiment, start, None, None)["xi"]))
    # The best is 1.479; three of four entries have to be near one end, for gradients to do the rest.
    assert sorted(ends)[1] > 1.39


def test_constraints_and_bounds_are_kept_and_costs_counted():
    experiment, start = laid_out(parabola, target_labels="value")
    torch.manual_seed(0)
    apart = swapped(experiment, start, Projection.of(min_gap("xi", 0.2), experiment.designs), None)["xi"]
    assert (apart.sort().values.diff() >= 0.2 - 0.05).all()  # ends are moved inside by 2 %
    assert (apart.abs() <= 1.0).all()
    # Where only the left is free of charge, all go there.
    cost = as_cost(lambda designs: 10.0 * (1.0 + designs["xi"]).sum())
    assert swapped(experiment, start, None, cost)["xi"].mean() < -0.5


def two_designs():
    matrix = pyro.param("matrix", torch.rand(3, 2), constraint=constraints.unit_interval)
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(matrix.sum(-1) * theta.unsqueeze(-1), scale.unsqueeze(-1)).to_event(1))


def test_an_exchange_changes_an_entry_or_a_row():
    experiment, _ = laid_out(two_designs)
    x = torch.arange(7.0).double() / 10
    torch.manual_seed(0)
    changed = torch.stack([_neighbour(experiment.designs, x) for _ in range(300)]) != x
    counts = changed.sum(-1)
    assert set(counts.tolist()) == {1, 2}
    assert changed.any(0).all()
    pairs = changed[counts == 2][:, :6].reshape(-1, 3, 2)
    assert (pairs.all(-1).sum(-1) == 1).all()
    assert NEIGHBOURS >= 7


def test_experiments_that_run_one_by_one_are_left_alone():
    assert not can_swap(Experiment(parabola, "y", "value", vectorize=False))
    assert can_swap(laid_out(parabola, target_labels="value")[0])

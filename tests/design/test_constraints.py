"""Constraints between entries: exact projections, the door, gradients that stay inside, searches that keep to them."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints as supports

from pyro_voed import Fresh, budget, fixed_sum, increasing, min_gap, optimise_design, search_random, search_spsa
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.design.constraints import nearest
from pyro_voed.design.projection import Projection
from pyro_voed.experiment.sites import DesignSite

WEIGHTS = (1.0, 0.5, 2.0, 1.5)
GAP = 0.15
LOW, HIGH = -0.2, 0.9

# Each with its linear inequalities A z >= b, one list for each order that entries may have.
STEPS = -torch.eye(4)[:-1] + torch.eye(4)[1:]
ORDERS = [torch.eye(4)[list(p)] for p in itertools.permutations(range(4))]
ONES, FACTORS = torch.ones(1, 4), torch.tensor([WEIGHTS])
CASES = {
    "increasing": ([increasing("xi")], [(STEPS, torch.zeros(3))]),
    "increasing by steps": ([increasing("xi", GAP)], [(STEPS, torch.full((3,), GAP))]),
    "apart": ([min_gap("xi", GAP)], [(STEPS @ order, torch.full((3,), GAP)) for order in ORDERS]),
    "a total": ([fixed_sum("xi", 1.2)], [(torch.cat([ONES, -ONES]), torch.tensor([1.2, -1.2]))]),
    "a weighted budget": ([budget("xi", 0.8, WEIGHTS)], [(-FACTORS, torch.tensor([-0.8]))]),
    "a budget in order": (
        [increasing("xi", GAP), budget("xi", 0.8)],
        [(torch.cat([STEPS, -ONES]), torch.tensor([GAP, GAP, GAP, -0.8]))],
    ),
    "a total of things apart": (
        [fixed_sum("xi", 1.2), min_gap("xi", GAP)],
        [(torch.cat([STEPS @ o, ONES, -ONES]), torch.tensor([GAP, GAP, GAP, 1.2, -1.2])) for o in ORDERS],
    ),
}


def by_active_sets(x, inequalities):
    """The nearest point of a polyhedron, by trying every set of inequalities as equalities."""
    best, found = math.inf, None
    matrix, least = (value.double() for value in inequalities)
    matrix = torch.cat([matrix, torch.eye(4), -torch.eye(4)]).double()
    least = torch.cat([least, torch.full((4,), LOW), torch.full((4,), -HIGH)]).double()
    for size in range(5):
        for active in map(list, itertools.combinations(range(len(matrix)), size)):
            rows = matrix[active]
            z = x + rows.mT @ torch.linalg.pinv(rows @ rows.mT) @ (least[active] - rows @ x)
            distance = (z - x).square().sum().item()
            if distance < best and bool((matrix @ z >= least - 1e-9).all()):
                best, found = distance, z
    return best, found


@pytest.mark.parametrize("name", CASES)
def test_projections_are_the_nearest_points_that_satisfy_constraints_and_bounds(name):
    constraints, polyhedra = CASES[name]
    generator = torch.Generator().manual_seed(0)
    for x in 0.4 + 0.8 * torch.randn(2, 4, generator=generator, dtype=torch.double):
        z = nearest(constraints, x, LOW, HIGH)
        # Only the order of the entries themselves can be nearest; the others are left out, as there are 24.
        own = [p for p in polyhedra if len(polyhedra) == 1 or bool((p[0][:3] @ x.float() >= 0).all())]
        assert len(own) == 1
        distance, point = by_active_sets(x, own[0])
        torch.testing.assert_close(z, point, atol=1e-7, rtol=0.0)
        torch.testing.assert_close(nearest(constraints, z, LOW, HIGH), z, atol=1e-8, rtol=0.0)
        if len(polyhedra) > 1:  # no other order is nearer: none of some random admissible designs is
            drawn = LOW + (HIGH - LOW) * torch.rand(30, 4, generator=generator, dtype=torch.double)
            moved = torch.stack([nearest(constraints, one, LOW, HIGH) for one in drawn])
            assert ((moved - x).square().sum(-1) >= distance - 1e-9).all()


def test_bounds_of_single_entries_are_kept_in_order_too():
    low, high = torch.tensor([0.0, 0.5, 0.0]), torch.tensor([1.0, 0.6, 2.0])
    z = nearest([increasing("xi", 0.1)], torch.tensor([0.9, 0.0, 0.2]), low, high)
    torch.testing.assert_close(z, torch.tensor([0.4, 0.5, 0.6]))


def site(constraint, value=(0.2, 0.3, 0.9)):
    return DesignSite("xi", torch.tensor(value), constraint, leaf=None, in_store=False)


REFUSED = {
    "which do not fit": (min_gap("xi", 0.6), supports.unit_interval, "3 entries 0.6 apart do not fit into"),
    "a total out of reach": (fixed_sum("xi", 4.0), supports.unit_interval, "allow sums from 0 to 3"),
    "two that disagree": ([increasing("xi", 0.5), budget("xi", 1.0)], supports.unit_interval, "found no design"),
    "an unknown design": (budget("time", 1.0), supports.real, "no design called"),
    "weights of another number": (budget("xi", 1.0, [1.0]), supports.real, "expected 3 weights"),
    "a simplex": (budget("xi", 1.0), supports.simplex, "know bounds alone"),
    "no function": (3.0, supports.real, "expected constraints such as"),
    "a string": ("min_gap", supports.real, "expected constraints such as"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_constraints_are_refused_at_the_door(name):
    constraints, support, words = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=words):
        Projection.of(constraints, [site(support)])


def test_wrong_numbers_are_refused():
    for make in (lambda: min_gap("xi", 0.0), lambda: increasing("xi", -1.0), lambda: budget("xi", math.nan)):
        with pytest.raises(ValueError, match="expected a finite number"):
            make()
    with pytest.raises(ValueError, match="weights: expected"):
        fixed_sum("xi", 1.0, [1.0, 0.0])
    with pytest.raises(ValueError, match="one dimension"):
        Projection.of(min_gap("xi", 0.1), [site(supports.real, [[0.1], [0.2]])])


def test_positive_entries_stay_positive_and_functions_stand_beside_constraints_of_other_designs():
    own = site(supports.positive, (1.0, 1.0, 4.0))
    other = DesignSite("z", torch.tensor(0.5), supports.real, leaf=None, in_store=False)
    project = Projection.of([fixed_sum("xi", 3.0), lambda designs: {"z": designs["z"].clamp(max=0.0)}], [own, other])
    moved = project({"xi": torch.tensor([0.5, 0.5, 5.0]), "z": torch.tensor(2.0)})
    assert (moved["xi"] > 0).all()
    torch.testing.assert_close(moved["xi"].sum(), torch.tensor(3.0))
    assert moved["z"] == 0.0
    with pytest.raises(ValueError, match="other constraints stand beside"):
        Projection.of([fixed_sum("xi", 3.0), lambda d: {"xi": d["xi"]}], [own])({"xi": torch.ones(3)})


def test_gradients_point_where_designs_can_go():
    project = Projection.of([min_gap("xi", 0.1)], [site(supports.unit_interval, (0.2, 0.3, 0.9))])
    xi = torch.tensor([0.2, 0.3, 0.9], requires_grad=True)

    def along(push, before=(0.0, 0.0, 0.0)):
        smoothed = {"xi": -torch.tensor(before).double()}
        loss = -(project.passed({"xi": xi}, smoothed)["xi"] * torch.tensor(push)).sum()
        return -torch.autograd.grad(loss, xi)[0]

    # The pair at its least distance is pushed together, more from below: it moves up as one; the third entry is free.
    torch.testing.assert_close(along([3.0, -1.0, -5.0]), torch.tensor([1.0, 1.0, -5.0]), atol=1e-3, rtol=0.0)
    # Pulled apart, it parts; but not by one noisy gradient after many that push it together.
    torch.testing.assert_close(along([-1.0, 3.0, 0.0]), torch.tensor([-1.0, 3.0, 0.0]), atol=1e-3, rtol=0.0)
    before = (2.0, -2.0, 0.0)
    torch.testing.assert_close(along([-1.0, 3.0, 0.0], before), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0.0)


def shared():
    """Four rows of a regression, exact: 0.5 log(1 + sum of squared gains), which the last entries raise most."""
    xi = pyro.param("xi", torch.full((4,), 0.25), constraint=supports.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    gains = torch.tensor([1.0, 1.5, 2.0, 3.0])
    return pyro.sample("y", dist.Normal(gains * xi * theta.unsqueeze(-1), 1.0).to_event(1))


def exact(xi):
    return 0.5 * math.log1p((torch.tensor([1.0, 1.5, 2.0, 3.0]) * xi).square().sum())


# Best by hand: the budget to the last entries; the largest entry at 1 and the others 0.2 apart below.
BEST = {
    "a budget": (budget("xi", 1.5), [0.0, 0.0, 0.5, 1.0]),
    "apart": (min_gap("xi", 0.2), [0.4, 0.6, 0.8, 1.0]),
    "a budget, apart": ([budget("xi", 1.6), increasing("xi", 0.1)], [0.0, 0.1, 0.5, 1.0]),
}


@pytest.mark.parametrize("name", BEST)
def test_searches_by_gradient_end_at_the_best_admissible_design_and_keep_to_it_on_the_way(name):
    constraints, best = BEST[name]
    result = optimise_design(
        shared,
        "y",
        "theta",
        constraints=constraints,
        density=lambda theta_dim, context_dim: AffineCouplingFlow(
            theta_dim, context_dim, num_transforms=1, hidden_dim=8
        ),
        training=Fresh(250, batch_size=64, learning_rate=1e-2, design_learning_rate=0.1),
        num_samples=500,
        progress=False,
        seed=0,
    )
    assert exact(torch.tensor(best)) - exact(result.designs["xi"]) < 0.03
    project = Projection.of(constraints, result.experiment.designs)
    for xi in result.path["xi"][1:]:
        torch.testing.assert_close(project({"xi": xi})["xi"], xi, atol=1e-5, rtol=0.0)


def test_searches_without_gradients_keep_to_constraints(own_estimator):
    estimator = own_estimator(shared, lambda xi: (xi * torch.tensor([1.0, 1.5, 2.0, 3.0])).sum(-1), 0.01)
    climbed = search_spsa(estimator, constraints=fixed_sum("xi", 1.5), num_steps=100, seed=0)
    torch.testing.assert_close(climbed.path["xi"].sum(-1), torch.full((101,), 1.5))
    assert climbed.designs["xi"][3] > 0.9  # of 4.0 that the best has, entries 0, 0, 0.5 and 1
    assert climbed.eig > 3.8
    drawn = search_random(estimator, 50, constraints=min_gap("xi", 0.2), seed=0).candidates.designs["xi"]
    assert (drawn.sort(-1).values.diff(dim=-1) >= 0.2 - 1e-6).all()

"""Laws of nested estimates: two sides of one value where nuisance sites are averaged over.

A side is broken when the estimate lies more than `SIDE` = 4 standard errors beyond the exact value: an exact estimator
does that with probability 3.2e-5, one biased to its own side less often. About 80 comparisons are made.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_voed import Experiment, eig_nmc, eig_pce
from pyro_voed.problems import implicit_toy, linear_gaussian
from tests.estimators.cases import SIDE, chain, chain_eig

BOTH = ["first", "y"]

# Sites, targets and outcomes; the nuisance is `u`. In "in between" the second target's site density is not its prior;
# where outcomes are linked, the second depends on the first one's value.
CHAINS = {
    "noise": ({"theta": {}, "u": {}, "y": {"theta": 1, "u": 1}}, ["theta"], ["y"]),
    "sampled after": ({"theta": {}, "u": {"theta": 1}, "y": {"theta": 1, "u": 1}}, ["theta"], ["y"]),
    "in between": (
        {"a": {}, "u": {"a": 1}, "b": {"u": 1}, "y": {"a": 1, "b": 1, "u": 1}}, ["a", "b"], ["y"]
    ),
    "linked outcomes with noise": (
        {"theta": {}, "u": {}, "first": {"theta": 1, "u": 1}, "y": {"theta": 1, "first": 0.8}}, ["theta"], BOTH
    ),
}  # fmt: skip


def plated():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("people", 3):
        u = pyro.sample("u", dist.Normal(0.0, 0.7))
        pyro.sample("y", dist.Normal(theta + u, 1.0))


def plated_before():
    """Nuisance and target in one plate, the target centred on the nuisance."""
    with pyro.plate("people", 2):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(u, 1.0))
        pyro.sample("y", dist.Normal(theta + u, 1.0))


def coins():
    """Everything binary, the target given the nuisance."""
    u = pyro.sample("u", dist.Bernoulli(0.3))
    theta = pyro.sample("theta", dist.Bernoulli(0.2 + 0.5 * u))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.3 * u + 0.4 * theta))


def coins_eig():
    joint = torch.zeros(2, 2).double()  # of theta and y
    for u in (0, 1):
        for theta in (0, 1):
            of_u, of_theta, of_y = (0.7, 0.3)[u], 0.2 + 0.5 * u, 0.1 + 0.3 * u + 0.4 * theta
            both = of_u * (of_theta if theta else 1 - of_theta)
            joint[theta] += torch.tensor([both * (1 - of_y), both * of_y]).double()
    entropy = lambda p: torch.special.entr(p).sum()  # noqa: E731
    return (entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)).item()


def uniform():
    """A triangular outcome: entropies 1/2 and 0."""
    theta = pyro.sample("theta", dist.Uniform(0.0, 1.0))
    pyro.sample("y", dist.Uniform(theta - 0.5, theta + 0.5))


CASES = {
    "dependent nuisance": (
        linear_gaussian.dependent_nuisance(), "y", ["theta"], linear_gaussian.DEPENDENT_NUISANCE_EIG
    ),
    "plated": (plated, "y", ["theta"], 0.5 * math.log1p(3 / 1.49)),
    "plated before": (plated_before, "y", ["theta"], 2 * linear_gaussian.DEPENDENT_NUISANCE_EIG),
    "coins": (coins, "y", ["theta"], coins_eig()),
    **{
        name: (chain(sites), outcomes, targets, chain_eig(sites, targets, outcomes))
        for name, (sites, targets, outcomes) in CHAINS.items()
    },
}  # fmt: skip
FUNCTIONS = [eig_nmc, eig_pce]
INNER = [pytest.param(None, id="re-used"), pytest.param(200, id="independent")]


def both_sides(name, num_inner, *, seed=0, **options):
    model, outcomes, targets, exact = CASES[name]
    sizes = {"num_outer_samples": 1_000, "num_inner_samples": num_inner, "seed": seed, **options}
    return eig_pce(model, outcomes, targets, **sizes), eig_nmc(model, outcomes, targets, **sizes), exact


@pytest.mark.parametrize("num_inner", INNER)
@pytest.mark.parametrize("name", CASES)
def test_both_sides_hold_the_exact_value(name, num_inner):
    lower, upper, exact = both_sides(name, num_inner)
    assert (lower.bound, upper.bound) == ("lower", "upper")
    assert lower.eig <= exact + SIDE * lower.standard_error
    assert upper.eig >= exact - SIDE * upper.standard_error
    # Loose enough for the bias of a hundred nuisance draws, tight enough to see a wrong density.
    assert exact - 0.12 - SIDE * lower.standard_error <= lower.eig
    assert upper.eig <= exact + 0.12 + SIDE * upper.standard_error


@pytest.mark.parametrize("function", FUNCTIONS)
def test_uniform_draws_which_state_constant_densities(function):
    result = function(uniform, "y", seed=0)
    assert abs(result.eig - 0.5) <= 0.02 + SIDE * result.standard_error


@pytest.mark.parametrize("name", CASES)
def test_the_sides_bracket_and_close_in_as_nuisance_draws_grow(name):
    gaps = []
    for num_nuisance in (2, 20, 200):
        lower, upper, exact = both_sides(name, 200, num_nuisance_samples=num_nuisance)
        assert lower.eig - SIDE * lower.standard_error <= exact <= upper.eig + SIDE * upper.standard_error
        gaps.append((upper.eig - lower.eig).item())
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] <= 0.2


def test_one_nuisance_draw_gives_both_sides_and_the_site_density_is_not_taken_for_the_prior():
    lower, upper, exact = both_sides("dependent nuisance", 50, num_nuisance_samples=1)
    assert lower.eig < exact - 0.2
    assert upper.eig > exact + 0.2
    # Taken for the prior, the density given the nuisance gives 0.35 (see `dependent_nuisance`), many errors below.
    lower, _, _ = both_sides("dependent nuisance", None, num_nuisance_samples=300)
    assert lower.eig > 0.55


@pytest.mark.parametrize("name", ["dependent nuisance", "linked outcomes with noise"])
def test_chunks_do_not_change_the_law(name):
    results = [both_sides(name, 40, num_outer_samples=200, seed=3, max_bytes=size) for size in (2**25, 30_000)]
    for side in (0, 1):
        error = math.hypot(*(result[side].standard_error for result in results))
        assert abs(results[0][side].eig - results[1][side].eig) <= 4.5 * error


def test_what_simulations_cost():
    def cost(name, num_outer, num_inner):
        sizes = {"num_outer_samples": num_outer, "num_nuisance_samples": 20}
        (found,) = {result.num_simulations for result in both_sides(name, num_inner, **sizes)[:2]}
        return found

    # Differences, because the checks of the model count too. For each outer draw: its own run, the inner runs of p(y),
    # and those of p(y, theta) and of p(theta).
    for name, num_inner, each in (("dependent nuisance", 30, 1 + 30 + 2 * 20), ("sampled after", None, 1 + 20)):
        assert cost(name, 150, num_inner) - cost(name, 50, num_inner) == 100 * each


@pytest.mark.parametrize("num_inner", [1, 9, 99])
def test_pce_cannot_exceed_the_logarithm_of_its_contrasts(num_inner):
    def saturated():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1e-3))

    result = eig_pce(saturated, "y", num_outer_samples=150, num_inner_samples=num_inner, seed=0)
    assert math.log(num_inner + 1) - 0.1 <= result.eig <= math.log(num_inner + 1) + 1e-5


# --- replaced priors ------------------------------------------------------------------------------------------------


def wide():
    u = pyro.sample("u", dist.Normal(0.0, 3.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(theta + u, 1.0))


def centred_prior():
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    pyro.sample("theta", dist.Normal(u, 1.0))


def automatic_prior():
    guide = AutoDiagonalNormal(pyro.condition(wide, data={"y": torch.tensor(0.0)}), init_scale=1.0)
    guide()
    return guide


PRIORS = {
    "with dependence of its own": (lambda: centred_prior, linear_gaussian.DEPENDENT_NUISANCE_EIG),
    "an automatic guide": (automatic_prior, 0.5 * math.log(1.5)),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_replaced_prior_over_targets_and_nuisance(name):
    make, exact = PRIORS[name]
    experiment = Experiment(wide, "y", "theta", prior=make())
    lower, upper = eig_pce(experiment, seed=0), eig_nmc(experiment, seed=0)
    assert exact - 0.06 - SIDE * lower.standard_error <= lower.eig <= exact + SIDE * lower.standard_error
    assert exact - SIDE * upper.standard_error <= upper.eig <= exact + 0.06 + SIDE * upper.standard_error


# --- refusals and errors --------------------------------------------------------------------------------------------


def test_infinite_terms_are_an_error_above_and_none_below():
    def narrow():
        """No inner draw comes near the outcome."""
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(theta - 1e-3, theta + 1e-3))

    with pytest.raises(ArithmeticError, match=r"eig_nmc: for \d+ of 50 outer draws no inner draw"):
        eig_nmc(narrow, "y", num_outer_samples=50, seed=0)
    result = eig_pce(narrow, "y", num_outer_samples=50, seed=0)
    assert result.eig.item() == pytest.approx(math.log(50), abs=0.1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_has_no_density_is_refused(function):
    with pytest.raises(NotImplementedError, match=rf"{function.__name__} needs the density.*\['y'\].*eig_flow"):
        function(implicit_toy.implicit_toy(), "y", "theta")

    def computed():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        total = pyro.deterministic("total", theta.sum(-1), event_dim=0)
        pyro.sample("y", dist.Normal(total, 1.0))

    with pytest.raises(NotImplementedError, match=r"\['total'\] cannot be held"):
        function(computed, "y", "total")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sizes_out_of_range_are_refused(function):
    for name in ("num_outer_samples", "num_inner_samples", "num_nuisance_samples"):
        for value, error in ((0, ValueError), (10.0, TypeError)):
            with pytest.raises(error, match=name):
                function(plated, "y", "theta", **{name: value})

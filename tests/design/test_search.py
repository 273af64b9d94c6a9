"""Grid and random search, and what all searches of estimates share: the fresh estimate, ends and refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Experiment, eig_lbkld
from pyro_voed.design import search_grid, search_random, search_spsa
from pyro_voed.design.coordinates import from_coordinates, in_interval, scattered, to_coordinates
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.problems import implicit_toy
from pyro_voed.results import DesignResult, EIGResult

pytestmark = pytest.mark.filterwarnings("ignore:eig_lbkld. the . designs are indistinguishable")

SIDE = 4.0
"""Standard errors on the wrong side that pass: an exact estimate exceeds them with probability 3.2e-5."""


def two_labels():
    """The information is largest at gain 1 and angles 0, inside all bounds."""
    gain = pyro.param("gain", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    angles = pyro.param("angles", torch.tensor([0.8, -0.7]))
    scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample(
        "y", dist.Normal(gain.unsqueeze(-1) * torch.cos(angles) * theta, scale.unsqueeze(-1)).to_event(1)
    )


def height(gain, angles, scale):
    return -((gain - 1.0) ** 2) - angles.square().sum(-1) - (scale.log() - 0.5) ** 2


@pytest.fixture
def noisy(own_estimator):
    return lambda noise, **options: own_estimator(two_labels, height, noise, **options)


def lbkld(model, **settings):
    def estimator(designs):
        return eig_lbkld(model, "y", "theta", designs=designs, num_samples=1_000, **settings)

    return estimator


GRID = {"gain": [0.0, 0.5, 1.0, 2.0], "angles": [[0.0, 0.0], [0.5, 0.0], [0.0, 1.0]]}


@pytest.mark.parametrize("together", [True, False])
def test_all_combinations_are_compared_and_the_best_is_found(noisy, together):
    calls = []
    result = search_grid(noisy(0.0, calls=calls), GRID, together=together, seed=0)
    drawn = result.candidates.designs
    assert result.candidates.eig.shape == (12,)
    assert len({(gain.item(), *angles.tolist()) for gain, angles in zip(drawn["gain"], drawn["angles"])}) == 12  # noqa: B905
    assert result.designs["gain"] == 1.0
    assert torch.equal(result.designs["angles"], torch.zeros(2))
    assert result.designs["scale"] == 3.0  # not searched over
    assert len(calls) == (2 if together else 13)  # all in one call or one each, and a fresh estimate of the best
    assert isinstance(result, DesignResult)
    assert [result.path, result.history, result.interrupted] == [None, None, False]
    assert "best of 12 candidates" in str(result)
    # Or a list is taken row by row.
    values = {"gain": [0.1, 1.9, 1.0], "angles": [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]}
    assert search_grid(noisy(0.0), values, product=False, together=together, seed=0).designs["gain"] != 1.0


def test_the_estimate_is_fresh_and_the_table_errs_upwards(noisy):
    # 300 equally good candidates: the largest of their estimates is 2.9 standard errors up, the fresh one is not.
    result = search_grid(noisy(0.1), {"gain": torch.full((300,), 1.0)}, seed=0)
    truth = height(torch.tensor(1.0), torch.tensor([0.8, -0.7]), torch.tensor(3.0))
    assert result.candidates.eig.max() > truth + 0.2
    assert abs(result.eig - truth) <= SIDE * 0.1
    assert result.eig not in result.candidates.eig
    assert result.num_simulations == 7 * 301


def test_separate_calls_share_their_random_numbers(noisy):
    # Equal designs have equal estimates, so only the designs' difference is compared.
    result = search_grid(noisy(1.0), {"gain": [1.0, 1.0, 0.9]}, together=False, seed=0)
    first, second, third = result.candidates.eig.tolist()
    assert first == second
    assert third == pytest.approx(first - 0.01, abs=1e-5)
    apart = search_grid(noisy(1.0), {"gain": [1.0, 1.0, 0.9]}, seed=0)
    assert apart.candidates.eig[0] != apart.candidates.eig[1]


def test_random_candidates_fill_intervals_and_surround_the_start_elsewhere(noisy):
    result = search_random(noisy(0.0), 2_001, seed=0)
    assert result.candidates.designs["gain"][0] == 0.5  # the start is a candidate
    drawn = {name: value[1:] for name, value in result.candidates.designs.items() if value.dim() > 0}
    place = drawn["gain"].double() / 2.0
    for moment in (1, 2):
        error = math.sqrt((1 / (2 * moment + 1) - 1 / (moment + 1) ** 2) / 2_000)
        assert abs((place**moment).mean() - 1 / (moment + 1)) <= SIDE * error
    unconstrained = torch.cat([drawn["angles"] - torch.tensor([0.8, -0.7]), (drawn["scale"] / 3).log()[:, None]], 1)
    assert (unconstrained.mean(0).abs() <= SIDE / math.sqrt(2_000)).all()
    assert ((unconstrained.var(0) - 1).abs() <= SIDE * math.sqrt(2 / 2_000)).all()
    assert result.eig > -0.3  # the start has -2.2


def test_a_proposal_is_used(noisy):
    def proposal(num):
        return {"gain": torch.linspace(0.9, 1.1, num), "angles": 0.1 * torch.randn(num, 2)}

    first, again = (search_random(noisy(0.0), 11, proposal=proposal, seed=0) for _ in range(2))
    assert torch.equal(first.candidates.designs["gain"], torch.linspace(0.9, 1.1, 11))
    assert torch.equal(first.designs["angles"], again.designs["angles"])


def site(value, constraint):
    return DesignSite("xi", torch.as_tensor(value), constraint, leaf=None, in_store=False)


COORDINATES = {
    "interval": (site([0.5, 0.1], constraints.interval(-0.1, 0.7)), torch.rand(5, 2) * 0.8 - 0.1),
    "real": (site([[0.5], [0.1]], constraints.real), torch.randn(5, 2, 1)),
    "positive": (site(0.5, constraints.positive), torch.rand(5) + 0.5),
    "simplex": (site([0.2, 0.3, 0.5], constraints.simplex), torch.softmax(torch.randn(5, 3), -1)),
}


@pytest.mark.parametrize("name", COORDINATES)
def test_coordinates_invert_and_draws_satisfy_the_constraint(name):
    own, values = COORDINATES[name]
    back = from_coordinates([own], to_coordinates([own], {"xi": values}))["xi"]
    torch.testing.assert_close(back, values)
    assert back.dtype == values.dtype
    centre = to_coordinates([own], {"xi": own.value})
    bounded = in_interval([own])
    assert bounded.shape == centre.shape
    # Ends of intervals are reached and not passed, whatever rounding does.
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.double).expand(2, len(centre))
    drawn = scattered([own], centre, 10, torch.Generator().manual_seed(0))
    designs = from_coordinates([own], torch.cat([drawn, ends]) if name == "interval" else drawn)["xi"]
    assert own.constraint.check(designs).all()
    assert name != "interval" or (bounded.all() and (designs[-2:, 0] == torch.tensor([-0.1, 0.7])).all())


SEARCHES = {
    "grid": lambda estimator, **options: search_grid(estimator, {"gain": [0.2, 0.9, 1.5]}, together=False, **options),
    "grid in one call": lambda estimator, **options: search_grid(estimator, {"gain": [0.2, 0.9, 1.5]}, **options),
    "random": lambda estimator, **options: search_random(estimator, 12, together=False, **options),
    "SPSA": lambda estimator, **options: search_spsa(estimator, num_steps=3, **options),
    "SPSA from two starts": lambda estimator, **options: search_spsa(estimator, num_steps=3, starts=2, **options),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_equal_seeds_give_equal_searches_and_others_differ(noisy, name):
    first, second, third = (SEARCHES[name](noisy(0.1), seed=seed) for seed in (0, 0, 1) if not pyro.clear_param_store())
    assert first.eig == second.eig != third.eig
    assert torch.equal(first.designs["gain"], second.designs["gain"])


@pytest.mark.parametrize("name", SEARCHES)
def test_the_best_design_is_stored_and_nothing_else_changes(noisy, name):
    two_labels()
    pyro.param("other", torch.tensor(1.0))
    leaves = dict(pyro.get_param_store()._params)
    estimator, before = noisy(0.1), torch.get_rng_state()
    result = SEARCHES[name](estimator, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(pyro.get_param_store()._params[name] is leaf for name, leaf in leaves.items())
    assert sorted(pyro.get_param_store().keys()) == ["angles", "gain", "other", "scale"]
    for label, value in result.designs.items():
        torch.testing.assert_close(pyro.param(label).detach(), value)
        assert torch.equal(result.experiment.design_values[label], value)


@pytest.mark.filterwarnings("ignore:the best candidate has the")
@pytest.mark.parametrize("interrupted", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SEARCHES)
def test_ctrl_c_ends_a_search_with_the_best_of_the_complete_estimates(noisy, name, interrupted):
    calls = []
    estimator = noisy(0.0, calls=calls, interrupted=interrupted)
    start = Experiment(two_labels, "y", "theta").design_values
    if interrupted == 1:
        with pytest.raises(KeyboardInterrupt):
            SEARCHES[name](estimator, seed=0)
        assert list(pyro.get_param_store().keys()) == []
        return
    result = SEARCHES[name](estimator, seed=0)
    if len(calls) < interrupted:
        assert not result.interrupted
        return
    assert len(calls) == interrupted
    assert result.interrupted
    assert "interrupted" in str(result)
    complete = [height(**{**start, **designs}).max() for designs in calls[:-1]]
    assert result.eig == max(complete)
    assert pyro.param("gain").item() == pytest.approx(result.designs["gain"].item())


@pytest.mark.parametrize("name", SEARCHES)
def test_an_error_stores_nothing_and_that_of_a_climb_carries_the_designs_reached(own_estimator, name):
    calls, last = [], 2 if name == "grid in one call" else 4 if name in ("grid", "random") else 14

    def failing(**designs):
        if len(calls) == last:
            raise RuntimeError("no more licences")
        return height(**designs)

    with pytest.raises(RuntimeError, match="licences") as caught:
        SEARCHES[name](own_estimator(two_labels, failing, 0.1, calls=calls), seed=0)
    assert list(pyro.get_param_store().keys()) == []
    if "SPSA" in name:
        assert caught.value.designs["angles"].shape == (2 if "two" in name else 1, 2)


def test_an_estimator_without_a_model_is_searched_and_nothing_stored():
    def estimator(designs):
        xi = designs.get("xi", torch.tensor(0.0))
        value = -((xi - 1) ** 2) + 0.01 * torch.randn(xi.shape)
        return EIGResult(value, torch.full_like(xi, 0.01), "neither", "own", 1, 1, 0.0, {"xi": xi}, (), ())

    result = search_random(estimator, 50, seed=0)
    assert abs(result.designs["xi"] - 1.0) < 0.4
    assert list(pyro.get_param_store().keys()) == []


def test_an_estimator_of_the_library_is_searched():
    result = search_grid(lbkld(two_labels), {"gain": [0.1, 0.5, 2.0]}, seed=0)
    assert result.designs["gain"] == 2.0
    assert (result.bound, result.final.estimator) == ("lower", "eig_lbkld")
    assert result.candidates.eig.argsort().tolist() == [0, 1, 2]


def no_design():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta, 1.0))


def of_others(designs):
    return lbkld(implicit_toy.implicit_toy())({"xi": torch.ones(3)})


WRONG_ESTIMATORS = {
    "no callable": (3, TypeError, "estimator"),
    "no result": (lambda designs: 1.0, TypeError, "expected a function from designs to an EIGResult, got float"),
    "designs ignored": (of_others, ValueError, "other values of design 'xi'|to estimate at the designs as they stand"),
    "fixed seed": (lbkld(implicit_toy.implicit_toy(), seed=3), ValueError, "same random numbers in each call"),
    "no design": (lbkld(no_design), ValueError, "no design"),
}


@pytest.mark.parametrize(
    "search",
    [
        lambda f: search_grid(f, {"xi": [0.2, 1.0]}),
        lambda f: search_random(f, 3),
        lambda f: search_spsa(f, num_steps=2),
    ],
    ids=["grid", "random", "SPSA"],
)
@pytest.mark.parametrize("name", WRONG_ESTIMATORS)
def test_wrong_estimators_are_refused(search, name):
    estimator, error, words = WRONG_ESTIMATORS[name]
    with pytest.raises(error, match=words):
        search(estimator)


WRONG_VALUES = {
    "values: expected a dict": {},
    r"values\['gain'\]: expected shape": {"gain": 1.0},
    r"values\['gain'\]: expected shape .* one row at least": {"gain": []},
    "values: expected equally many": {"gain": [1.0, 0.5], "angles": [[0.0, 0.0]]},
    "no design called": {"angle": [1.0]},
    "violates its constraint": {"gain": [0.5, 2.5]},
    r"designs\['gain'\]: expected shape|expected 1 estimates": {"gain": [[0.5, 1.5]]},
}


@pytest.mark.parametrize("words", WRONG_VALUES)
def test_wrong_values_are_refused(words):
    with pytest.raises(ValueError, match=words):
        search_grid(lbkld(two_labels), WRONG_VALUES[words], product=False, seed=0)


def test_no_candidates_and_estimates_that_are_not_finite_are_refused(noisy, own_estimator):
    with pytest.raises(ValueError, match="num_candidates"):
        search_random(noisy(0.0), 0)
    with pytest.raises(ValueError, match="proposal: expected 4 values"):
        search_random(noisy(0.0), 4, proposal=lambda num: {"gain": torch.ones(3)})
    with pytest.raises(ArithmeticError, match="own: estimates are not finite at the designs"):
        search_grid(own_estimator(two_labels, lambda gain, **others: gain / 0.0 * 0.0, 0.1), GRID)

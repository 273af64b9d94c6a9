"""Grid and random search: the winner, the fresh estimate, what is refused and what is left behind."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import eig_lbkld, eig_nmc, resolve
from pyro_voed.design.evaluator import from_coordinates, in_interval, to_coordinates
from pyro_voed.design.search import search_grid, search_random
from pyro_voed.problems import implicit_toy
from pyro_voed.results import EIGResult

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


def height(designs):
    return -((designs["gain"] - 1.0) ** 2) - designs["angles"].square().sum(-1) - (designs["scale"].log() - 0.5) ** 2


def noisy(noise, calls=None, model=two_labels):
    """An estimator of one's own: `height` at the designs of `two_labels` with normal noise."""
    experiment = resolve(model, "y", "theta")

    def estimator(designs):
        if calls is not None:
            calls.append(designs)
        full = {**experiment.design_values, **designs}
        value = height(full)
        return EIGResult(
            eig=value + noise * torch.randn_like(value),
            standard_error=torch.full_like(value, noise),
            bound="neither",
            estimator="noisy",
            num_simulations=7 * value.numel(),
            num_samples=7,
            seconds=0.0,
            designs=full,
            target_labels=("theta",),
            observation_labels=("y",),
            experiment=experiment,
        )

    return estimator


def lbkld(model, **settings):
    def estimator(designs):
        return eig_lbkld(model, "y", "theta", designs=designs, num_samples=1_000, **settings)

    return estimator


GRID = {"gain": [0.0, 0.5, 1.0, 2.0], "angles": [[0.0, 0.0], [0.5, 0.0], [0.0, 1.0]]}

# --- the grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_all_combinations_are_compared_and_the_best_is_found(together):
    calls = []
    result = search_grid(noisy(0.0, calls), GRID, together=together, seed=0)
    assert result.candidates.eig.shape == (12,)
    pairs = {
        (gain, *angles)
        for gain, angles in zip(
            result.candidates.designs["gain"].tolist(), result.candidates.designs["angles"].tolist(), strict=True
        )
    }
    assert len(pairs) == 12
    assert result.designs["gain"] == 1.0
    assert torch.equal(result.designs["angles"], torch.zeros(2))
    assert result.chosen == int(result.candidates.eig.argmax())
    assert result.designs["scale"] == 3.0  # not searched over
    assert len(calls) == (2 if together else 13)  # all in one call or one each, and a fresh estimate of the best


def test_a_list_is_taken_row_by_row():
    values = {"gain": [0.1, 1.9, 1.0], "angles": [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]}
    result = search_grid(noisy(0.0), values, product=False, seed=0)
    assert result.candidates.eig.shape == (3,)
    assert result.chosen in (0, 1)


def test_the_estimate_is_fresh_and_the_table_errs_upwards():
    # 300 equally good candidates: the largest of their estimates is 2.9 standard errors up, the fresh one is not.
    values = {"gain": torch.full((300,), 1.0)}
    truth = height({"gain": torch.tensor(1.0), "angles": torch.tensor([0.8, -0.7]), "scale": torch.tensor(3.0)})
    result = search_grid(noisy(0.1), values, seed=0)
    assert result.candidates.eig.max() > truth + 0.2
    assert abs(result.eig - truth) <= SIDE * 0.1
    assert result.eig != result.candidates.eig[result.chosen]
    assert result.final.eig == result.eig
    assert result.num_simulations == 7 * 301


def test_separate_calls_share_their_random_numbers():
    # Equal designs have equal estimates, so only the designs' difference is compared.
    result = search_grid(noisy(1.0), {"gain": [1.0, 1.0, 0.9]}, together=False, seed=0)
    first, second, third = result.candidates.eig.tolist()
    assert first == second
    assert third == pytest.approx(first - 0.01, abs=1e-5)
    apart = search_grid(noisy(1.0), {"gain": [1.0, 1.0, 0.9]}, seed=0)
    assert apart.candidates.eig[0] != apart.candidates.eig[1]


def test_the_toy_is_searched_with_an_estimator_of_the_library():
    values = {"xi": torch.linspace(0.1, 1.9, 7)}
    result = search_grid(lbkld(implicit_toy.implicit_toy()), values, seed=0)
    exact = implicit_toy.exact_eig(values["xi"])
    gap = (result.candidates.eig - exact).abs()
    assert (gap <= SIDE * result.candidates.standard_error + 0.05).all()
    assert result.chosen >= 5  # the last two differ by 0.14, some 3 standard errors
    assert result.bound == "lower"
    assert "best of 7 candidates" in str(result)


# --- random candidates ----------------------------------------------------------------------------------------------


def test_random_candidates_fill_intervals_and_surround_the_start_elsewhere():
    result = search_random(noisy(0.0), 2_000, seed=0)
    drawn = result.candidates.designs
    place = drawn["gain"].double() / 2.0
    for moment in (1, 2):
        error = math.sqrt((1 / (2 * moment + 1) - 1 / (moment + 1) ** 2) / 2_000)
        assert abs((place**moment).mean() - 1 / (moment + 1)) <= SIDE * error
    unconstrained = torch.cat([drawn["angles"] - torch.tensor([0.8, -0.7]), (drawn["scale"] / 3).log()[:, None]], 1)
    assert (unconstrained.mean(0).abs() <= SIDE / math.sqrt(2_000)).all()
    assert ((unconstrained.var(0) - 1).abs() <= SIDE * math.sqrt(2 / 2_000)).all()
    assert result.eig > -0.3  # the start has -2.2


def test_a_proposal_is_used():
    def proposal(num):
        return {"gain": torch.linspace(0.9, 1.1, num), "angles": 0.1 * torch.randn(num, 2)}

    result = search_random(noisy(0.0), 11, proposal=proposal, seed=0)
    assert torch.equal(result.candidates.designs["gain"], torch.linspace(0.9, 1.1, 11))
    again = search_random(noisy(0.0), 11, proposal=proposal, seed=0)
    assert torch.equal(result.designs["angles"], again.designs["angles"])


def test_several_runs_of_one_seed_are_equal_and_others_differ():
    results = []
    for seed in (0, 0, 1):
        pyro.clear_param_store()  # a search starts where the last one ended
        results.append(search_random(noisy(0.1), 20, seed=seed))
    first, second, third = results
    assert torch.equal(first.candidates.eig, second.candidates.eig)
    assert first.eig == second.eig
    assert not torch.equal(first.candidates.eig, third.candidates.eig)


# --- coordinates ----------------------------------------------------------------------------------------------------


def test_coordinates_invert():
    experiment = resolve(two_labels, "y", "theta").designs
    designs = {"gain": torch.rand(5) * 2, "angles": torch.randn(5, 2), "scale": torch.rand(5) + 0.5}
    x = to_coordinates(experiment, designs)
    assert x.shape == (5, 4)
    assert int(in_interval(experiment).sum()) == 1
    back = from_coordinates(experiment, x)
    for name, value in designs.items():
        torch.testing.assert_close(back[name], value)
        assert back[name].dtype == value.dtype


def test_ends_of_intervals_are_reached_and_not_passed():
    def model():
        xi = pyro.param("xi", torch.full((2,), 0.5), constraint=constraints.interval(-0.1, 0.7))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(xi.sum(-1) * theta, 1.0))

    (site,) = resolve(model, "y", "theta").designs
    ends = from_coordinates([site], torch.tensor([[0.0, 1.0]], dtype=torch.double))["xi"]
    assert torch.equal(ends, torch.tensor([[-0.1, 0.7]]))
    assert site.constraint.check(ends).all()


def test_simplex_designs_are_drawn_on_the_simplex():
    def model():
        xi = pyro.param("xi", torch.full((3,), 1 / 3), constraint=constraints.simplex)
        theta = pyro.sample("theta", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5])).to_event(1))
        return pyro.sample("y", dist.Normal(xi * theta, 0.1).to_event(1))

    def estimator(designs):
        return eig_nmc(model, "y", "theta", designs=designs, num_outer_samples=200, num_inner_samples=50)

    result = search_random(estimator, 10, seed=0)
    torch.testing.assert_close(result.candidates.designs["xi"].sum(-1), torch.ones(10))


# --- afterwards -----------------------------------------------------------------------------------------------------


def test_the_best_design_is_stored_and_the_random_streams_are_as_they_were():
    before = torch.get_rng_state()
    result = search_grid(lbkld(implicit_toy.implicit_toy()), {"xi": [0.2, 1.5]}, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store().keys()) == ["xi"]
    torch.testing.assert_close(pyro.param("xi").detach(), result.designs["xi"])
    assert result.experiment.design_values["xi"] == result.designs["xi"]


def test_a_stored_leaf_is_kept_and_moved():
    implicit_toy.implicit_toy()()
    leaf = pyro.param("xi").unconstrained()
    search_grid(lbkld(implicit_toy.implicit_toy()), {"xi": [0.2, 1.5]}, seed=0)
    assert pyro.param("xi").unconstrained() is leaf
    assert pyro.param("xi").item() == pytest.approx(1.5)


def test_nothing_is_stored_after_an_error():
    calls = []

    def failing(designs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more licences")
        return lbkld(implicit_toy.implicit_toy())(designs)

    with pytest.raises(RuntimeError, match="licences"):
        search_grid(failing, {"xi": [0.2, 1.5]}, together=False, seed=0)
    assert list(pyro.get_param_store().keys()) == []


def test_an_estimator_without_a_model_is_searched_and_nothing_stored():
    def estimator(designs):
        xi = designs.get("xi", torch.tensor(0.0))
        noise = 0.01 * torch.randn(xi.shape)
        return EIGResult(
            -((xi - 1) ** 2) + noise, torch.full_like(xi, 0.01), "neither", "own", 1, 1, 0.0, {"xi": xi}, (), ()
        )

    result = search_random(estimator, 50, seed=0)
    assert abs(result.designs["xi"] - 1.0) < 0.4
    assert list(pyro.get_param_store().keys()) == []


def no_design():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta, 1.0))


# --- at the door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "values: expected a dict"),
        ({"gain": 1.0}, r"values\['gain'\]: expected shape"),
        ({"gain": []}, r"values\['gain'\]: expected shape"),
        ({"angle": [1.0]}, "no design called"),
        ({"xi": [0.5, 2.5]}, "violates its constraint"),
        ({"xi": [[0.5, 1.5]]}, r"designs\['xi'\]: expected shape|expected 1 estimates"),
    ],
)
def test_wrong_values_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        search_grid(lbkld(implicit_toy.implicit_toy()), values, seed=0)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="values: expected equally many"):
        search_grid(noisy(0.0), {"gain": [1.0, 0.5], "angles": [[0.0, 0.0]]}, product=False)


@pytest.mark.parametrize("search", [lambda f: search_grid(f, {"xi": [0.2, 1.0]}), lambda f: search_random(f, 3)])
@pytest.mark.parametrize(
    ("estimator", "error", "words"),
    [
        (3, TypeError, "estimator"),
        (lambda designs: 1.0, TypeError, "expected a function from designs to an EIGResult, got float"),
        (lambda designs: lbkld(implicit_toy.implicit_toy())({}), ValueError, "other values of design 'xi'"),
        (lbkld(implicit_toy.implicit_toy(), seed=3), ValueError, "same random numbers in each call"),
        (lbkld(no_design), ValueError, "no design"),
    ],
    ids=["no callable", "no result", "designs ignored", "fixed seed", "no design"],
)
def test_wrong_estimators_are_refused(search, estimator, error, words):
    with pytest.raises(error, match=words):
        search(estimator)


def test_estimates_that_are_not_finite_are_errors():
    def estimator(designs):
        result = noisy(0.1)(designs)
        vars(result)["eig"][...] = math.nan
        return result

    with pytest.raises(ArithmeticError, match="noisy: estimates are not finite at the designs"):
        search_grid(estimator, GRID)


@pytest.mark.parametrize("num", [0, -3])
def test_no_candidates_are_refused(num):
    with pytest.raises(ValueError, match="num_candidates"):
        search_random(noisy(0.0), num)


def test_a_proposal_of_another_number_is_refused():
    with pytest.raises(ValueError, match="proposal: expected 4 values"):
        search_random(noisy(0.0), 4, proposal=lambda num: {"gain": torch.ones(3)})

"""What a design search climbs: every objective, every kind of site; interruptions; misused projections and starts."""

import signal
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_voed
from pyro_voed import (
    Fresh,
    Objective,
    adaptive_contrastive,
    barber_agakov,
    critic_objective,
    eig_flow,
    eig_nmc,
    info_nce,
    marginal_saddle,
    nwj,
    prior_contrastive,
)
from pyro_voed.certificates import bound_gap
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.design import optimise_design, search_grid, search_random, search_spsa
from pyro_voed.estimators import tuba


def model():
    xi = pyro.param("xi", torch.tensor(1.0), constraint=constraints.interval(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def small_flow(dim, context_dim):
    return AffineCouplingFlow(dim, context_dim, num_transforms=1, hidden_dim=8)


def optimised(program=model, num_steps=60, **options):
    quick = {"training": Fresh(num_steps=num_steps, batch_size=64), "num_samples": 1_024, "seed": 0}
    return optimise_design(program, "y", "theta", **{**quick, **options})


# --- objectives -------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "barber_agakov": barber_agakov,
    "adaptive_contrastive": adaptive_contrastive,
    "prior_contrastive": prior_contrastive,
    "critic_objective(info_nce)": critic_objective(info_nce),
    "critic_objective(nwj)": critic_objective(nwj),
    "critic_objective(tuba)": critic_objective(tuba),
    "marginal_saddle()": marginal_saddle(),
}


def test_the_table_of_objectives_in_the_docs_is_the_one_tested():
    text = (Path(__file__).parents[2] / "docs" / "designs.md").read_text()
    named = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(OBJECTIVES) <= {*named, "critic_objective(tuba)"}
    assert [name for name in named if name.rstrip("()") in dir(pyro_voed) and name not in OBJECTIVES] == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_that_the_docs_name_climbs(name):
    # For longer than until scales are refreshed, which happens at steps 50 and 100.
    result = optimised(objective=OBJECTIVES[name], num_steps=110)
    assert result.eig.isfinite()
    assert 1.0 < result.designs["xi"] <= 2.0


def test_a_gap_is_taken_of_a_bound_that_its_density_attains_alone():
    upper = replace(eig_nmc(model, "y", num_outer_samples=500, seed=0), bound="upper")
    for objective in (adaptive_contrastive, critic_objective(info_nce), prior_contrastive):
        found = optimised(objective=objective)
        with pytest.raises(ValueError, match="result: expected"):
            bound_gap(replace(found, final=replace(found.final, references=(upper,))))
    found = optimised()
    assert bound_gap(replace(found, final=replace(found.final, references=(upper,)))).gap.isfinite()


def test_the_initial_estimate_is_made_by_the_objective():
    seven = Objective(lambda sample, density: 7.0 + 0.0 * density.log_prob(sample.theta, sample.context()), "lower")
    result = optimised(objective=seven, initial_eig=True, num_steps=5)
    assert result.initial.eig == pytest.approx(7.0)
    result = optimised(objective=prior_contrastive, initial_eig=True, num_steps=5)
    assert result.initial.density is None


def test_a_contrastive_search_runs_the_model_once_an_experiment():
    num_steps, batch, pilot_and_probes = 20, 64, 5_000
    result = optimised(objective=prior_contrastive, num_steps=num_steps)
    assert result.num_simulations < num_steps * batch + 1_024 + pilot_and_probes  # all pairs would be 80,000 more


# --- random numbers ---------------------------------------------------------------------------------------------------


class OnlySamples(dist.TorchDistribution):
    """Standard normal draws that state neither a density nor a derivative."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.randn(torch.Size(sample_shape) + self.batch_shape)

    def expand(self, batch_shape, _instance=None):
        return OnlySamples(torch.Size(batch_shape))


def sampled_only():
    xi = pyro.param("xi", torch.tensor(1.0), constraint=constraints.interval(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", OnlySamples())
    return pyro.deterministic("y", xi * theta + noise)


def test_seeds_give_different_searches_with_a_site_that_only_samples():
    found = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        found.append(optimised(sampled_only, num_steps=5, seed=seed).designs["xi"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- interruptions ----------------------------------------------------------------------------------------------------

ESTIMATE_SEARCHES = {
    "grid": lambda estimator: search_grid(estimator, {"xi": torch.tensor([0.5, 1.0, 1.5])}, together=False),
    "grid together": lambda estimator: search_grid(estimator, {"xi": torch.tensor([0.5, 1.0, 1.5])}),
    "random": lambda estimator: search_random(estimator, 3, together=False),
    "spsa": lambda estimator: search_spsa(estimator, num_steps=2),
}


@pytest.mark.parametrize(
    ("name", "interrupted_call"), [("grid", 1), ("grid", 3), ("grid together", 1), ("random", 3), ("spsa", 3)]
)
def test_ctrl_c_ends_a_search_of_estimates_and_no_cut_estimate_is_used(name, interrupted_call):
    calls = []

    def estimator(designs):
        calls.append(designs)
        steps = []

        def interrupting():
            steps.append(1)
            if len(calls) == interrupted_call and len(steps) == 60:
                signal.raise_signal(signal.SIGINT)
            return model()

        return eig_flow(
            interrupting, "y", density=small_flow, designs=designs, training=Fresh(num_steps=100), num_samples=200
        )

    if interrupted_call == 1:
        with pytest.raises(KeyboardInterrupt):
            ESTIMATE_SEARCHES[name](estimator)
    else:
        result = ESTIMATE_SEARCHES[name](estimator)
        assert result.interrupted
        assert result.final.history is None or result.final.history.stop_reason != "interrupted"
    assert len(calls) == interrupted_call


def test_ctrl_c_ends_a_search_by_gradient_with_the_starts_that_have_climbed():
    runs = []

    def interrupting():
        runs.append(1)
        if len(runs) == 60:
            signal.raise_signal(signal.SIGINT)
        return model()

    # One start after the other, as the objective asks for.
    result = optimised(interrupting, 100, objective=prior_contrastive, starts=3, initial_eig=True)
    assert [result.interrupted, result.initial, result.start_eigs.shape] == [True, None, (1,)]
    assert result.history.stop_reason == "interrupted"
    assert result.history.num_steps < 60
    assert pyro.param("xi").item() == pytest.approx(result.designs["xi"].item())


# --- misuse -----------------------------------------------------------------------------------------------------------

PROJECTIONS = {
    "a tensor": (lambda designs: designs["xi"].clamp(0.0, 1.0), TypeError, ["expected a dict", "Tensor"]),
    "a number": (lambda designs: {"xi": 1.0}, TypeError, ["expected a dict", "float"]),
    "an unknown label": (lambda designs: {"time": designs["xi"]}, ValueError, ["no design called ['time']", "'xi'"]),
    "another shape": (lambda designs: {"xi": designs["xi"].expand(2)}, ValueError, ["'xi' of shape ()", "(2,)"]),
    "outside": (lambda designs: {"xi": designs["xi"] + 5.0}, ValueError, ["outside its constraint", "Interval"]),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_misused_projections(name):
    projection, kind, words = PROJECTIONS[name]
    with pytest.raises(kind, match="constraints: ") as caught:
        optimised(constraints=projection, num_steps=5)
    assert [word for word in words if word not in str(caught.value)] == []


STARTS = {
    "strings": ({"xi": ["a"]}, TypeError, ["starts['xi']: expected numbers", "['a']"]),
    "no rows": ({"xi": 1.0}, ValueError, ["starts['xi']: expected shape (num_", "()"]),
    "another shape": ({"xi": torch.zeros(2, 3)}, ValueError, ["starts['xi']: expected shape (num_starts", "(2, 3)"]),
    "an unknown label": ({"time": [1.0]}, ValueError, ["starts", "no design called ['time']", "'xi'"]),
    "outside": ({"xi": [0.5, 3.0]}, ValueError, ["starts['xi']", "Interval", "3.0"]),
}


@pytest.mark.parametrize("name", STARTS)
def test_misused_starts(name):
    starts, kind, words = STARTS[name]
    with pytest.raises(kind) as caught:
        optimised(starts=starts, num_steps=5)
    assert [word for word in words if word not in str(caught.value)] == []


def rounded():
    xi = pyro.param("xi", torch.tensor(1.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi.round() * theta, 1.0))


class MovedSamples(OnlySamples):
    """Draws that move with a value, without a derivative by it."""

    def __init__(self, centre):
        self.centre = centre.detach()
        super().__init__(self.centre.shape)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.centre + super().sample(sample_shape)

    def expand(self, batch_shape, _instance=None):
        return MovedSamples(self.centre.expand(batch_shape))


def moved():
    xi = pyro.param("xi", torch.tensor(1.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", MovedSamples(xi))
    return pyro.sample("y", dist.Normal(xi * theta + noise, 1.0))


@pytest.mark.parametrize(("program", "kind"), [(rounded, ValueError), (moved, NotImplementedError)])
def test_where_no_gradient_reaches_a_design_the_searches_without_one_are_named(program, kind):
    with pytest.raises(kind, match="gradient") as caught:
        optimised(program, num_steps=5)
    assert [name for name in ("search_spsa", "search_grid") if name not in str(caught.value)] == []

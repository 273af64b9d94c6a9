"""Design search: where it goes, what it keeps to, what it refuses and what it leaves behind."""

import math
import warnings
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam

from pyro_voed import barber_agakov, eig_flow, optimise_design, resolve, sample_joint
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.design.gradients import score_sites, score_terms
from pyro_voed.problems import finite, implicit_toy, michaelis_menten

SIDE = 4.0
"""Standard errors on the wrong side that pass: an exact estimate exceeds them with probability 3.2e-5."""


def small_flow(theta_dim, context_dim):
    return AffineCouplingFlow(theta_dim, context_dim, num_transforms=1, hidden_dim=16)


QUICK = {
    "density": small_flow,
    "learning_rate": 1e-2,
    "design_learning_rate": 0.1,
    "num_steps": 150,
    "num_samples": 2_000,
    "progress": False,
    "seed": 1,
}


def bounded():
    """The information rises with |xi|, so the best design is a bound."""
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(-1.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def interior():
    """Signal over noise is xi / (1 + xi ** 2), highest at one: EIG 0.5 log(1 + 4 * 0.25)."""
    xi = pyro.param("xi", torch.tensor(0.3), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(2 * xi / (1 + xi**2) * theta, 1.0))


def two_labels():
    """Both designs have an optimum of their own: the gain its bound, the angle zero."""
    gain = pyro.param("gain", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    angles = pyro.param("angles", torch.tensor([0.8, -0.7]))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample("y", dist.Normal(gain * torch.cos(angles) * theta, 1.0).to_event(1))


# --- where it goes --------------------------------------------------------------------------------------------------


def test_michaelis_menten_gets_far_above_its_start():
    model = michaelis_menten.michaelis_menten()
    result = optimise_design(model, "y", "theta", **QUICK)
    exact, error = michaelis_menten.exact_eig(result.designs["xi"], grid_size=101, num_outcomes=512)
    assert exact > 3.3  # the start has 2.40
    assert result.eig <= exact + SIDE * math.hypot(result.standard_error, error)
    assert exact - result.eig <= 0.3


def test_an_optimum_at_a_bound_is_reached():
    result = optimise_design(bounded, "y", **{**QUICK, "num_steps": 400})
    assert 1.8 < result.designs["xi"] <= 2.0
    exact = 0.5 * math.log(1 + result.designs["xi"] ** 2)
    assert abs(result.eig - exact) <= 0.05 + SIDE * result.standard_error


def test_an_optimum_inside_is_reached():
    result = optimise_design(interior, "y", **{**QUICK, "num_steps": 300})
    # The information is flat there: half a hundredth of a nat below the top at 0.87 and 1.15.
    assert 0.8 < result.designs["xi"] < 1.25
    assert result.eig <= 0.5 * math.log(2.0) + SIDE * result.standard_error


def test_several_designs_of_any_shape_move_together():
    result = optimise_design(two_labels, "y", **{**QUICK, "num_steps": 400})
    assert set(result.designs) == {"gain", "angles"}
    assert result.designs["gain"] > 1.7
    assert (result.designs["angles"].abs() < 0.35).all()
    assert result.eig > 0.8 * math.log(5.0)


def test_only_the_designs_named_move():
    result = optimise_design(two_labels, "y", design_labels="angles", **QUICK)
    assert set(result.designs) == {"angles"}
    assert list(pyro.get_param_store().keys()) == ["angles"]


def test_an_implicit_outcome_is_climbed_too():
    result = optimise_design(implicit_toy.implicit_toy(), "y", "theta", **QUICK)
    assert result.designs["xi"] > 1.4
    exact = implicit_toy.exact_eig(result.designs["xi"]).item()
    assert result.eig <= exact + SIDE * result.standard_error


@pytest.fixture(scope="module")
def single_runs():
    """One search one by one, and how often it called the model."""
    calls = []

    def model():
        calls.append(1)
        return bounded()

    small = {"num_steps": 25, "batch_size": 16, "num_samples": 50}
    with pyro.get_param_store().scope():
        result = optimise_design(model, "y", vectorize=False, **{**QUICK, **small})
    return result, len(calls)


def test_single_runs_climb_too(single_runs):
    assert single_runs[0].designs["xi"] > 0.8


def test_the_simulator_calls_stated_are_those_made(single_runs):
    result, num_calls = single_runs
    assert result.num_simulations == num_calls


def test_one_start_costs_no_choice_among_starts(single_runs):
    # Training takes 400 simulations, the estimate 50; pilot, scales and probes should not be ten times that.
    assert single_runs[1] < 3_000


def test_a_prior_from_a_guide_is_climbed():
    def posterior():
        pyro.sample("theta", dist.Normal(1.0, 0.5))

    result = optimise_design(bounded, "y", prior=posterior, **QUICK)
    assert result.designs["xi"] > 1.3
    assert result.eig <= 0.5 * math.log(1 + 0.25 * 4) + SIDE * result.standard_error


def test_a_design_summed_over_is_climbed():
    # The gradient of a sum is one number seen many times, which must not trip the optimiser.
    def model():
        xi = pyro.param("xi", torch.full((3,), 0.1), constraint=constraints.interval(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(xi.sum() * theta, 1.0))

    result = optimise_design(model, "y", **QUICK)
    assert (result.designs["xi"] > 0.3).all()


def test_the_search_moves_where_gradients_are_off():
    with torch.no_grad():
        result = optimise_design(bounded, "y", **QUICK)
    assert result.designs["xi"] > 1.2


# --- projections and starts -----------------------------------------------------------------------------------------


def normalise_rows(designs):
    xi = designs["xi"]
    return {"xi": xi / xi.abs().sum(-1, keepdim=True)}


def regression():
    xi = pyro.param("xi", torch.tensor([[0.5, 0.5], [0.6, 0.4]]))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), torch.tensor([3.0, 1.0])).to_event(1))
    return pyro.sample("y", dist.Normal((xi * theta.unsqueeze(-2)).sum(-1), 1.0).to_event(1))


def test_a_projection_holds_after_every_step():
    seen = []

    def projection(designs):
        projected = normalise_rows(designs)
        seen.append(projected["xi"].clone())
        return projected

    result = optimise_design(regression, "y", projection=projection, **QUICK)
    assert len(seen) >= 150
    for path in (*result.path["xi"], result.designs["xi"]):
        torch.testing.assert_close(path.abs().sum(-1), torch.ones(2))


def test_a_search_under_a_projection_climbs():
    # One row for each coefficient is best, log(10) / 2 + log(2) / 2 = 1.50; rows (0.5, 0.5) and (0.5, -0.5) give 1.06.
    result = optimise_design(regression, "y", projection=normalise_rows, **{**QUICK, "num_steps": 400})
    assert result.eig > 1.3


@pytest.mark.parametrize(
    ("projection", "words"),
    [
        (lambda designs: {"x": designs["xi"]}, "projection.*'x'"),
        (lambda designs: {"xi": designs["xi"][:1]}, "projection.*shape"),
    ],
    ids=["unknown name", "other shape"],
)
def test_wrong_projections_are_refused(projection, words):
    with pytest.raises(ValueError, match=words):
        optimise_design(regression, "y", projection=projection, **QUICK)


def two_basins():
    """A low hill at -1.5 and a high one at 1.5, hardly any slope between."""
    xi = pyro.param("xi", torch.tensor(-1.2))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    gain = torch.exp(-2 * (xi + 1.5) ** 2) + 3 * torch.exp(-2 * (xi - 1.5) ** 2)
    return pyro.sample("y", dist.Normal(gain * theta, 1.0))


def test_the_better_of_two_basins_wins():
    alone = optimise_design(two_basins, "y", **QUICK)
    assert abs(alone.designs["xi"] + 1.5) < 0.3
    pyro.clear_param_store()
    both = optimise_design(two_basins, "y", starts={"xi": torch.tensor([1.2, -1.7])}, **QUICK)
    assert abs(both.designs["xi"] - 1.5) < 0.3
    assert both.start_eigs.shape == (3,)
    assert both.start_eigs.argmax() == 1
    assert both.eig > alone.eig + 0.3
    assert pyro.param("xi").item() == both.designs["xi"].item()


def test_starts_are_the_stored_value_and_its_neighbours():
    bounded()
    pyro.get_param_store()["xi"] = torch.tensor(-0.9)
    result = optimise_design(bounded, "y", num_starts=3, **{**QUICK, "num_steps": 2, "design_learning_rate": 1e-6})
    assert result.start_eigs.shape == (3,)
    alone = optimise_design(bounded, "y", **{**QUICK, "num_steps": 2, "design_learning_rate": 1e-6})
    assert alone.path["xi"][0].item() == pytest.approx(result.designs["xi"].item(), abs=1e-3)


WRONG_STARTS = {
    "unknown": ({"x": torch.zeros(2)}, "starts.*'x'"),
    "shape": ({"xi": torch.zeros(2, 3)}, r"starts\['xi'\].*shape"),
    "outside": ({"xi": torch.tensor([0.0, 5.0])}, r"starts\['xi'\].*inside"),
}


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_wrong_starts_are_refused(name):
    starts, words = WRONG_STARTS[name]
    with pytest.raises(ValueError, match=words):
        optimise_design(bounded, "y", starts=starts, **QUICK)


def test_a_saturated_start_is_nudged_with_a_warning():
    def model():
        xi = pyro.param("xi", torch.tensor([0.5, 0.0]), constraint=constraints.unit_interval)
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        return pyro.sample("y", dist.Normal(xi * theta, 1.0).to_event(1))

    with pytest.warns(UserWarning, match=r"xi\[1\].*nudged"):
        result = optimise_design(model, "y", **{**QUICK, "num_steps": 300})
    assert (result.designs["xi"] > 0.5).all()


def test_no_warning_where_nothing_is_saturated():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimise_design(interior, "y", **{**QUICK, "num_steps": 3})


# --- what is refused ------------------------------------------------------------------------------------------------


NO_SHAPE = torch.Size()


class OnlySamples(dist.TorchDistribution):
    """Neither a density nor draws with gradients."""

    arg_constraints: ClassVar = {}
    support = constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, torch.Size(), validate_args=False)

    def sample(self, sample_shape=NO_SHAPE):
        with torch.no_grad():
            return self.loc + torch.randn(sample_shape + self.batch_shape)

    def expand(self, batch_shape, _instance=None):
        return OnlySamples(self.loc.expand(batch_shape))


def no_density_and_no_gradient():
    xi = pyro.param("xi", torch.tensor(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", OnlySamples(xi * theta))


def idle_design():
    pyro.param("idle", torch.tensor(0.5))
    xi = pyro.param("xi", torch.tensor(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def detached_design():
    xi = pyro.param("xi", torch.tensor(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi.detach() * theta, 1.0))


def rounded_design():
    xi = pyro.param("xi", torch.tensor(1.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi.round() * theta, 1.0))


def no_design():
    return pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(0.0, 1.0)), 1.0))


REFUSED = {
    "no density and no gradient": (no_density_and_no_gradient, None, NotImplementedError, ["'y'", "eig_flow(designs="]),
    "idle design": (idle_design, None, ValueError, ["['idle']", "eig_flow(designs="]),
    "detached design": (detached_design, None, ValueError, ["['xi']", "eig_flow(designs="]),
    "no design": (no_design, None, ValueError, ["no design", "pyro.param"]),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_gradient_can_climb_is_refused(name, vectorize):
    model, targets, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        optimise_design(model, "y", targets, vectorize=vectorize, **QUICK)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(pyro.get_param_store().keys()) == []


def test_a_discrete_nuisance_that_the_design_does_not_move_is_fine():
    def model():
        xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        coin = pyro.sample("coin", dist.Bernoulli(0.3))
        return pyro.sample("y", dist.Normal(xi * theta + coin, 1.0))

    assert optimise_design(model, "y", "theta", **QUICK).designs["xi"] > 1.0


def test_a_rounded_design_is_refused():
    with pytest.raises(ValueError, match=r"\['xi'\]"):
        optimise_design(rounded_design, "y", **QUICK)


def poisson_outcome():
    """More exposure, more information."""
    xi = pyro.param("xi", torch.tensor(1.5), constraint=constraints.interval(0.1, 8.0))
    theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
    return pyro.sample("y", dist.Poisson(xi * theta))


def bernoulli_nuisance():
    """The coin is noise whose variance is largest at one half; the signal does not move."""
    xi = pyro.param("xi", torch.tensor(0.6), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    coin = pyro.sample("coin", dist.Bernoulli(xi))
    return pyro.sample("y", dist.Normal(theta + 6 * coin, 1.0))


def discrete_child_of_a_child():
    """The coin's parent moves with the design by a reparametrised draw, so the coin does too."""
    xi = pyro.param("xi", torch.tensor(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(xi + theta, 1.0))
    return pyro.sample("y", dist.Bernoulli(torch.sigmoid(mean)))


def gradient_of_moment(model, targets, power):
    """Gradient of E[y ** power] by score-function terms: a mean over repeats and its standard error."""
    experiment = resolve(model, "y", targets)
    scored = score_sites(experiment)
    gradients = []
    for _ in range(50):
        xi = experiment.design_values["xi"].clone().requires_grad_()
        sample = sample_joint(experiment, 2_000, {"xi": xi}, score=scored)
        terms = sample.y[..., 0] ** power
        (gradient,) = torch.autograd.grad(score_terms(terms, sample.score).mean(), xi)
        gradients.append(gradient)
    gradients = torch.stack(gradients).double()
    return gradients.mean().item(), gradients.std().item() / 50**0.5


def test_design_gradients_of_discrete_draws_match_closed_forms():
    # With rate xi theta, E[y] = 2 xi and E[y ** 2] = 2 xi + 6 xi ** 2.
    for power, exact in ((1, 2.0), (2, 2 + 12 * 1.5)):
        mean, error = gradient_of_moment(poisson_outcome, "theta", power)
        assert abs(mean - exact) <= 5 * error
    # E[y] = 6 xi, and the coin's variance gives E[y ** 2] = 2 + 36 xi.
    for power, exact in ((1, 6.0), (2, 36.0)):
        mean, error = gradient_of_moment(bernoulli_nuisance, "theta", power)
        assert abs(mean - exact) <= 5 * error
    # E[y] = E[sigmoid(xi + sqrt(2) z)], its derivative by the trapezoidal rule.
    z = torch.linspace(-8, 8, 2_001).double()
    slope = torch.sigmoid(0.5 + 2**0.5 * z) * torch.sigmoid(-0.5 - 2**0.5 * z)
    exact = torch.trapezoid(slope * dist.Normal(0.0, 1.0).log_prob(z).exp(), z).item()
    mean, error = gradient_of_moment(discrete_child_of_a_child, "theta", 1)
    assert abs(mean - exact) <= 5 * error


def test_searches_over_discrete_draws_climb():
    assert optimise_design(poisson_outcome, "y", **QUICK).designs["xi"] > 2.5
    pyro.clear_param_store()
    # Without noise at either end, which are equally good, and with most at one half: the search starts near the middle,
    # and to which side it falls depends on what the density has learnt by then.
    assert abs(optimise_design(bernoulli_nuisance, "y", "theta", **QUICK).designs["xi"] - 0.5) > 0.25


@pytest.mark.parametrize("start", [0.25, 0.9])
def test_a_discrete_target_of_a_discrete_outcome_climbs_to_the_nearer_end(start):
    # The information of this model is convex in the design and lowest at about 0.53.
    result = optimise_design(finite.finite(start), "y", **{**QUICK, "density": None})
    assert abs(result.designs["xi"] - start) > 0.05
    assert (result.designs["xi"] < start) == (start < 0.5)
    exact = finite.exact_eig(result.designs["xi"]).item()
    assert result.eig <= exact + SIDE * result.standard_error


class Upper:
    bound = "upper"

    def __call__(self, sample, density):
        return -barber_agakov(sample, density)


@pytest.mark.parametrize(
    ("objective", "error", "words"),
    [
        (Upper(), ValueError, "upper bound"),
        (lambda sample, density: sample.y, TypeError, "bound"),
        ("eig", TypeError, "objective"),
    ],
    ids=["upper", "no side", "no callable"],
)
def test_objectives_that_are_none_are_refused(objective, error, words):
    with pytest.raises(error, match=words):
        optimise_design(bounded, "y", objective=objective, **QUICK)


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_starts", 0), ("design_learning_rate", 0.0), ("learning_rate", -1.0), ("num_samples", 1), ("batch_size", 1)],
)
def test_sizes_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        optimise_design(bounded, "y", **{**QUICK, option: value})


# --- what it leaves -------------------------------------------------------------------------------------------------


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.xi = PyroParam(torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))

    def forward(self):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(self.xi * theta, 1.0))


@pytest.mark.parametrize("ran_before", [True, False])
def test_the_best_design_is_in_the_store(ran_before):
    leaf = None
    if ran_before:
        bounded()
        leaf = pyro.get_param_store()._params["xi"]
    result = optimise_design(bounded, "y", **QUICK)
    store = pyro.get_param_store()
    assert list(store.keys()) == ["xi"]
    assert store["xi"].item() == pytest.approx(result.designs["xi"].item(), abs=1e-5)
    assert result.designs["xi"] > 0.8
    assert not store._constraints["xi"].check(torch.tensor(3.0))
    assert leaf is None or store._params["xi"] is leaf
    # An ordinary run reads it, and another search starts there.
    again = optimise_design(bounded, "y", **{**QUICK, "num_steps": 2, "design_learning_rate": 1e-6})
    assert again.path["xi"][0].item() == pytest.approx(result.designs["xi"].item(), abs=1e-3)


@pytest.mark.parametrize("ran_before", [True, False])
@pytest.mark.parametrize("local", [True, False])
def test_the_best_design_is_in_the_module(local, ran_before):
    with pyro.settings.context(module_local_params=local):
        module = Module()
        if ran_before:
            module()
        result = optimise_design(module, "y", **QUICK)
        assert result.designs["xi"] > 0.8
        assert module.xi.item() == pytest.approx(result.designs["xi"].item(), abs=1e-5)
        assert list(pyro.get_param_store().keys()) == ([] if local else ["xi"])
        again = eig_flow(module, "y", num_steps=2, num_samples=10, density=small_flow)
        assert again.designs["xi"].item() == pytest.approx(result.designs["xi"].item(), abs=1e-5)


def test_results_do_not_change_when_the_store_does():
    result = optimise_design(bounded, "y", **QUICK)
    before = result.designs["xi"].clone()
    with torch.no_grad():
        pyro.get_param_store()._params["xi"].zero_()
    assert torch.equal(result.designs["xi"], before)


def test_path_and_history_tell_the_whole_way():
    result = optimise_design(two_labels, "y", initial_eig=True, max_steps=200, **QUICK)
    assert result.history.num_steps == 150
    assert result.history.bound.shape == (150,)
    assert result.path["gain"].shape == result.path_steps.shape
    assert result.path["angles"].shape == (*result.path_steps.shape, 2)
    assert (result.path_steps.diff() > 0).all()
    assert result.path_steps[-1] == 150
    for name in ("gain", "angles"):
        assert torch.equal(result.path[name][-1], result.designs[name])
        assert not result.path[name].requires_grad
        assert not result.designs[name].requires_grad
    assert result.initial.eig < result.eig
    assert result.initial.designs["gain"].item() == pytest.approx(0.5)
    assert result.bound == result.final.bound == "lower"
    assert result.start_eigs.shape == (1,)
    assert "at the start" in str(result)
    assert "gain" in str(result)
    assert result.final.num_samples == 2_000


def test_the_path_begins_at_the_start():
    result = optimise_design(bounded, "y", **QUICK)
    assert result.path_steps[0] == 0
    assert result.path["xi"][0].item() == pytest.approx(0.5, abs=1e-5)


def test_the_number_of_steps_is_exact():
    assert optimise_design(bounded, "y", **{**QUICK, "num_steps": 7}).history.num_steps == 7


def test_the_density_of_the_result_is_that_of_the_best_design():
    result = optimise_design(bounded, "y", **QUICK)
    again = eig_flow(bounded, "y", density=result.density, num_steps=0, num_samples=2_000, seed=5)
    error = torch.hypot(again.standard_error, result.standard_error)
    assert abs(again.eig - result.eig) <= SIDE * error


# --- errors in mid-run ----------------------------------------------------------------------------------------------


def test_an_error_in_mid_run_leaves_store_and_module_as_they_were():
    class Breaks(Module):
        runs = 0

        def forward(self):
            type(self).runs += 1
            if type(self).runs == 100:
                raise FloatingPointError("the simulator gave up")
            return super().forward()

    for local in (True, False):
        pyro.clear_param_store()
        with pyro.settings.context(module_local_params=local):
            Breaks.runs = 0
            module = Breaks()
            module()
            with pytest.raises(FloatingPointError):
                optimise_design(module, "y", **{**QUICK, "num_steps": 500})
            assert module.xi.item() == pytest.approx(0.5)
            assert list(pyro.get_param_store().keys()) == ([] if local else ["xi"])


def test_values_that_are_not_finite_bring_designs_and_density_along():
    def model():
        xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        # Beyond 1.2 the simulator fails.
        return pyro.deterministic("y", theta * xi + torch.sqrt(1.2 - xi) * 0 + pyro.sample("e", dist.Normal(0.0, 1.0)))

    with pytest.raises(ArithmeticError, match=r"step \d+: 256 of 256.*site 'y'") as caught:
        optimise_design(model, "y", "theta", **{**QUICK, "num_steps": 500})
    assert caught.value.designs["xi"] > 0.8
    assert all(torch.isfinite(weight).all() for weight in caught.value.density.parameters())
    assert list(pyro.get_param_store().keys()) == []


# --- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_michaelis_menten_by_default_settings(seed):
    torch.manual_seed(seed)
    start = 0.5 + 0.05 * torch.randn(7)
    result = optimise_design(michaelis_menten.michaelis_menten(start), "y", "theta", seed=seed)
    exact, error = michaelis_menten.exact_eig(result.designs["xi"])
    assert error <= 1e-3
    assert exact >= 3.69
    assert abs(result.eig - exact) <= 0.03 + 2 * result.standard_error

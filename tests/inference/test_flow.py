"""The trained flow as posterior and as guide (false-positive rate of statistical checks: see `cases`).

Draws of the flow itself are only as good as its training, so they are held against exact posteriors at a tolerance of
a fifth of a posterior standard deviation; importance weights make the answers exact, and those are held to standard
errors.
"""

import copy
import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.importance import vectorized_importance_weights
from pyro.nn import PyroModule, PyroParam, PyroSample

from pyro_voed import Fresh
from pyro_voed.design import optimise_design
from pyro_voed.estimators import eig_flow, eig_marginal, eig_nmc
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.inference import flow_guide, flow_posterior, nuts_posterior
from pyro_voed.inference.outcomes import check_outcome, pack_outcome, packed_names
from pyro_voed.problems.implicit_toy import implicit_toy
from pyro_voed.problems.linear_gaussian import exact_posterior, linear_gaussian
from tests.estimators.cases import small_flow
from tests.inference.cases import (
    COUNTS,
    DESIGN,
    OUTCOME,
    THRESHOLD,
    counting,
    counting_log_evidence,
    counting_posterior,
    linear_gaussian_log_evidence,
)

DESIGNS = torch.stack([DESIGN, 2.0 * DESIGN])


def quick(model, *labels, num_steps=2, num_samples=100, batch_size=None, learning_rate=None, **options):
    training = Fresh(num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate)
    return eig_flow(model, *labels, training=training, num_samples=num_samples, seed=0, **options)


TRAINED = {"num_steps": 150, "num_samples": 2_000, "density": small_flow, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def gaussian():
    return quick(linear_gaussian(), "y", "theta", **TRAINED)


@pytest.fixture(scope="module")
def batch():
    return quick(linear_gaussian(), "y", designs={"xi": DESIGNS}, batch_size=512, **TRAINED)


@pytest.fixture(scope="module")
def counted():
    return quick(counting, ["counts", "votes"], **TRAINED)


@pytest.fixture(scope="module")
def implicit():
    return quick(implicit_toy(), "y", "theta", **{**TRAINED, "num_steps": 100})


def check_close(draws, mean, variance):
    assert ((draws.mean(0) - mean).abs() / variance.sqrt()).max() < 0.2
    assert (draws.var(0) / variance).log().abs().max() < 0.4


def check_log_evidence(log_weights, exact):
    weights = (log_weights - exact).exp()
    assert abs(weights.mean() - 1) < THRESHOLD * weights.std() / math.sqrt(len(weights))


def test_draws_follow_the_exact_gaussian_posterior(gaussian):
    posterior = flow_posterior(gaussian, OUTCOME, 4_000, seed=0)
    mean, covariance = exact_posterior(OUTCOME, DESIGN)
    check_close(posterior.flat("theta"), mean, covariance.diagonal())
    assert posterior.values["theta"].shape == (1, 4_000, 2)
    assert posterior.method == "flow"
    assert posterior.r_hat is None
    assert posterior.effective_sample_size["theta"].tolist() == [4_000.0, 4_000.0]


def test_equal_seeds_give_equal_draws_and_nothing_else_changes(gaussian):
    pyro.param("xi", torch.ones(3, 2))
    stored = pyro.get_param_store()._params["xi"]
    state = torch.get_rng_state()
    first, second = (flow_posterior(gaussian, OUTCOME, 10, seed=3).values["theta"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    flow_guide(gaussian, OUTCOME)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == ["xi"]
    assert pyro.get_param_store()._params["xi"] is stored
    third, fourth = (flow_posterior(gaussian, OUTCOME, 10).values["theta"] for _ in range(2))
    assert not torch.equal(third, fourth)


def test_a_member_of_a_batch_of_designs(batch):
    for index, design in enumerate(DESIGNS):
        posterior = flow_posterior(batch, OUTCOME, 4_000, design_index=index, seed=0)
        mean, covariance = exact_posterior(OUTCOME, design)
        check_close(posterior.flat("theta"), mean, covariance.diagonal())
    assert torch.equal(
        flow_posterior(batch, OUTCOME, design_index=(-1,), seed=1).matrix(),
        flow_posterior(batch, OUTCOME, design_index=1, seed=1).matrix(),
    )
    guide = flow_guide(batch, OUTCOME, design_index=1)
    conditioned = poutine.substitute(pyro.condition(linear_gaussian(), {"y": OUTCOME}), data={"xi": DESIGNS[1]})
    weighted = Importance(conditioned, guide, num_samples=200).run()
    check_log_evidence(torch.stack(weighted.log_weights).detach(), linear_gaussian_log_evidence(OUTCOME, DESIGNS[1]))


def test_a_batch_needs_a_fitting_index_and_one_design_none(batch, gaussian):
    for index in (None, 2, (0, 0)):
        with pytest.raises(ValueError, match=r"design_index: .* batch shape \(2,\)"):
            flow_posterior(batch, OUTCOME, design_index=index)
    with pytest.raises(ValueError, match="holds one design"):
        flow_posterior(gaussian, OUTCOME, design_index=0)


def test_a_design_result_answers_at_the_best_design():
    found = optimise_design(implicit_toy(), "y", "theta", training=Fresh(num_steps=60), num_samples=2_000, seed=0)
    assert flow_posterior(found, torch.tensor(0.5), 50, seed=0).values["theta"].shape == (1, 50)


def test_positive_and_simplex_targets_in_plates(counted):
    posterior = flow_posterior(counted, COUNTS, 4_000, seed=0)
    for name, (mean, variance) in counting_posterior().items():
        check_close(posterior.flat(name), mean, variance)
    assert (posterior.values["rate"] > 0).all()
    total = posterior.flat("share").sum(-1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_importance_weights_give_the_exact_evidence(gaussian):
    guide = flow_guide(gaussian, OUTCOME)
    model = pyro.condition(linear_gaussian(), {"y": OUTCOME})
    weighted = Importance(model, guide, num_samples=300).run()
    check_log_evidence(torch.stack(weighted.log_weights).detach(), linear_gaussian_log_evidence(OUTCOME))
    assert weighted.get_ESS() > 150


def test_jacobians_of_constrained_targets_in_plates(counted):
    guide = flow_guide(counted, COUNTS)
    model = pyro.condition(counting, COUNTS)
    weighted = Importance(model, guide, num_samples=200).run()
    check_log_evidence(torch.stack(weighted.log_weights).detach(), counting_log_evidence())
    log_weights, _, guide_trace = vectorized_importance_weights(model, guide, num_samples=2_000, max_plate_nesting=1)
    check_log_evidence(log_weights.detach(), counting_log_evidence())
    assert guide_trace.nodes["rate"]["value"].shape == (2_000, 3)
    assert guide_trace.nodes["share"]["value"].shape == (2_000, 1, 3)


def test_replay_and_predictive(gaussian):
    guide, model = flow_guide(gaussian, OUTCOME), linear_gaussian()
    guide_trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    assert torch.equal(replayed.nodes["theta"]["value"], guide_trace.nodes["theta"]["value"])
    for parallel in (False, True):
        predicted = Predictive(model, guide=guide, num_samples=200, parallel=parallel)()
        assert predicted["y"].shape == (200, 3)
        # The posterior predictive mean, whose standard error is below 0.13.
        mean, _ = exact_posterior(OUTCOME, DESIGN)
        assert ((predicted["y"].mean(0) - DESIGN @ mean).abs() < 0.7).all()


def test_variational_refinement_leaves_the_result_alone(counted):
    before = copy.deepcopy(counted.density.state_dict())
    guide, other = flow_guide(counted, COUNTS), flow_guide(counted, COUNTS)
    kept = copy.deepcopy(guide.density.state_dict())
    model = pyro.condition(counting, COUNTS)
    for loss in (Trace_ELBO(), Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = [svi.step() for _ in range(20)]
    other()  # another guide does not share the weights
    for density in (counted.density, other.density):
        assert all(torch.equal(value, before[name]) for name, value in density.state_dict().items())
    assert any(not torch.equal(value, kept[name]) for name, value in guide.density.state_dict().items())
    # The negative ELBO is the negative log evidence plus a divergence of well under one nat.
    assert -counting_log_evidence() - 0.2 < losses[-1] < -counting_log_evidence() + 1.0


@pytest.mark.slow
def test_the_posterior_of_one_experiment_is_the_prior_of_the_next(gaussian):
    guide = flow_guide(gaussian, OUTCOME)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NUTS did not mix")
        posterior = nuts_posterior(
            Experiment(linear_gaussian(), "y", prior=guide),
            OUTCOME,
            num_samples=150,
            num_warmup=100,
            num_chains=1,
            seed=0,
        )
    mean, covariance = exact_posterior(OUTCOME.repeat(2), DESIGN.repeat(2, 1))
    # Flow error and Monte Carlo error together stay below half a standard deviation.
    assert ((posterior.flat("theta").mean(0) - mean).abs() / covariance.diagonal().sqrt() < 0.5).all()
    assert len(pyro.get_param_store()) == 0


def test_a_nuisance_is_integrated_out_by_draws_and_refused_as_guide(implicit):
    # y = sinh(xi theta + e) with xi = 1 and e ~ N(0, 1/2): Gaussian in arsinh(y).
    posterior = flow_posterior(implicit, torch.tensor(0.8), 4_000, seed=0)
    design, noise = implicit.designs["xi"], 0.5
    variance = 1 / (1 + (design / noise) ** 2)
    mean = variance * design * torch.asinh(torch.tensor(0.8)) / noise**2
    check_close(posterior.flat("theta"), mean, variance)
    with pytest.raises(NotImplementedError, match=r"nuisance sites \['e'\]"):
        flow_guide(implicit, torch.tensor(0.8))


def test_targets_that_are_drawn_and_refused_as_guide():
    def deterministic():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * theta)
        pyro.sample("y", dist.Normal(theta, 1.0))

    def dependent():
        top = pyro.sample("top", dist.Uniform(0.5, 2.0))
        part = pyro.sample("part", dist.Uniform(0.0, top))
        pyro.sample("y", dist.Normal(part, 0.4))

    computed = quick(Experiment(deterministic, "y", "twice", prior_entropy=2.1))
    assert flow_posterior(computed, torch.tensor(0.5), 7, seed=0).values["twice"].shape == (1, 7)
    moving = quick(dependent, "y")
    values = flow_posterior(moving, torch.tensor(1.0), 500, seed=0).values
    assert (values["part"] < values["top"]).all()
    for result, why in ((computed, "are deterministic"), (moving, "supports of targets")):
        with pytest.raises(NotImplementedError, match=why):
            flow_guide(result, torch.tensor(1.0))


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.xi = PyroParam(torch.ones(3))
        self.slope = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, scale=1.0):
        slope = self.slope
        return pyro.sample("y", dist.Normal(self.xi * slope.unsqueeze(-1), scale).to_event(1))


def test_a_pyro_module_with_arguments():
    model = Regression()
    result = quick(Experiment(model, "y", model_args=(0.5,)))
    guide = flow_guide(result, torch.ones(3))
    assert Predictive(model, guide=guide, num_samples=5)(0.5)["y"].shape == (5, 3)


@pytest.mark.parametrize("vectorize", [True, False])
def test_an_outcome_is_packed_as_the_simulator_packs_it(vectorize):
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        scale = pyro.param("xi", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("time", dist.LogNormal(theta, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.exp(theta).unsqueeze(-1) * torch.ones(3)))
        pyro.sample("bounded", dist.Uniform(-scale, scale))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("sum", theta + noise, event_dim=0)
        pyro.sample("reading", dist.Normal(theta, 1.0))

    outcomes = ["time", "share", "bounded", "reading", "sum"]
    experiment = Experiment(model, outcomes, "theta", vectorize=vectorize, seed=0)
    design = {"xi": torch.tensor(3.0)}
    sample = sample_joint(experiment, 5, design)
    for row in range(5):
        outcome = {site.name: sample.values[site.name][row] for site in experiment.observations}
        packed = pack_outcome(experiment, check_outcome(experiment, outcome), design)
        assert torch.allclose(packed, sample.y[row], rtol=1e-4, atol=1e-5)
    assert packed_names(experiment) == ["time", "share", "share", "bounded", "sum", "reading"]


def test_masked_elements_are_left_out_of_the_packed_outcome():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("runs", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("y", dist.Normal(theta, 1.0))

    experiment = Experiment(model, "y", seed=0)
    packed = pack_outcome(experiment, check_outcome(experiment, torch.tensor([1.0, math.nan, 3.0])), {})
    assert packed.tolist() == [1.0, 3.0]
    assert packed_names(experiment) == ["y[0]", "y[2]"]


def test_an_outcome_outside_the_simulated_range_is_named(gaussian):
    with pytest.warns(UserWarning, match=r"outcome y\[0\], y\[2\] lies outside"):
        flow_posterior(gaussian, torch.tensor([100.0, 0.0, -100.0]), 10, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        flow_posterior(gaussian, OUTCOME, 10, seed=0)


def test_both_posteriors_export_alike(counted):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NUTS did not mix")
        nuts = nuts_posterior(counting, COUNTS, ["counts", "votes"], num_samples=10, num_warmup=5, num_chains=2, seed=0)
    flow = flow_posterior(counted, COUNTS, 10, seed=0)
    assert list(nuts.values) == list(flow.values)
    first, second = nuts.inference_data, flow.inference_data
    for group in ("posterior", "observed_data"):
        assert list(first[group].data_vars) == list(second[group].data_vars)
        for name in first[group].data_vars:
            assert first[group][name].dims == second[group][name].dims
    assert first.posterior["rate"].dims == ("chain", "draw", "rate_dim_0")
    assert first.posterior["rate"].shape == (2, 10, 3)
    assert first.sample_stats["diverging"].shape == (2, 10)
    assert nuts.columns == flow.columns


REFUSED = {
    "shape": (torch.zeros(4), r"shape \(3,\), got \(4,\)"),
    "several outcomes": (torch.zeros(2, 3), "call once for each"),
    "not finite": (torch.tensor([0.0, math.nan, 0.0]), "1 of 3 values"),
    "site": ({"z": torch.zeros(3)}, "expected values for the sites"),
}


@pytest.mark.parametrize("function", [flow_posterior, flow_guide])
def test_refuses_wrong_outcomes_and_leaves_everything_as_it_was(gaussian, function):
    for outcome, message in REFUSED.values():
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=message):
            function(gaussian, outcome)
        if function is flow_guide:
            assert torch.equal(torch.get_rng_state(), state)
        assert len(pyro.get_param_store()) == 0


def test_densities_of_outcomes_none_and_broken_ones_give_no_posterior(gaussian):
    model = linear_gaussian()
    without = eig_nmc(model, "y", num_outer_samples=20, num_inner_samples=20, seed=0)
    of_outcomes = eig_marginal(model, "y", training=Fresh(num_steps=2), num_samples=100, seed=0)
    for result in (without, of_outcomes):
        with pytest.raises(ValueError, match=f"{result.estimator} learned no density of the targets"):
            flow_posterior(result, OUTCOME)
    density = copy.deepcopy(gaussian.density)
    density.theta_scaling.scale.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="theta"):
        flow_posterior(replace(gaussian, learned=replace(gaussian.learned, density=density)), OUTCOME, 10, seed=0)

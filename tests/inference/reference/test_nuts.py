"""NUTS against exact posteriors (false-positive rate: see `cases`), and what it refuses."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample

from pyro_voed.inference import nuts_posterior
from pyro_voed.inference.reference.nuts import mixing
from pyro_voed.problems.implicit_toy import implicit_toy
from pyro_voed.problems.linear_gaussian import exact_posterior, linear_gaussian
from pyro_voed.problems.michaelis_menten import mean_rate, michaelis_menten
from tests.inference.cases import (
    COUNTS,
    DESIGN,
    OUTCOME,
    THRESHOLD,
    check_moments,
    counting,
    counting_posterior,
)

SHORT = {"num_samples": 20, "num_warmup": 10, "num_chains": 1, "seed": 0}


def quietly(*args, **kwargs):
    """Run a few draws, whose bad mixing is none of the test's concern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NUTS did not mix")
        return nuts_posterior(*args, **{**SHORT, **kwargs})


def test_matches_the_exact_gaussian_posterior():
    posterior = nuts_posterior(linear_gaussian(), OUTCOME, "y", num_samples=400, num_warmup=150, seed=0)
    mean, covariance = exact_posterior(OUTCOME, DESIGN)
    effective = posterior.effective_sample_size["theta"]
    check_moments(posterior.flat("theta"), mean, covariance.diagonal(), effective)
    correlation = posterior.flat("theta").T.corrcoef()[0, 1]
    assert abs(correlation) < THRESHOLD / effective.min().clamp(max=800).sqrt()
    assert posterior.values["theta"].shape == (2, 400, 2)
    assert posterior.r_hat["theta"].shape == (2,)
    assert posterior.num_divergences == 0


def test_other_designs_and_an_untouched_store():
    model = linear_gaussian()
    model()  # the store now holds the model's initial design
    stored = pyro.get_param_store()._params["xi"]
    before, design = stored.clone(), 2.0 * DESIGN
    state = torch.get_rng_state()
    posterior = nuts_posterior(
        model, OUTCOME, "y", designs={"xi": design}, num_samples=300, num_warmup=150, seed=1, jit_compile=True
    )
    mean, covariance = exact_posterior(OUTCOME, design)
    check_moments(posterior.flat("theta"), mean, covariance.diagonal(), posterior.effective_sample_size["theta"])
    assert pyro.get_param_store()._params["xi"] is stored
    assert torch.equal(stored, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_plates_and_constrained_supports():
    posterior = nuts_posterior(
        counting, COUNTS, ["counts", "votes"], num_samples=250, num_warmup=100, seed=0, jit_compile=True
    )
    assert posterior.values["rate"].shape == posterior.values["share"].shape == (2, 250, 3)
    for name, (mean, variance) in counting_posterior().items():
        check_moments(posterior.flat(name), mean, variance, posterior.effective_sample_size[name])
    total = posterior.flat("share").sum(-1)
    assert torch.allclose(total, torch.ones_like(total))


def test_a_support_that_depends_on_another_site():
    def model():
        top = pyro.sample("top", dist.Uniform(0.5, 2.0))
        part = pyro.sample("part", dist.Uniform(0.0, top))
        pyro.sample("y", dist.Normal(part, 0.4))

    # p(part | y) is proportional to N(y; part, 0.4^2) times the integral of 1 / top over top > part.
    grid = torch.linspace(0.0, 2.0, 20_001, dtype=torch.double)
    density = torch.exp(-0.5 * ((1.2 - grid) / 0.4) ** 2) * torch.log(2.0 / grid.clamp(min=0.5))
    mean = (grid * density).sum() / density.sum()
    variance = (grid.square() * density).sum() / density.sum() - mean**2
    posterior = nuts_posterior(model, torch.tensor(1.2), "y", num_samples=300, num_warmup=150, seed=0, jit_compile=True)
    assert (posterior.values["part"] <= posterior.values["top"]).all()
    check_moments(posterior.flat("part").double(), mean, variance, posterior.effective_sample_size["part"])


def test_deterministic_targets_are_recomputed():
    def model():
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.deterministic("total", torch.stack([a + b, a - b]))
        pyro.sample("y", dist.Normal(a + b, 1.0))

    posterior = quietly(model, torch.tensor(1.0), "y", ["a", "b", "total"], num_chains=2)
    a, b = posterior.values["a"], posterior.values["b"]
    assert torch.allclose(posterior.values["total"], torch.stack([a + b, a - b], -1))
    assert list(quietly(model, torch.tensor(1.0), "y", "total").values) == ["total"]


def test_measurements_masked_out_do_not_count():
    measured = torch.tensor([True, True, False])

    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), torch.tensor([1.0, 1.5])).to_event(1))
        with pyro.plate("runs", 3), pyro.poutine.mask(mask=measured):
            pyro.sample("y", dist.Normal((DESIGN * theta).sum(-1), 1.0))

    outcome = torch.tensor([1.0, 2.0, math.nan])
    posterior = nuts_posterior(model, outcome, "y", num_samples=300, num_warmup=150, seed=0)
    mean, covariance = exact_posterior(outcome[:2], DESIGN[:2])
    check_moments(posterior.flat("theta"), mean, covariance.diagonal(), posterior.effective_sample_size["theta"])


def test_a_guide_as_prior_replaces_the_models():
    def guide():
        packed = pyro.sample("packed", dist.Normal(5.0, 0.01), infer={"is_auxiliary": True})
        pyro.sample("theta", dist.Delta(packed))

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(0.0))

    posterior = quietly(model, torch.tensor(0.0), prior=guide)
    assert (posterior.values["theta"] - 5.0).abs().max() < 0.2


def test_double_precision_and_a_caller_without_gradients():
    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0))

    with torch.no_grad():
        posterior = quietly(model, torch.tensor(0.5), "y")
    assert posterior.values["theta"].dtype == posterior.observations["y"].dtype == torch.double


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.xi = PyroParam(torch.ones(3))
        self.slope = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        slope = self.slope
        return pyro.sample("y", dist.Normal(self.xi * slope, 1.0).to_event(1))


def test_a_pyro_module_is_a_model():
    posterior = nuts_posterior(Regression(), torch.ones(3), "y", num_samples=300, num_warmup=100, seed=0)
    effective = posterior.effective_sample_size["slope"]
    check_moments(posterior.flat("slope"), torch.tensor(0.75), torch.tensor(0.25), effective)


def test_a_model_that_takes_one_experiment_only():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta if theta > 0 else -theta, 1.0))

    assert quietly(model, torch.tensor(1.0), "y").values["theta"].shape == (1, 20)


def test_michaelis_menten():
    theta = torch.tensor([0.55, 0.45])
    outcome = mean_rate(theta, torch.full((7,), 0.5))
    posterior = quietly(michaelis_menten(), {"y": outcome}, "y", num_samples=150, num_warmup=100)
    z = (posterior.flat("theta").mean(0) - theta) / posterior.flat("theta").std(0)
    # The prior pulls the mean; the outcome holds no noise, so it stays well inside the posterior.
    assert z.abs().max() < 1.5


def test_equal_seeds_give_equal_draws_and_no_seed_others():
    first, second, third = (quietly(linear_gaussian(), OUTCOME, "y", seed=seed) for seed in (3, 3, None))
    assert torch.equal(first.values["theta"], second.values["theta"])
    assert not torch.equal(first.values["theta"], third.values["theta"])
    chains = quietly(linear_gaussian(), OUTCOME, "y", num_chains=2).values["theta"]
    assert not torch.equal(chains[0], chains[1])


def test_bad_mixing_is_never_silent():
    def two_islands():
        theta = pyro.sample("theta", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(theta.abs(), 0.1))

    with pytest.warns(UserWarning, match="'theta' has R-hat"):
        posterior = nuts_posterior(
            two_islands, torch.tensor(8.0), "y", num_samples=60, num_warmup=60, num_chains=6, seed=0
        )
    assert posterior.r_hat["theta"] > 1.5


def test_divergences_are_counted_and_reported():
    def funnel():
        scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(0.0, torch.exp(scale)).expand([5]).to_event(1))
        pyro.sample("y", dist.Normal(scale, 5.0))

    with pytest.warns(UserWarning, match="transitions of sites .* diverged"):
        posterior = nuts_posterior(funnel, torch.tensor(-3.0), "y", num_samples=80, num_warmup=30, seed=0)
    assert posterior.num_divergences == int(posterior.inference_data.sample_stats.diverging.sum())


def test_mixing_knows_elements_that_never_change():
    draws = torch.randn(2, 100, 2)
    draws[..., 1] = 1.0
    r_hat, effective = mixing({"theta": draws})
    assert r_hat["theta"][0] < 1.05
    assert r_hat["theta"][1].isnan()
    assert effective["theta"][0] > 50


def test_a_cholesky_factor_of_correlations_raises_no_alarm():
    def model():
        factor = pyro.sample("factor", dist.LKJCholesky(2, 4.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="NUTS did not mix")
        posterior = nuts_posterior(model, torch.tensor([1.0, 0.2]), "y", num_samples=300, num_warmup=150, seed=0)
    assert posterior.values["factor"].shape == (2, 300, 2, 2)


def with_discrete_latent():
    which = pyro.sample("which", dist.Bernoulli(0.5))
    theta = pyro.sample("theta", dist.Normal(2 * which - 1, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0))


REFUSED = {
    "discrete latent": (with_discrete_latent, torch.tensor(0.0), "y", {}, NotImplementedError, "discrete"),
    "deterministic outcome": (implicit_toy(), torch.tensor(0.0), "y", {}, NotImplementedError, "flow_posterior"),
    "shape": (linear_gaussian(), torch.zeros(4), "y", {}, ValueError, r"shape \(3,\), got \(4,\)"),
    "many outcomes": (linear_gaussian(), torch.zeros(5, 3), "y", {}, ValueError, "shape"),
    "not finite": (linear_gaussian(), torch.tensor([0.0, math.inf, 0.0]), "y", {}, ValueError, "1 of 3"),
    "site": (linear_gaussian(), {"z": torch.zeros(3)}, "y", {}, ValueError, "expected values for the sites"),
    "design batch": (
        linear_gaussian(),
        OUTCOME,
        "y",
        {"designs": {"xi": torch.ones(4, 3, 2)}},
        ValueError,
        "batch of shape",
    ),
    "too few draws": (linear_gaussian(), OUTCOME, "y", {"num_samples": 3}, ValueError, "at least 4"),
    "no integer": (
        counting,
        {"counts": torch.full((3,), 0.5), "votes": COUNTS["votes"]},
        ["counts", "votes"],
        {},
        ValueError,
        "discrete",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_leaves_everything_as_it_was(case):
    model, outcome, labels, options, error, message = REFUSED[case]
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        nuts_posterior(model, outcome, labels, **{**SHORT, **options})
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0


def test_an_outcome_outside_its_support():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.LogNormal(theta, 1.0))

    with pytest.raises(ValueError, match="outside the site's support"):
        nuts_posterior(model, torch.tensor(-1.0), "y", **SHORT)


def test_an_outcome_that_only_simulates():
    class SampleOnly(dist.Normal):
        def log_prob(self, value):
            raise NotImplementedError

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", SampleOnly(theta, 1.0))

    with pytest.raises(NotImplementedError, match="flow_posterior"):
        nuts_posterior(model, torch.tensor(0.0), "y", **SHORT)


def test_a_guide_that_hands_its_draws_on_is_a_prior_by_its_own_density():
    """Its Delta site carries the Jacobian of the hand-over, which the sampled coordinate must not get once more."""

    def model():
        theta = pyro.sample("theta", dist.LogNormal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(theta, 2.0))

    def guide():
        packed = pyro.sample("packed", dist.Normal(0.5, 0.6), infer={"is_auxiliary": True})
        pyro.sample("theta", dist.Delta(packed.exp(), log_density=-packed))

    posterior = nuts_posterior(model, torch.tensor(2.5), "y", prior=guide, num_samples=1_000, num_warmup=200, seed=0)
    packed = torch.linspace(-2.0, 3.0, 20_001, dtype=torch.float64)
    log_weight = dist.Normal(0.5, 0.6).log_prob(packed) + dist.Normal(packed.exp(), 2.0).log_prob(torch.tensor(2.5))
    weight = log_weight.softmax(0)
    mean = (weight * packed.exp()).sum()
    variance = (weight * (packed.exp() - mean).square()).sum()
    effective = posterior.effective_sample_size["theta"]
    assert abs(posterior.flat("theta").mean() - mean) < THRESHOLD * (variance / effective).sqrt()
    # Counted twice the Jacobian would move the mean by this many standard errors, so the test can fail.
    doubled = (log_weight - packed).softmax(0)
    assert mean - (doubled * packed.exp()).sum() > 2 * THRESHOLD * (variance / effective).sqrt()

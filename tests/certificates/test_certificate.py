"""Laws of the certified interval: it holds the exact value as often as it says, and says when it cannot.

A single interval of the fast tests is asked for a confidence of 1 - 6.3e-5 (`SURE`), that of 4 standard errors, so that
one of them misses with that probability at most; coverage itself is counted in the slow tests.
"""

import functools
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_voed import Fresh, certify, eig_flow, eig_marginal, max_regret
from pyro_voed.densities import SplineCouplingFlow
from pyro_voed.design import optimise_design
from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten
from tests.closed_forms import gain_eig, poisson, poisson_eig, scalar

SURE = 1 - 6.3e-5


def small_flow(dim, context_dim):
    return SplineCouplingFlow(dim, context_dim, num_transforms=1, hidden_dim=32)


TRAINING = Fresh(num_steps=150, learning_rate=1e-2)
QUICK = {"density": small_flow, "training": TRAINING, "num_samples": 500, "seed": 0, "progress": False}
UNTRAINED = {**QUICK, "training": Fresh(num_steps=0)}


DESIGNS = torch.tensor([0.3, 0.8, 1.5, 2.5])


EXACT = gain_eig(DESIGNS)
MODELS = {
    "linear_gaussian": (linear_gaussian.linear_gaussian(), linear_gaussian.DEFAULT_EIG),
    "michaelis_menten": (
        michaelis_menten.michaelis_menten(michaelis_menten.START_DESIGNS), michaelis_menten.START_EIG
    ),
    "Poisson": (poisson, poisson_eig()),
}  # fmt: skip


@functools.cache
def trained(name):
    """Each flow is trained once."""
    if name == "batch":
        return eig_flow(scalar, "y", designs={"xi": DESIGNS}, **QUICK)
    return eig_flow(MODELS[name][0], "y", **QUICK)


@functools.cache
def sure(name):
    """Its certificate."""
    return certify(trained(name), confidence=SURE, width=0.1, seed=1)


def holds(result, exact):
    low, high = result.interval
    return bool((low <= exact).all() and (exact <= high).all())


@pytest.mark.parametrize("name", MODELS)
def test_the_interval_holds_the_exact_value_at_the_width_asked_for(name):
    result = sure(name)
    certificate = result.certificate
    assert holds(result, MODELS[name][1])
    assert (result.interval[1] - result.interval[0]).item() <= 0.1
    assert certificate.certified is certificate.width_reached is True
    assert certificate.lower <= certificate.upper
    assert certificate.pareto_k <= 0.7
    assert certificate.confidence == SURE
    # All else is as it was, the cost added.
    assert torch.equal(result.eig, trained(name).eig)
    assert result.num_simulations == trained(name).num_simulations + certificate.num_simulations


@pytest.mark.parametrize(
    ("width", "confidence", "quantile"),
    [(0.2, 0.95, 1.959964), (0.05, 0.5, 0.674490), (0.05, 0.99, 2.575829), (0.02, 0.95, 1.959964)],
)
def test_the_interval_is_the_bounds_and_their_errors_within_the_width(width, confidence, quantile):
    certificate = certify(trained("linear_gaussian"), width=width, confidence=confidence, seed=0).certificate
    low, high = certificate.interval
    assert low.item() == pytest.approx((certificate.lower - quantile * certificate.lower_standard_error).item())
    assert high.item() == pytest.approx((certificate.upper + quantile * certificate.upper_standard_error).item())
    assert certificate.width_reached
    assert high - low <= width


def test_intervals_of_a_batch_hold_together_and_bound_the_regret():
    result = sure("batch")
    certificate = result.certificate
    assert result.interval.shape == (2, 4)
    assert holds(result, EXACT)
    assert certificate.pareto_k.shape == certificate.lower.shape == (4,)
    assert len(certificate.num_outer_samples) == 4
    # Bonferroni: the probability left over is shared among two sides of four designs.
    quantile = dist.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.05 / 8))
    usual = certify(trained("batch"), seed=1).certificate
    expected = usual.lower - quantile * usual.lower_standard_error
    torch.testing.assert_close(usual.interval[0], expected, rtol=1e-4, atol=1e-5)
    regret, chosen = max_regret(result)
    assert chosen == 3
    assert EXACT.max() - EXACT[chosen] <= regret <= 0.1
    # Designs that could be better count, the one chosen has the largest lower end.
    interval = torch.tensor([[0.1, 0.5, 0.4, 0.0], [0.2, 0.6, 0.9, 0.3]])
    regret, chosen = max_regret(replace(result, certificate=replace(certificate, interval=interval)))
    assert (round(regret.item(), 5), chosen) == (0.4, 1)
    with pytest.raises(ValueError, match="no certified interval"):
        max_regret(trained("batch"))


def test_eig_flow_certifies_itself():
    result = eig_flow(scalar, "y", certify=True, **QUICK)
    # At 0.95, and the seed is fixed.
    assert holds(result, gain_eig(1.5))
    assert result.interval[1] - result.interval[0] <= 0.05
    assert result.num_simulations > result.certificate.num_simulations
    assert "certified 95% interval" in str(result)
    assert eig_flow(scalar, "y", **UNTRAINED).certificate is None


def test_the_design_found_is_certified():
    best = optimise_design(scalar, "y", **{**QUICK, "training": Fresh(num_steps=60)})
    result = certify(best, confidence=SURE, width=0.2, seed=0)
    assert holds(result, gain_eig(best.designs["xi"]))
    assert torch.equal(result.designs["xi"], best.designs["xi"])


def test_an_untrained_flow_still_gives_an_interval_that_holds():
    untrained = eig_flow(MODELS["linear_gaussian"][0], "y", **UNTRAINED)
    result = certify(untrained, confidence=SURE, width=0.3, max_simulations=400_000, seed=0)
    assert holds(result, linear_gaussian.DEFAULT_EIG)


# --- budgets --------------------------------------------------------------------------------------------------------


def test_a_budget_too_small_for_the_width_is_said():
    result = certify(trained("linear_gaussian"), width=1e-3, max_simulations=100_000, seed=0)
    assert not result.certificate.width_reached
    assert result.interval[1] - result.interval[0] > 1e-3
    # Wider than asked for, and still an interval that holds (at 0.95; the seed is fixed).
    assert holds(result, linear_gaussian.DEFAULT_EIG)


@pytest.mark.parametrize("budget", [20_000, 50_000])
@pytest.mark.parametrize("width", [5e-4, 1e-2])
def test_the_budget_is_kept(width, budget):
    poor = eig_flow(MODELS["linear_gaussian"][0], "y", **{**QUICK, "training": Fresh(num_steps=30)})
    certificate = certify(poor, width=width, max_simulations=budget, seed=0).certificate
    assert certificate.num_simulations <= budget


# --- tails ----------------------------------------------------------------------------------------------------------


def learned_by(density):
    """A result on `scalar` whose density is another."""
    result = eig_flow(scalar, "y", **UNTRAINED)
    return replace(result, learned=replace(result.learned, density=density))


class LightTailed(nn.Module):
    """A posterior of `scalar` that is too narrow, squeezed by z = sign(w) log(1 + |w|): its density falls like
    exp(-exp(2 |z|) / 2), so that its logarithm at draws of the model is heavier than any power allows."""

    theta_dim = context_dim = 1

    def condition(self, context):
        return Squeezed(context)

    def log_prob(self, theta, context):
        mean, scale = place(context)
        z = ((theta - mean) / scale).abs()
        return (dist.Normal(0.0, 1.0).log_prob(z.expm1()) + z - math.log(scale)).squeeze(-1)


class Squeezed:
    def __init__(self, context):
        self.context = context

    def sample(self, shape):
        mean, scale = place(self.context)
        noise = torch.randn(*shape, *self.context.shape)
        return mean + scale * noise.sign() * noise.abs().log1p()


def place(context):
    return 1.5 * context / 3.25, 0.5 * 3.25**-0.5


def test_heavy_tailed_terms_are_not_certified():
    result = certify(learned_by(LightTailed()), width=1.0, max_simulations=200_000, seed=0)
    assert result.certificate.pareto_k > 0.7
    assert result.certificate.certified is False
    assert "uncertified 95% interval" in str(result)


class RarelyWrong(nn.Module):
    """The posterior of `scalar`, but off by six standard deviations at the 3 % outermost outcomes."""

    theta_dim = context_dim = 1

    def condition(self, context):
        far = context.abs() > 2.17 * math.sqrt(3.25)
        return dist.Normal(1.5 * context / 3.25 + 6 * 3.25**-0.5 * far, 3.25**-0.5).to_event(1)

    def log_prob(self, theta, context):
        return self.condition(context).log_prob(theta)


def test_rare_far_draws_are_told_from_a_heavy_tail_where_the_budget_allows():
    result = learned_by(RarelyWrong())
    short = certify(result, width=4.0, confidence=SURE, max_simulations=40_000, seed=0)
    enough = certify(result, width=4.0, confidence=SURE, seed=0)
    assert holds(short, gain_eig(1.5))
    assert holds(enough, gain_eig(1.5))
    short, enough = short.certificate, enough.certificate
    assert short.pareto_k > 0.7 >= enough.pareto_k
    assert (short.certified, enough.certified) == (False, True)
    assert short.num_simulations <= 40_000
    assert enough.num_outer_samples == (20_000,)


def test_terms_of_a_few_values_have_no_heavy_tail():
    result = eig_flow(finite.finite(), "y", **{**QUICK, "density": None})
    for seed in range(5):
        assert certify(result, seed=seed, width=0.1).certificate.certified


# --- refusals -------------------------------------------------------------------------------------------------------


def test_models_without_the_densities_are_refused():
    with pytest.raises(NotImplementedError, match=r"a certificate needs the density.*\['y'\]"):
        certify(eig_flow(implicit_toy.implicit_toy(), "y", "theta", **UNTRAINED))

    def noisy():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta + u, 1.0))

    with pytest.raises(NotImplementedError, match=r"a certificate needs.*\['u'\]"):
        certify(eig_flow(noisy, "y", "theta", **UNTRAINED))


def test_what_is_no_result_is_refused():
    with pytest.raises(TypeError, match="EIGResult"):
        certify(1.0)


@pytest.mark.parametrize("designs", [None, {"xi": DESIGNS}], ids=["one design", "a batch"])
def test_a_density_of_outcomes_is_no_proposal(designs):
    result = eig_marginal(scalar, "y", designs=designs, **UNTRAINED)
    with pytest.raises(ValueError, match="no density of the targets"):
        certify(result, seed=0, max_simulations=5_000)


REFUSED = {"width": (0.0, -1.0, math.inf), "confidence": (0.4, 1.0), "max_simulations": (100,)}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_out_of_range_are_refused(name):
    for value in REFUSED[name]:
        with pytest.raises(ValueError, match=name):
            certify(trained("linear_gaussian"), **{name: value})


def test_the_callers_state_is_left_alone():
    result = trained("linear_gaussian")
    weights = [weight.clone() for weight in result.density.parameters()]
    before = torch.get_rng_state()
    first, second = certify(result, seed=3), certify(result, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.interval, second.interval)
    assert list(pyro.get_param_store().keys()) == []
    assert all(torch.equal(*pair) for pair in zip(weights, result.density.parameters(), strict=True))
    assert result.interval is None
    third, fourth = certify(result), certify(result)
    assert not torch.equal(third.interval, fourth.interval)
    with pytest.raises(NotImplementedError):
        certify(eig_flow(implicit_toy.implicit_toy(), "y", "theta", **UNTRAINED), seed=0)
    assert torch.is_grad_enabled()


# --- coverage -------------------------------------------------------------------------------------------------------

REPEATS, FEWEST = 200, 182
"""An exact 95 % interval fails this 6 times in 1,000."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("width", [0.05, 0.2])
@pytest.mark.parametrize("name", ["linear_gaussian", "Poisson"])
def test_intervals_cover(name, width):
    results = [certify(trained(name), width=width, seed=seed) for seed in range(REPEATS)]
    assert sum(holds(result, MODELS[name][1]) for result in results) >= FEWEST
    assert sum(result.certificate.width_reached for result in results) >= FEWEST


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bound_on_regret_is_valid():
    hits = 0
    for seed in range(REPEATS):
        result = certify(trained("batch"), width=0.05, seed=seed)
        regret, chosen = max_regret(result)
        hits += holds(result, EXACT) and bool(EXACT.max() - EXACT[chosen] <= regret)
    assert hits >= FEWEST

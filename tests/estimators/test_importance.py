"""Laws of the bounds by importance sampling, with good proposals and with bad ones.

A side is broken when the estimate lies more than `SIDE` = 4 standard errors beyond the exact value (probability 3.2e-5
for an exact one); about 30 comparisons are made.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn

from pyro_voed import Experiment, Fresh, eig_ace, eig_flow, eig_vnmc
from pyro_voed.densities import SplineCouplingFlow
from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten
from tests.closed_forms import MASKED_EIG, gain_eig, masked, scalar
from tests.estimators.weights import three_terms

SIDE = 4.0
FUNCTIONS = [eig_ace, eig_vnmc]


def small_flow(dim, context_dim):
    return SplineCouplingFlow(dim, context_dim, num_transforms=1, hidden_dim=32)


TRAINING, NONE = Fresh(num_steps=150, learning_rate=1e-2), Fresh(num_steps=0)
QUICK = {"density": small_flow, "training": TRAINING, "num_samples": 2_000, "seed": 0, "progress": False}


class GaussianProposal(nn.Module):
    """The exact posterior of `linear_gaussian`, moved and stretched."""

    theta_dim, context_dim = 2, 3

    def __init__(self, shift=0.0, stretch=1.0):
        super().__init__()
        self.shift, self.stretch = shift, stretch
        self.design = torch.tensor(linear_gaussian.DEFAULT_DESIGN)

    def condition(self, context):
        mean, covariance = linear_gaussian.exact_posterior(context, self.design)
        return dist.MultivariateNormal(mean + self.shift, self.stretch**2 * covariance)

    def log_prob(self, theta, context):
        return self.condition(context).log_prob(theta)


@pytest.fixture(scope="module")
def experiment():
    return Experiment(linear_gaussian.linear_gaussian(), "y")


@pytest.mark.parametrize("num_inner", [1, 4, 16])
def test_the_posterior_itself_makes_every_term_exact(experiment, num_inner):
    lower, upper, flow = three_terms(experiment, GaussianProposal(), 500, num_inner, defensive=0.0)
    # By Bayes's rule log q - log p(theta) is log p(y | theta) - log p(y).
    torch.testing.assert_close(lower, flow, rtol=0, atol=1e-4)
    torch.testing.assert_close(upper, flow, rtol=0, atol=1e-4)
    assert abs(flow.mean() - linear_gaussian.DEFAULT_EIG) <= SIDE * flow.std() / math.sqrt(500)


PROPOSALS = {
    "posterior": GaussianProposal(),
    "off its place": GaussianProposal(shift=0.5),
    "too wide": GaussianProposal(stretch=2.0),
    "too narrow": GaussianProposal(stretch=0.5),
}


@pytest.mark.parametrize("defensive", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("name", PROPOSALS)
def test_any_proposal_gives_both_sides(experiment, name, defensive):
    lower, upper, flow = three_terms(experiment, PROPOSALS[name], 4_000, 8, defensive=defensive)
    exact = linear_gaussian.DEFAULT_EIG
    assert lower.mean() <= exact + SIDE * lower.std() / math.sqrt(4_000)
    assert upper.mean() >= exact - SIDE * upper.std() / math.sqrt(4_000)
    assert flow.mean() <= exact + SIDE * flow.std() / math.sqrt(4_000)
    # On equal outer draws the order holds up to the noise of the inner ones.
    gap = upper - lower
    assert gap.mean() >= -SIDE * gap.std() / math.sqrt(4_000) - 1e-6


def test_the_sides_close_in_as_inner_draws_grow(experiment):
    gaps = []
    for num_inner in (2, 16, 128):
        lower, upper, _ = three_terms(experiment, PROPOSALS["off its place"], 2_000, num_inner)
        gaps.append((upper - lower).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > 0
    # The gap falls at least like 1 / L.
    assert gaps[2] <= 4 * gaps[1] / 8


def test_the_prior_bounds_the_weights(experiment):
    # With a share of 0.1 no weight exceeds ten times the likelihood, so no inner average is lost to a narrow proposal.
    proposal = GaussianProposal(shift=3.0, stretch=0.2)
    _, upper, _ = three_terms(experiment, proposal, 2_000, 64, defensive=0.1)
    _, worse, _ = three_terms(experiment, proposal, 2_000, 64, defensive=0.0)
    assert upper.mean() < worse.mean()
    assert upper.mean() < linear_gaussian.DEFAULT_EIG + 1.5


def test_chunks_do_not_change_the_law(experiment):
    lower, upper, _ = three_terms(experiment, GaussianProposal(), 1_001, 8, max_bytes=20_000)
    assert lower.shape == upper.shape == (1_001,)
    for terms in (lower, upper):
        assert abs(terms.mean() - linear_gaussian.DEFAULT_EIG) <= 0.05 + SIDE * terms.std() / math.sqrt(1_001)


# --- the two functions ----------------------------------------------------------------------------------------------


def both(model, **options):
    """ACE with a proposal that it trains, VNMC with the same."""
    lower = eig_ace(model, "y", **{**QUICK, **options})
    return lower, eig_vnmc(model, "y", **{**QUICK, **options, "density": lower.density, "training": NONE})


def dependent_support():
    upper = pyro.sample("upper", dist.Uniform(0.5, 2.0))
    place = pyro.sample("place", dist.Uniform(0.0, upper))
    pyro.sample("y", dist.Normal(upper + place, 0.3))


CASES = {
    "linear_gaussian": (linear_gaussian.linear_gaussian(), linear_gaussian.DEFAULT_EIG),
    "michaelis_menten": (
        michaelis_menten.michaelis_menten(michaelis_menten.START_DESIGNS),
        michaelis_menten.START_EIG,
    ),
    "masked": (masked, MASKED_EIG),
}


@pytest.mark.parametrize("name", CASES)
def test_both_sides_hold_the_exact_value(name):
    model, exact = CASES[name]
    lower, upper = both(model)
    assert exact - 0.05 - SIDE * lower.standard_error <= lower.eig <= exact + SIDE * lower.standard_error
    assert exact - SIDE * upper.standard_error <= upper.eig <= exact + 0.05 + SIDE * upper.standard_error
    assert (lower.bound, upper.bound) == ("lower", "upper")
    assert (lower.estimator, upper.estimator) == ("eig_ace", "eig_vnmc")
    assert lower.weights.passed is upper.weights.passed is True
    assert lower.weights.pareto_k.shape == ()
    assert upper.history is None


@pytest.mark.parametrize("name", ["linear_gaussian", "michaelis_menten"])
def test_an_untrained_proposal_still_gives_both_sides(name):
    model, exact = CASES[name]
    untrained = {**QUICK, "training": NONE}
    lower, upper = (function(model, "y", num_inner_samples=64, **untrained) for function in FUNCTIONS)
    assert lower.eig <= exact + SIDE * lower.standard_error
    assert upper.eig >= exact - SIDE * upper.standard_error
    assert eig_flow(model, "y", **untrained).eig < lower.eig < upper.eig


def test_supports_that_depend_on_other_targets():
    lower, upper = both(dependent_support)
    joint = math.hypot(lower.standard_error, upper.standard_error)
    assert -SIDE * joint <= upper.eig - lower.eig <= 0.05 + SIDE * joint


def test_discrete_targets_have_a_classifier_as_proposal():
    for result in both(finite.finite(), density=None):
        assert abs(result.eig - finite.DEFAULT_EIG) <= 0.01 + SIDE * result.standard_error


def test_one_proposal_serves_a_batch_of_designs():
    designs = torch.tensor([[0.3, 1.0, 3.0], [2.0, 0.5, 1.5]])
    exact = gain_eig(designs)
    for result, side in zip(both(scalar, designs={"xi": designs}), (1, -1), strict=True):
        assert result.eig.shape == result.standard_error.shape == result.weights.pareto_k.shape == (2, 3)
        assert (side * (result.eig - exact) <= SIDE * result.standard_error).all()
        assert ((result.eig - exact).abs() <= 0.07 + SIDE * result.standard_error).all()


def test_simulations_are_counted_inner_draws_included():
    model = linear_gaussian.linear_gaussian()
    reused = {**QUICK, "density": eig_flow(model, "y", **QUICK).density, "training": NONE, "num_samples": 500}
    few, many = (eig_ace(model, "y", num_inner_samples=number, **reused).num_simulations for number in (4, 24))
    # Each inner draw is scored once; a tenth are also drawn from the prior.
    assert 500 * 20 <= many - few <= 500 * 20 * 1.2


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_fewest_samples_allowed_are_enough_and_the_callers_state_is_left_alone(function):
    before = torch.get_rng_state()
    assert function(scalar, "y", **{**QUICK, "training": Fresh(num_steps=2), "num_samples": 2}).eig.isfinite()
    assert torch.equal(torch.get_rng_state(), before)
    assert list(pyro.get_param_store().keys()) == []
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_cannot_be_weighed_is_refused(function):
    with pytest.raises(NotImplementedError, match=r"density of the outcome.*\['y'\].*eig_flow"):
        function(implicit_toy.implicit_toy(), "y", "theta")
    with pytest.raises(NotImplementedError, match=r"\['u'\].*eig_nmc"):
        function(linear_gaussian.dependent_nuisance(), "y", "theta")
    guide = AutoDiagonalNormal(pyro.condition(scalar, data={"y": torch.tensor(0.0)}), init_scale=2.0)
    guide()
    with pytest.raises(NotImplementedError, match="auxiliary sites"):
        function(Experiment(scalar, "y", prior=guide), **QUICK)
    for name, value in {"num_inner_samples": 0, "num_samples": 1}.items():
        with pytest.raises(ValueError, match=name):
            function(scalar, "y", **{name: value})
    with pytest.raises(TypeError, match="num_inner_samples"):
        function(scalar, "y", num_inner_samples=2.5)

"""A certificate is refused where draws do not follow the densities stated, and holds on the circle.

Models that state right densities are refused with probability 1e-6, by the five standard errors of each check.
"""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import biject_to, constraints

from pyro_voed import certify, eig_flow, eig_nmc
from pyro_voed.certificates.consistency import share_terms
from pyro_voed.training import Fresh
from tests.certificates.test_certificate import SURE, small_flow

NARROW, ONE = torch.tensor(0.5), torch.tensor(1.0)
UNTRAINED = {"density": small_flow, "training": Fresh(num_steps=0), "num_samples": 500, "seed": 0, "progress": False}


class Scaled(dist.Normal):
    """Draws of a normal distribution, whose density is too large by a tenth; the entropy is inherited."""

    def log_prob(self, value):
        return super().log_prob(value) + math.log(1.1)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Wide(Scaled):
    """The density of a scale larger by a third."""

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.33 * self.scale).log_prob(value)


class Unnormalised(Scaled):
    """The density without its scale, which a target sets."""

    def log_prob(self, value):
        return -0.5 * ((value - self.loc) / self.scale).square()


def model(prior, outcome):
    def run():
        theta = pyro.sample("theta", prior())
        pyro.sample("y", outcome(theta))

    return run


def normal():
    return dist.Normal(0.0, 1.0)


def measured(theta):
    return dist.Normal(theta, NARROW)


RIGHT = {
    "normal": model(normal, measured),
    "zero-inflated counts": model(
        lambda: dist.Gamma(3.0, 1.0), lambda theta: dist.ZeroInflatedPoisson(rate=theta, gate=torch.tensor(0.3))
    ),
    "heavy-tailed": model(lambda: dist.Cauchy(0.0, 1.0), lambda theta: dist.StudentT(3.0, theta, 1.0)),
}
PRIORS = {
    "density too large": model(lambda: Scaled(0.0 * ONE, ONE), measured),
    "density too wide": model(lambda: Wide(0.0 * ONE, ONE), measured),
}
OUTCOMES = {
    "density too wide": model(normal, lambda theta: Wide(theta, NARROW)),
    "density not normalised": model(normal, lambda theta: Unnormalised(0.0 * ONE, theta.exp())),
}


@pytest.mark.parametrize("name", RIGHT)
def test_densities_that_fit_the_draws_are_not_suspected(name):
    for result in (eig_flow(RIGHT[name], "y", **UNTRAINED), eig_nmc(RIGHT[name], "y", seed=0)):
        assert certify(result, width=0.3, seed=0).certificate.disagreement == ""


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_density_that_its_draws_do_not_follow_is_not_certified(name):
    with pytest.warns(UserWarning, match="nothing is certified: prior draws do not follow"):
        result = certify(eig_flow(PRIORS[name], "y", **UNTRAINED), width=0.3, max_simulations=200_000, seed=0)
    assert not result.certificate.certified
    assert "uncertified 95% interval" in str(result)
    assert "prior draws do not follow the density" in str(result)


@pytest.mark.parametrize("name", OUTCOMES)
def test_an_outcome_density_that_its_draws_do_not_follow_is_not_certified(name):
    found = [eig_nmc(OUTCOMES[name], "y", seed=0), eig_flow(OUTCOMES[name], "y", **UNTRAINED)]
    for result in found:
        with pytest.warns(UserWarning, match="nothing is certified: draws do not follow"):
            assert not certify(result, seed=0).certificate.certified


def test_an_inherited_entropy_makes_no_control():
    # The prior's density cancels in what prior draws estimate, unless it comes in as a control.
    exact = 0.5 * math.log(5.0)
    result = eig_nmc(PRIORS["density too large"], "y", num_outer_samples=4_000, seed=0)
    assert abs(result.eig - exact) < 4 * result.standard_error


def test_shares_expect_what_bayes_rule_says():
    # Two hypotheses, prior 1/2 each, outcomes 0 or 1: every outcome in proportion to its probability, no sampling.
    log_likelihood = torch.tensor([[0.2, 0.7], [0.8, 0.3]]).log()  # outcome, hypothesis
    own, other = log_likelihood.flatten(), log_likelihood.flip(1).flatten()
    mean = (own.exp() / 2 * share_terms(own, other.unsqueeze(-1))).sum()
    torch.testing.assert_close(mean, torch.zeros(()), rtol=0, atol=1e-6)


# --- the circle -----------------------------------------------------------------------------------------------------

CONCENTRATIONS = (1.0, 20.0)


def angle():
    """The prior piles up next to the cut of the circle, at 3.14."""
    theta = pyro.sample("theta", dist.VonMises(2.5, CONCENTRATIONS[0]))
    pyro.sample("y", dist.VonMises(theta, CONCENTRATIONS[1]))


def angle_eig(num=4_000):
    """Entropy of the outcome less that of its noise, by the midpoint rule, which is exact for periodic functions."""
    grid = (torch.arange(num).double() + 0.5) * 2 * math.pi / num - math.pi
    step = 2 * math.pi / num

    def density(offset, concentration):
        norm = 2 * math.pi * torch.special.i0e(torch.tensor(concentration).double())
        return torch.exp(concentration * (torch.cos(offset) - 1)) / norm

    noise = density(grid, CONCENTRATIONS[1])
    prior = density(grid - 2.5, CONCENTRATIONS[0])
    outcome = density(grid[:, None] - grid, CONCENTRATIONS[1]) @ prior * step
    return step * float((noise * noise.log()).sum() - (outcome * outcome.log()).sum())


class NearTheOutcome(nn.Module):
    """Angles around the one measured, as logits of their place in the turn."""

    theta_dim = context_dim = 1
    to_turn = biject_to(constraints.interval(-math.pi, math.pi))

    def condition(self, context):
        self.angles = dist.VonMises(self.to_turn(context), 15.0)
        return self

    def sample(self, shape):
        return self.to_turn.inv(self.angles.sample(shape))

    def log_prob(self, theta, context):
        angle = self.to_turn(theta)
        own = dist.VonMises(self.to_turn(context), 15.0).log_prob(angle)
        return (own + self.to_turn.log_abs_det_jacobian(theta, angle)).squeeze(-1)


def test_intervals_hold_for_a_target_on_the_circle():
    untrained = eig_flow(angle, "y", **UNTRAINED)
    result = replace(untrained, learned=replace(untrained.learned, density=NearTheOutcome()))
    for seed in range(2):
        certificate = certify(result, width=0.1, confidence=SURE, seed=seed).certificate
        assert certificate.certified
        assert certificate.interval[0] < angle_eig() < certificate.interval[1]


@pytest.mark.slow
def test_a_trained_flow_s_intervals_hold_on_the_circle():
    result = eig_flow(angle, "y", training=Fresh(num_steps=1_000), seed=0, progress=False)
    inside = 0
    for seed in range(20):
        low, high = certify(result, width=0.03, seed=seed).interval
        inside += bool(low < angle_eig() < high)
    # An exact 95 % interval fails this 3 times in 1,000.
    assert inside >= 16

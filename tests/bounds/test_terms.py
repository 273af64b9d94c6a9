"""Terms of bounds on a Gaussian channel: with the true densities they are the information of each draw, with wrong ones
they miss it by the divergences that the formulas say.

Means are held to 4.5 standard errors: a right one is off by more 7 times in a million, and eight are compared.
"""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_voed.bounds import (
    ace_terms,
    ba_terms,
    marginal_likelihood_terms,
    marginal_terms,
    nmc_terms,
    pce_terms,
    vnmc_terms,
)

GAIN, INNER = 1.5, 50
EIG = 0.5 * math.log1p(GAIN**2)
WIDE = math.log(2.0) + 1 / 8 - 1 / 2
"""Divergence from a Gaussian to one of twice its standard deviation."""


class Channel:
    """Draws of a normal target and its outcome, and their densities, learned ones made `factor` times too wide."""

    def __init__(self, num=20_000):
        self.theta = torch.randn(num).double()
        self.y = GAIN * self.theta + torch.randn(num).double()
        self.information = self.given(self.theta) - self.marginal()

    def prior(self, theta):
        return dist.Normal(0.0, 1.0).log_prob(theta)

    def given(self, theta, factor=1.0):
        """log p(y given theta), for one target of each outcome or several."""
        y = self.y if theta.dim() == 1 else self.y[:, None]
        return dist.Normal(GAIN * theta, factor).log_prob(y)

    def marginal(self, factor=1.0):
        return dist.Normal(0.0, factor * math.sqrt(1 + GAIN**2)).log_prob(self.y)

    def posterior(self, factor=1.0):
        return dist.Normal(GAIN * self.y / (1 + GAIN**2), factor / math.sqrt(1 + GAIN**2))

    def log_q(self, factor=1.0):
        return self.posterior(factor).log_prob(self.theta)

    def weights(self, factor=1.0):
        """Log weights of the own draw and of the inner ones, the proposal the posterior widened."""
        q = self.posterior(factor)
        inner = q.sample((INNER,))
        log_q = q.log_prob(inner).T
        own = self.prior(self.theta) + self.given(self.theta) - self.log_q(factor)
        return own, self.prior(inner.T) + self.given(inner.T) - log_q


# Terms, and which way, and in closed form how far, densities that are twice too wide move their mean.
BOUNDS = {
    "ba": (lambda c, wide: ba_terms(c.log_q(wide), c.prior(c.theta)), -1, WIDE),
    "marginal": (lambda c, wide: marginal_terms(c.given(c.theta), c.marginal(wide)), 1, WIDE),
    "likelihood learned": (lambda c, wide: marginal_likelihood_terms(c.given(c.theta, wide), c.marginal()), -1, WIDE),
    "marginal learned": (lambda c, wide: marginal_likelihood_terms(c.given(c.theta), c.marginal(wide)), 1, WIDE),
    "ace": (lambda c, wide: ace_terms(c.given(c.theta), *c.weights(wide)), -1, None),
    "vnmc": (lambda c, wide: vnmc_terms(c.given(c.theta), c.weights(wide)[1]), 1, None),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_terms_of_the_truth_are_the_information_of_each_draw(name):
    channel = Channel(200)
    torch.testing.assert_close(BOUNDS[name][0](channel, 1.0), channel.information)


def test_the_information_of_the_draws_averages_to_the_exact_value():
    information = Channel().information
    assert abs(information.mean() - EIG) <= 4.5 * information.std() / math.sqrt(len(information))


@pytest.mark.parametrize("name", BOUNDS)
def test_wrong_densities_miss_by_their_divergence_to_the_side_of_the_bound(name):
    (terms, sign, divergence), channel = BOUNDS[name], Channel()
    # The information of the same draws is taken off as a control: what is left is the divergence alone.
    excess = sign * (terms(channel, 2.0) - channel.information)
    error = 4.5 * excess.std() / math.sqrt(len(excess))
    assert excess.mean() > -error
    assert divergence is None or abs(excess.mean() - divergence) <= error


@pytest.mark.parametrize(("terms", "sign"), [(nmc_terms, 1.0), (pce_terms, -1.0)])
def test_nested_terms_err_to_their_side_by_half_the_relative_variance_of_the_average(terms, sign):
    channel = Channel(4_000)
    inner = channel.given(torch.randn(4_000, INNER).double())
    own = channel.given(channel.theta)
    more = () if terms is nmc_terms else (own,)
    excess = terms(own, inner.logsumexp(-1), INNER, *more) - channel.information
    assert sign * excess.mean() > 0
    if terms is nmc_terms:
        ratio = (inner - channel.marginal()[:, None]).exp()
        assert excess.mean().item() == pytest.approx((0.5 * ratio.var(1).mean() / INNER).item(), rel=0.5)


def test_nested_terms_in_closed_form():
    own, inner = torch.randn(7).double(), torch.randn(7, 4).double()
    sums = inner.logsumexp(-1)
    counted = (own.exp() + inner.exp().sum(-1)) / 5
    torch.testing.assert_close(pce_terms(own, sums, 4, own), own - counted.log())
    torch.testing.assert_close(nmc_terms(own, sums, 4), own - inner.exp().mean(-1).log())
    nothing = torch.full((7,), -torch.inf).double()
    torch.testing.assert_close(pce_terms(own, nothing, 4, own), torch.full((7,), math.log(5)).double())
    # Far out, where exponentials underflow.
    assert nmc_terms(torch.tensor([-1000.0]), torch.tensor([-1000.0 + math.log(2.0)]), 2).item() == 0.0


def test_importance_terms_in_closed_form():
    likelihood, own, inner = torch.randn(7).double(), torch.randn(7).double(), torch.randn(7, 4).double()
    counted = (own.exp() + inner.exp().sum(-1)) / 5
    torch.testing.assert_close(ace_terms(likelihood, own, inner), likelihood - counted.log())
    torch.testing.assert_close(vnmc_terms(likelihood, inner), likelihood - inner.exp().mean(-1).log())
    # Draws of no weight: below, the own one is left; above, nothing is.
    nothing = torch.full_like(inner, -torch.inf)
    torch.testing.assert_close(ace_terms(likelihood, own, nothing), likelihood - own + math.log(5))
    assert (vnmc_terms(likelihood, nothing) == torch.inf).all()

"""Censored readings: draws, densities far into the tails, and exact expected information gains."""

import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pyro_voed import Censored, Fresh, eig_flow, eig_marginal, eig_nmc
from tests.closed_forms import check_bounds


def model(low):
    def readings():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", Censored(dist.Normal(theta, 0.5), low))

    return readings


def exact_eig(low):
    """By quadrature over theta and y: the entropy of the readings less that given theta."""
    theta, y = numpy.linspace(-7.0, 7.0, 701), numpy.linspace(low, 9.0, 2_001)
    prior = scipy.stats.norm.pdf(theta) * (theta[1] - theta[0])
    width = y[1] - y[0]
    edges = numpy.full(y.shape, width)
    edges[[0, -1]] *= 0.5
    below = scipy.stats.norm.cdf(low, theta, 0.5)
    log_below = scipy.stats.norm.logcdf(low, theta, 0.5)
    given = 0.0
    marginal = numpy.zeros_like(y)
    for weight, centre in zip(prior, theta, strict=True):
        density = scipy.stats.norm.pdf(y, centre, 0.5)
        given += weight * (density * scipy.stats.norm.logpdf(y, centre, 0.5) * edges).sum()
        marginal += weight * density
    given += (prior * below * log_below).sum()
    mass = (prior * below).sum()
    with numpy.errstate(divide="ignore", invalid="ignore"):
        logs = numpy.where(marginal > 0, marginal * numpy.log(marginal), 0.0)
    return given - mass * math.log(mass) - (logs * edges).sum()


@pytest.mark.parametrize(("low", "known"), [(-1.0, 0.7502), (0.0, 0.5890), (1.0, 0.3186)])
def test_information_of_censored_readings_is_exact(low, known):
    exact = exact_eig(low)
    assert abs(exact - known) < 1e-4
    found = eig_nmc(model(low), "y", num_outer_samples=4_000, seed=0)
    # Beyond four standard errors with probability 6e-5; the bias of 4,000 inner draws is of their inverse.
    assert abs(found.eig - exact) < 4 * found.standard_error + 2e-3


def test_a_flow_conditions_on_censored_readings_and_no_density_of_them_is_learned():
    check_bounds(
        eig_flow(model(0.0), "y", training=Fresh(num_steps=200), num_samples=5_000, seed=0), exact_eig(0.0), gap=0.06
    )
    with pytest.raises(NotImplementedError, match=r"outcome y takes single values.* at 0, .*eig_flow"):
        eig_marginal(model(0.0), "y", seed=0)


BASES = {
    "normal": (dist.Normal(1.0, 2.0), scipy.stats.norm(1.0, 2.0), (-40.0, 60.0)),
    "log-normal": (dist.LogNormal(0.5, 0.7), scipy.stats.lognorm(0.7, scale=math.exp(0.5)), (1e-6, 1e4)),
    "Weibull": (dist.Weibull(2.0, 1.5), scipy.stats.weibull_min(1.5, scale=2.0), (1e-6, 40.0)),
    "exponential": (dist.Exponential(0.3), scipy.stats.expon(scale=1 / 0.3), (1e-6, 300.0)),
    "gamma": (dist.Gamma(2.0, 1.0), scipy.stats.gamma(2.0), (1e-3, 8.0)),
}


@pytest.mark.parametrize("name", BASES)
def test_density_and_both_tails(name):
    base, reference, (low, high) = BASES[name]
    censored = Censored(base, low, high)
    inside = torch.linspace(1.0, 3.0, 5)
    got = censored.log_prob(torch.cat([torch.tensor([low]), inside, torch.tensor([high])]))
    expected = [reference.logcdf(low), *reference.logpdf(inside.numpy()), reference.logsf(high)]
    numpy.testing.assert_allclose(got.numpy(), expected, rtol=2e-4)


def test_draws_stand_at_the_limits_as_often_as_they_should_and_shapes_are_those_of_the_base():
    centre = torch.tensor([[-1.0], [1.0]], requires_grad=True)
    censored = Censored(dist.Normal(centre, torch.ones(3)), -0.5, torch.tensor([0.5, 1.0, 2.0]))
    assert censored.batch_shape == (2, 3)
    assert censored.expand([4, 2, 3]).to_event(1).sample().shape == (4, 2, 3)
    torch.manual_seed(0)
    draws = censored.sample((20_000,))
    assert not draws.requires_grad
    below = dist.Normal(centre.detach(), 1.0).cdf(torch.tensor(-0.5)).expand(2, 3)
    # Six comparisons, each beyond five standard errors with probability 6e-7.
    assert (((draws == -0.5).float().mean(0) - below).abs() < 5 * (below * (1 - below) / 20_000).sqrt()).all()
    (gradient,) = torch.autograd.grad(censored.log_prob(draws[0]).sum(), centre)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Censored(dist.Normal(0.0, 1.0)), "low or high"),
        (lambda: Censored(dist.LogNormal(0.0, 1.0), -1.0), "in the support"),
        (lambda: Censored(dist.Normal(torch.zeros(2), 1.0).to_event(1), 0.0), "single numbers"),
    ],
)
def test_what_cannot_be_censored_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()

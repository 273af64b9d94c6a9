"""Design gradients of discrete draws against exact derivatives, and which sites need their score-function terms.

A mean of independent batches is compared in its standard errors: an exact one exceeds `MANY` = 4 with probability
6.3e-5 (with forty batches, 3e-4).
"""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Experiment, Fresh, barber_agakov, sample_joint
from pyro_voed.design import optimise_design
from pyro_voed.design.gradients import score_sites, score_terms
from pyro_voed.problems import finite, linear_gaussian

MANY = 4.0
BATCHES, BATCH_SIZE = 40, 1_000


def poisson():
    xi = pyro.param("xi", torch.tensor(2.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Gamma(3.0, 1.0))
    return pyro.sample("y", dist.Poisson(xi * theta))


def poisson_eig(exposure):
    theta = torch.linspace(1e-6, 40.0, 10_001).double()
    density = dist.Gamma(torch.tensor(3.0).double(), 1.0).log_prob(theta).exp()
    y = torch.arange(0.0, 250.0).double()
    log_p = dist.Poisson(exposure * theta[:, None]).log_prob(y)
    conditional = torch.trapezoid(density[:, None] * log_p.exp() * log_p, theta, dim=0).sum()
    marginal = dist.NegativeBinomial(torch.tensor(3.0).double(), exposure / (1 + exposure)).log_prob(y)
    return conditional - (marginal.exp() * marginal).sum()


def noisy_coin():
    """The coin is noise whose variance is largest at one half; the signal does not move."""
    xi = pyro.param("xi", torch.tensor(0.6), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    coin = pyro.sample("coin", dist.Bernoulli(xi))
    return pyro.sample("y", dist.Normal(theta + 6 * coin, 1.0))


def coin_of_a_mean():
    """The coin's parent moves with the design by a reparametrised draw, so the coin does too."""
    xi = pyro.param("xi", torch.tensor(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(xi + theta, 1.0))
    return pyro.sample("y", dist.Bernoulli(torch.sigmoid(mean)))


def finite_posterior(design):
    """The exact posterior of `finite`, which by the envelope theorem may be held fixed."""
    success = torch.tensor([design / 2, (design + 1) / 2])
    joint = torch.tensor([0.6, 0.4])[:, None] * torch.stack([1 - success, success], -1)  # (theta, y)
    table = (joint / joint.sum(0)).log()
    return lambda theta, context: table[theta[..., 0].long(), context[..., 0].long()]


def poisson_posterior(exposure):
    """Gamma(3 + y, 1 + xi), in the packed coordinate log theta."""
    rate = torch.tensor(1.0 + exposure)
    log_prob = lambda theta, y: dist.Gamma(3.0 + y, rate).log_prob(theta.exp()) + theta  # noqa: E731
    return lambda theta, context: log_prob(theta[..., 0], context[..., 0])


def information(eig, posterior):
    """The Barber-Agakov terms of an exact posterior, and the derivative of the information."""

    def case(xi):
        density = SimpleNamespace(log_prob=posterior(xi))
        design = torch.tensor(xi, dtype=torch.float64, requires_grad=True)
        return lambda sample: barber_agakov(sample, density), torch.autograd.grad(eig(design), design)[0]

    return case


def moment(power, exact):
    return lambda xi: (lambda sample: sample.y[..., 0] ** power, exact)


def slope_of_the_mean():
    """Of E[sigmoid(xi + sqrt(2) z)] at 0.5, by the trapezoidal rule."""
    z = torch.linspace(-8, 8, 2_001).double()
    slope = torch.sigmoid(0.5 + 2**0.5 * z) * torch.sigmoid(-0.5 - 2**0.5 * z)
    return torch.trapezoid(slope * dist.Normal(0.0, 1.0).log_prob(z).exp(), z).item()


BERNOULLI, POISSON = information(finite.exact_eig, finite_posterior), information(poisson_eig, poisson_posterior)
CASES = {
    # Model, design, the site that needs its score, terms and exact derivative.
    **{f"Bernoulli {xi}": (finite.finite(), xi, "y", BERNOULLI) for xi in (0.1, 0.5, 0.9)},
    **{f"Poisson {xi}": (poisson, xi, "y", POISSON) for xi in (0.5, 2.0)},
    # With rate xi theta, E[y ** 2] = 3 xi + 12 xi ** 2; the coin gives E[y] = 6 xi and E[y ** 2] = 2 + 36 xi.
    "second moment": (poisson, 2.0, "y", moment(2, 51.0)),
    "mean of a nuisance": (noisy_coin, 0.6, "coin", moment(1, 6.0)),
    "second moment of a nuisance": (noisy_coin, 0.6, "coin", moment(2, 36.0)),
    "mean of a child": (coin_of_a_mean, 0.5, "y", moment(1, slope_of_the_mean())),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_exact_derivative(name):
    model, xi, site, case = CASES[name]
    terms, exact = case(xi)
    experiment = Experiment(model, "y", "theta")
    scored = score_sites(experiment)
    assert scored == (site,)
    found, pathwise = [], []
    for _ in range(BATCHES):
        design = torch.tensor(xi, requires_grad=True)
        sample = sample_joint(experiment, BATCH_SIZE, {"xi": design}, score=scored)
        plain = terms(sample)
        found.append(torch.autograd.grad(score_terms(plain, sample.score).mean(), design)[0])
        pathwise.append(torch.autograd.grad((plain + 0.0 * design).mean(), design)[0])
    gradients = torch.stack(found).double()
    assert abs(gradients.mean() - exact) <= MANY * gradients.std() / math.sqrt(BATCHES)
    # Without the score-function part there is none at all, silently.
    assert abs(exact) > 0.005
    assert torch.stack(pathwise).abs().max() == 0.0


def test_score_terms_are_the_terms_less_the_mean_of_the_other_draws_in_the_gradient():
    terms, score = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    torch.testing.assert_close(score_terms(terms, score), terms)
    own, through_score = torch.autograd.grad(score_terms(terms, score).sum(), (terms, score))
    torch.testing.assert_close(own, torch.ones(5, 2))
    others = torch.stack([terms[[j for j in range(5) if j != i]].mean(0) for i in range(5)])
    torch.testing.assert_close(through_score, (terms - others).detach())
    # So a constant added to the terms leaves the gradient.
    (shifted,) = torch.autograd.grad(score_terms(terms + 100.0, score).sum(), score)
    torch.testing.assert_close(shifted, through_score, rtol=1e-3, atol=1e-4)


class SampleOnly(dist.Normal):
    """Normal draws without a density or a gradient."""

    has_rsample = False

    def log_prob(self, value):
        raise NotImplementedError


def model_of(outcome, start=1.5):
    """A model whose sites after `theta` are those of `outcome(xi, theta)`."""

    def model():
        xi = pyro.param("xi", torch.as_tensor(start), constraint=constraints.interval(0.0, 2.0))
        return outcome(xi, pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0)))

    return model


def normal_and(site):
    """A normal outcome, after another site."""

    def outcome(xi, theta):
        shift = site(xi, theta)
        return pyro.sample("y", dist.Normal(xi * theta + (0.0 if shift is None else shift), 1.0))

    return model_of(outcome)


def in_a_plate():
    xi = pyro.param("xi", torch.tensor([0.5, 1.0]))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0))
    with pyro.plate("trials", 2):
        pyro.sample("y", dist.Bernoulli(logits=xi * theta))


IDLE_COIN = normal_and(lambda xi, theta: pyro.sample("coin", dist.Bernoulli(0.3)))


@pytest.mark.parametrize(
    ("model", "outcomes", "expected"),
    [
        (normal_and(lambda xi, theta: pyro.sample("z", dist.Bernoulli(logits=xi * theta))), ["z", "y"], ("z",)),
        (normal_and(lambda xi, theta: pyro.sample("z", dist.Poisson(theta.exp()))), ["z", "y"], ()),
        (normal_and(lambda xi, theta: pyro.sample("u", SampleOnly(0.0, 1.0))), "y", ()),
        (IDLE_COIN, "y", ()),
        (in_a_plate, "y", ("y",)),
        (linear_gaussian.linear_gaussian(), "y", ()),
    ],
)
def test_sites_that_move_with_a_design_without_a_gradient_are_found(model, outcomes, expected):
    assert score_sites(Experiment(model, outcomes, "theta")) == expected


def no_design():
    return pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(0.0, 1.0)), 1.0))


def two_designs():
    pyro.param("idle", torch.tensor(0.5))
    return IDLE_COIN()


def only_samples():
    xi = pyro.param("xi", torch.tensor(0.5))
    return pyro.sample("y", SampleOnly(xi * pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0)), 1.0))


def through(change):
    return model_of(lambda xi, theta: pyro.sample("y", dist.Normal(change(xi) * theta, 1.0)))


REFUSED = {
    "an outcome that only samples": (only_samples, NotImplementedError, r"'y' \(SampleOnly\) depends on a design"),
    "an idle design": (two_designs, ValueError, r"\['idle'\].*search_spsa"),
    "a detached design": (through(lambda xi: xi.detach()), ValueError, r"\['xi'\].*search_grid"),
    "no design": (no_design, ValueError, "no design.*pyro.param"),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_gradient_can_climb_is_refused(name, vectorize):
    model, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        optimise_design(Experiment(model, "y", "theta", vectorize=vectorize), training=Fresh(num_steps=2))
    assert list(pyro.get_param_store().keys()) == []


def test_a_search_over_a_discrete_nuisance_climbs():
    # Without noise at either end, which are equally good, and with most at one half: the search starts near the middle,
    # and to which side it falls depends on what the density has learned by then.
    training = Fresh(num_steps=200, learning_rate=1e-2, design_learning_rate=0.1)
    best = optimise_design(noisy_coin, "y", "theta", training=training, num_samples=100, seed=0)
    assert abs(best.designs["xi"] - 0.5) > 0.25

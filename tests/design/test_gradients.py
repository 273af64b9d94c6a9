"""Design gradients of discrete draws against exact derivatives, and which sites need their score-function terms.

A mean of independent batches is compared in its standard errors: an exact one exceeds `MANY` = 4 with probability
6.3e-5 (with forty batches, 3e-4).
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_voed import Experiment, Fresh, sample_joint
from pyro_voed.design import optimise_design
from pyro_voed.design.gradients import score_sites, score_terms
from pyro_voed.estimators import barber_agakov
from pyro_voed.problems import finite, linear_gaussian

MANY = 4.0
BATCHES, BATCH_SIZE = 40, 1_000


class FinitePosterior(nn.Module):
    """The exact posterior of `finite` at one design, which by the envelope theorem may be held fixed."""

    def __init__(self, design):
        super().__init__()
        success = torch.tensor([design / 2, (design + 1) / 2])
        joint = torch.tensor([0.6, 0.4])[:, None] * torch.stack([1 - success, success], -1)  # (theta, y)
        self.log_posterior = (joint / joint.sum(0)).log()

    def log_prob(self, theta, context):
        return self.log_posterior[theta[..., 0].long(), context[..., 0].long()]


class PoissonPosterior(nn.Module):
    """Gamma(3 + y, 1 + xi), in the packed coordinate log theta."""

    def __init__(self, exposure):
        super().__init__()
        self.exposure = exposure

    def log_prob(self, theta, context):
        posterior = dist.Gamma(3.0 + context[..., 0], torch.tensor(1.0 + self.exposure))
        return posterior.log_prob(theta[..., 0].exp()) + theta[..., 0]


def poisson():
    xi = pyro.param("xi", torch.tensor(2.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Gamma(3.0, 1.0))
    pyro.sample("y", dist.Poisson(xi * theta))


def poisson_eig(exposure):
    theta = torch.linspace(1e-6, 40.0, 10_001).double()
    density = dist.Gamma(torch.tensor(3.0).double(), 1.0).log_prob(theta).exp()
    y = torch.arange(0.0, 250.0).double()
    log_p = dist.Poisson(exposure * theta[:, None]).log_prob(y)
    conditional = torch.trapezoid(density[:, None] * log_p.exp() * log_p, theta, dim=0).sum()
    marginal = dist.NegativeBinomial(torch.tensor(3.0).double(), exposure / (1 + exposure)).log_prob(y)
    return conditional - (marginal.exp() * marginal).sum()


CASES = {
    **{f"Bernoulli at {xi}": (finite.finite(), finite.exact_eig, FinitePosterior, xi) for xi in (0.1, 0.5, 0.9)},
    **{f"Poisson at {xi}": (poisson, poisson_eig, PoissonPosterior, xi) for xi in (0.5, 2.0)},
}


def gradients(name, *, scored=True):
    """Gradients of independent batches, `(BATCHES,)`."""
    model, _, density, xi = CASES[name]
    experiment, posterior = Experiment(model, "y"), density(xi)
    names = score_sites(experiment)
    assert names == ("y",)
    found = []
    for _ in range(BATCHES):
        design = torch.tensor(xi, requires_grad=True)
        sample = sample_joint(experiment, BATCH_SIZE, {"xi": design}, score=names)
        terms = barber_agakov(sample, posterior)
        terms = score_terms(terms, sample.score) if scored else terms + 0.0 * design
        (gradient,) = torch.autograd.grad(terms.mean(), design)
        found.append(gradient)
    return torch.stack(found)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_derivative_of_the_exact_information(name):
    _, exact_eig, _, xi = CASES[name]
    design = torch.tensor(xi, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(exact_eig(design), design)
    found = gradients(name)
    assert abs(found.mean() - exact) <= MANY * found.std() / math.sqrt(BATCHES)
    # Without the score-function part there is none at all, silently.
    assert exact.abs() > 0.005
    assert gradients(name, scored=False).abs().max() == 0.0


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


def slope_of_the_childs_mean():
    """Of E[sigmoid(xi + sqrt(2) z)] at 0.5, by the trapezoidal rule."""
    z = torch.linspace(-8, 8, 2_001).double()
    slope = torch.sigmoid(0.5 + 2**0.5 * z) * torch.sigmoid(-0.5 - 2**0.5 * z)
    return torch.trapezoid(slope * dist.Normal(0.0, 1.0).log_prob(z).exp(), z).item()


MOMENTS = [
    # With rate xi theta, theta of mean 3 and variance 3: E[y] = 3 xi and E[y ** 2] = 3 xi + 12 xi ** 2, at xi = 2.
    (poisson, 1, 3.0),
    (poisson, 2, 3.0 + 24 * 2.0),
    # E[y] = 6 xi, and the coin's variance gives E[y ** 2] = 2 + 36 xi.
    (bernoulli_nuisance, 1, 6.0),
    (bernoulli_nuisance, 2, 36.0),
    (discrete_child_of_a_child, 1, slope_of_the_childs_mean()),
]


@pytest.mark.parametrize(("model", "power", "exact"), MOMENTS)
def test_gradients_of_moments_match_closed_forms(model, power, exact):
    experiment = Experiment(model, "y", "theta")
    scored, found = score_sites(experiment), []
    for _ in range(BATCHES):
        xi = experiment.design_values["xi"].clone().requires_grad_()
        sample = sample_joint(experiment, 2_000, {"xi": xi}, score=scored)
        terms = score_terms(sample.y[..., 0] ** power, sample.score)
        found.append(torch.autograd.grad(terms.mean(), xi)[0])
    gradients = torch.stack(found).double()
    assert abs(gradients.mean() - exact) <= MANY * gradients.std() / math.sqrt(BATCHES)


def test_score_terms_have_the_value_of_the_terms_and_their_gradient_passes_through():
    terms, score = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3)
    torch.testing.assert_close(score_terms(terms, score), terms)
    (gradient,) = torch.autograd.grad(score_terms(terms, score).sum(), terms)
    torch.testing.assert_close(gradient, torch.ones(7, 3))


def test_the_baseline_is_the_mean_of_the_other_draws():
    terms, score = torch.randn(5, 2), torch.randn(5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(score_terms(terms, score).sum(), score)
    others = torch.stack([terms[[j for j in range(5) if j != i]].mean(0) for i in range(5)])
    torch.testing.assert_close(gradient, terms - others)
    # So a constant added to the terms leaves the gradient.
    (shifted,) = torch.autograd.grad(score_terms(terms + 100.0, score).sum(), score)
    torch.testing.assert_close(shifted, gradient, rtol=1e-3, atol=1e-4)


# --- which sites need it --------------------------------------------------------------------------------------------


def mixed_outcomes():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(xi * theta, 1.0))
    pyro.sample("z", dist.Bernoulli(logits=xi * theta))


def count_that_ignores_the_design():
    xi = pyro.param("xi", torch.tensor(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(xi * theta, 1.0))
    pyro.sample("z", dist.Poisson(theta.exp()))


def in_a_plate():
    xi = pyro.param("xi", torch.tensor([0.5, 1.0]))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0))
    with pyro.plate("trials", 2):
        pyro.sample("y", dist.Bernoulli(logits=xi * theta))


@pytest.mark.parametrize(
    ("model", "outcomes", "targets", "expected"),
    [
        (mixed_outcomes, ["y", "z"], "theta", ("z",)),
        (count_that_ignores_the_design, ["y", "z"], "theta", ()),
        (bernoulli_nuisance, "y", "theta", ("coin",)),
        (discrete_child_of_a_child, "y", "theta", ("y",)),
        (in_a_plate, "y", "theta", ("y",)),
        (linear_gaussian.linear_gaussian(), "y", "theta", ()),
    ],
)
def test_sites_that_move_with_a_design_without_a_gradient_are_found(model, outcomes, targets, expected):
    assert score_sites(Experiment(model, outcomes, targets)) == expected


class SampleOnly(dist.TorchDistribution):
    """Normal draws without a density or a gradient."""

    arg_constraints = {}  # noqa: RUF012 (torch's own convention)
    support = constraints.real
    has_rsample = False

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def sample(self, sample_shape=()):
        return (self.loc + torch.randn(torch.Size(sample_shape) + self.batch_shape)).detach()

    def expand(self, batch_shape, _instance=None):
        return SampleOnly(self.loc.expand(batch_shape))

    def log_prob(self, value):
        raise NotImplementedError


def only_samples(role):
    def model():
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
        moving = xi * theta if role != "idle" else torch.zeros(())
        if role == "outcome":
            return pyro.sample("y", SampleOnly(moving))
        u = pyro.sample("u", SampleOnly(moving))
        return pyro.sample("y", dist.Normal(u + xi * theta, 1.0))

    return model


def test_a_site_that_only_samples_and_ignores_the_design_is_no_trouble():
    assert score_sites(Experiment(only_samples("idle"), "y", "theta")) == ()


def reaching_nothing(through):
    def model():
        pyro.param("idle", torch.tensor(0.5))
        xi = pyro.param("xi", torch.tensor(1.5))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(through(xi) * theta, 1.0))

    return model


def no_design():
    return pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(0.0, 1.0)), 1.0))


REFUSED = {
    "an outcome that only samples": (
        only_samples("outcome"),
        NotImplementedError,
        [r"'y' \(SampleOnly\)", "search_spsa"],
    ),
    "a nuisance that only samples": (
        only_samples("nuisance"),
        NotImplementedError,
        [r"'u' \(SampleOnly\)", "search_grid"],
    ),
    "an idle design": (reaching_nothing(lambda xi: xi), ValueError, [r"\['idle'\]", "search_grid"]),
    "a detached design": (reaching_nothing(lambda xi: xi.detach()), ValueError, [r"\['idle', 'xi'\]", "search_spsa"]),
    "a rounded design": (reaching_nothing(lambda xi: xi.round()), ValueError, [r"\['idle', 'xi'\]", "search_grid"]),
    "no design": (no_design, ValueError, ["no design", "pyro.param"]),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_gradient_can_climb_is_refused(name, vectorize):
    model, error, words = REFUSED[name]
    for word in words:
        with pytest.raises(error, match=word):
            optimise_design(Experiment(model, "y", "theta", vectorize=vectorize), training=Fresh(num_steps=2))
    assert list(pyro.get_param_store().keys()) == []


# --- search ---------------------------------------------------------------------------------------------------------


def threshold():
    """Above or below? The best place to ask is the middle of the prior."""
    xi = pyro.param("xi", torch.tensor(2.2), constraint=constraints.interval(-3.0, 3.0))
    theta = pyro.sample("theta", dist.Normal(0.5, 1.0))
    pyro.sample("y", dist.Bernoulli(logits=4.0 * (theta - xi)))


def threshold_eig(xi):
    theta = torch.linspace(-6.0, 7.0, 5_001).double()
    density = dist.Normal(0.5, 1.0).log_prob(theta).exp()
    success = torch.sigmoid(4.0 * (theta - xi))
    entropy = lambda p: torch.special.entr(p) + torch.special.entr(1 - p)  # noqa: E731
    return entropy(torch.trapezoid(density * success, theta)) - torch.trapezoid(density * entropy(success), theta)


def search(model, num_steps, design_rate):
    training = Fresh(num_steps=num_steps, learning_rate=1e-2, design_learning_rate=design_rate)
    return optimise_design(model, "y", "theta", training=training, num_samples=4_000, seed=0, progress=False)


def test_the_search_finds_the_best_place_of_a_binary_outcome():
    best = search(threshold, 300, 5e-2)
    found = threshold_eig(best.designs["xi"].double())
    assert found >= threshold_eig(0.5) - 0.01
    assert threshold_eig(2.2) < threshold_eig(0.5) - 0.15
    assert best.eig <= found + MANY * best.standard_error


def test_searches_over_discrete_draws_climb():
    assert search(poisson, 100, 0.1).designs["xi"] > 3.0  # more exposure, more information
    # Without noise at either end, which are equally good, and with most at one half: the search starts near the middle,
    # and to which side it falls depends on what the density has learned by then.
    pyro.clear_param_store()
    assert abs(search(bernoulli_nuisance, 150, 0.1).designs["xi"] - 0.5) > 0.25


def test_a_discrete_nuisance_that_the_design_does_not_move_is_fine():
    def model():
        xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        coin = pyro.sample("coin", dist.Bernoulli(0.3))
        return pyro.sample("y", dist.Normal(xi * theta + coin, 1.0))

    assert score_sites(Experiment(model, "y", "theta")) == ()
    assert search(model, 100, 0.1).designs["xi"] > 1.0

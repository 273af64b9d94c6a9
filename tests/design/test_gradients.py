"""Design gradients of discrete outcomes against derivatives of the exact information.

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

from pyro_voed import optimise_design, resolve, sample_joint
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
    experiment, posterior = resolve(model, "y"), density(xi)
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


def test_the_value_is_that_of_the_terms():
    terms, score = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    torch.testing.assert_close(score_terms(terms, score), terms)


def test_the_gradient_of_the_terms_themselves_passes_through():
    terms, score = torch.randn(7, requires_grad=True), torch.randn(7)
    (gradient,) = torch.autograd.grad(score_terms(terms, score).sum(), terms)
    torch.testing.assert_close(gradient, torch.ones(7))


def test_the_baseline_is_the_mean_of_the_other_draws():
    terms, score = torch.randn(5, 2), torch.randn(5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(score_terms(terms, score).sum(), score)
    others = torch.stack([terms[[j for j in range(5) if j != i]].mean(0) for i in range(5)])
    torch.testing.assert_close(gradient, terms - others)


def test_a_constant_added_to_the_terms_leaves_the_gradient():
    score = torch.randn(9, requires_grad=True)
    terms = torch.randn(9)
    first, second = (torch.autograd.grad(score_terms(terms + c, score).mean(), score)[0] for c in (0.0, 100.0))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


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


def discrete_nuisance():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    broken = pyro.sample("broken", dist.Bernoulli(xi))
    pyro.sample("y", dist.Normal(theta * (1 - broken), 1.0))


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
        (discrete_nuisance, "y", "theta", ("broken",)),
        (in_a_plate, "y", "theta", ("y",)),
        (linear_gaussian.linear_gaussian(), "y", "theta", ()),
    ],
)
def test_sites_that_move_with_a_design_without_a_gradient_are_found(model, outcomes, targets, expected):
    assert score_sites(resolve(model, outcomes, targets)) == expected


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


@pytest.mark.parametrize("role", ["outcome", "nuisance"])
def test_sites_that_only_sample_and_move_with_a_design_are_refused(role):
    def model():
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
        if role == "outcome":
            pyro.sample("y", SampleOnly(xi * theta))
        else:
            u = pyro.sample("u", SampleOnly(xi * theta))
            pyro.sample("y", dist.Normal(u + xi, 1.0))

    site = "y" if role == "outcome" else "u"
    with pytest.raises(NotImplementedError, match=rf"'{site}' \(SampleOnly\) depends on a design.*eig_flow"):
        optimise_design(model, "y", "theta", num_steps=2, progress=False)


def test_a_site_that_only_samples_and_ignores_the_design_is_no_trouble():
    def model():
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
        u = pyro.sample("u", SampleOnly(torch.zeros(())))
        pyro.sample("y", dist.Normal(xi * theta + u, 1.0))

    assert score_sites(resolve(model, "y", "theta")) == ()


def test_a_design_that_reaches_nothing_is_refused():
    def model():
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=theta * xi.detach()))

    with pytest.raises(ValueError, match=r"no gradient flows from design \['xi'\]"):
        score_sites(resolve(model, "y"))


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


def test_the_search_finds_the_best_place_of_a_binary_outcome():
    best = optimise_design(
        threshold, "y", num_steps=300, learning_rate=1e-2, design_learning_rate=5e-2, num_samples=4_000, seed=0,
        progress=False,
    )  # fmt: skip
    found = threshold_eig(best.designs["xi"].double())
    assert found >= threshold_eig(0.5) - 0.01
    assert threshold_eig(2.2) < threshold_eig(0.5) - 0.15
    assert best.eig <= found + MANY * best.standard_error

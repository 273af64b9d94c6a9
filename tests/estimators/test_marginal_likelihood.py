"""Two learned outcome densities: near the exact value within noise and a stated gap, on either side.

The gap is what short training may leave, and is generous; the noise is 4.5 standard errors, exceeded by a right answer
7 times in a million, seeds fixed. The slow tests train to the end and allow 0.02 nats.
"""

import functools

import pytest
import torch

from pyro_voed import Fresh
from pyro_voed.bounds import marginal_likelihood_terms
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.estimators.building import build_density
from pyro_voed.estimators.marginal_likelihood import OutcomeDensities, eig_marginal_likelihood
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.problems.finite import DEFAULT_EIG as FINITE_EIG
from pyro_voed.problems.finite import finite
from pyro_voed.problems.implicit_toy import DEFAULT_EIG as IMPLICIT_EIG
from pyro_voed.problems.implicit_toy import exact_eig as implicit_eig
from pyro_voed.problems.implicit_toy import implicit_toy
from pyro_voed.problems.linear_gaussian import (
    DEFAULT_DESIGN,
    DEFAULT_EIG,
    DEPENDENT_NUISANCE_EIG,
    dependent_nuisance,
    linear_gaussian,
)

THRESHOLD = 4.5
SMALL = functools.partial(AffineCouplingFlow, num_transforms=1, hidden_dim=16, num_hidden=1)
QUICK = {
    "likelihood_density": SMALL,
    "marginal_density": SMALL,
    "training": Fresh(num_steps=100, learning_rate=1e-2),
    "num_samples": 4_000,
    "seed": 0,
}
CASES = {
    "linear_gaussian": (linear_gaussian, "theta", DEFAULT_EIG),
    "dependent_nuisance": (dependent_nuisance, "theta", DEPENDENT_NUISANCE_EIG),
    "finite": (finite, "theta", FINITE_EIG),
    "implicit_toy": (implicit_toy, "theta", IMPLICIT_EIG),
    "independence": (lambda: linear_gaussian(torch.zeros(3, 2)), "theta", 0.0),
}
# The others need splines: an affine flow cannot bend to sinh, and uniform noise on two outcomes is no Gaussian.
QUICK_GAPS = {"linear_gaussian": 0.05, "dependent_nuisance": 0.05, "independence": 0.05}


def check_near(result, exact, gap):
    assert (abs(result.eig - exact) < gap + THRESHOLD * result.standard_error).all(), f"{result.eig}, exact {exact}"


@pytest.mark.parametrize("name", QUICK_GAPS)
@pytest.mark.filterwarnings("ignore:target .* never reaches the outcome")
def test_quick_fits_are_near(name):
    make, target, exact = CASES[name]
    result = eig_marginal_likelihood(make(), "y", target, **QUICK)
    check_near(result, exact, QUICK_GAPS[name])
    assert result.bound == "neither"
    assert result.estimator == "eig_marginal_likelihood"


@pytest.mark.parametrize(("name", "gap", "nuisance"), [("implicit_toy", 0.15, ("e",)), ("finite", 0.08, ())])
def test_implicit_models_with_nuisance_and_discrete_outcomes(name, gap, nuisance):
    make, target, exact = CASES[name]
    training = Fresh(num_steps=60, learning_rate=1e-2)
    result = eig_marginal_likelihood(make(), "y", target, training=training, seed=0)
    check_near(result, exact, gap)
    assert result.nuisance_labels == nuisance


def test_terms_of_the_exact_densities_average_to_the_exact_value():
    class Exact(torch.nn.Module):
        def __init__(self, given_targets):
            super().__init__()
            self.given_targets = given_targets

        def log_prob(self, y, context):
            design = torch.tensor(DEFAULT_DESIGN)
            if self.given_targets:
                return torch.distributions.Normal(context @ design.mT, 1.0).log_prob(y).sum(-1)
            covariance = torch.eye(3) + design @ torch.diag(torch.tensor([1.0, 2.25])) @ design.mT
            return torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(y)

    sample = sample_joint(Experiment(linear_gaussian(), "y"), 20_000)
    terms = marginal_likelihood_terms(*OutcomeDensities(Exact(True), Exact(False)).log_probs(sample))
    assert abs(terms.mean() - DEFAULT_EIG) < THRESHOLD * terms.std() / 20_000**0.5


@pytest.mark.filterwarnings("ignore:.*designs are indistinguishable:UserWarning")
def test_a_batch_of_designs_and_training_further():
    common = {"designs": {"xi": torch.tensor([0.5, 1.5])}, "num_samples": 500, "seed": 0}
    first = eig_marginal_likelihood(implicit_toy(), "y", "theta", training=Fresh(num_steps=30), **common)
    densities = first.density
    common |= {"likelihood_density": densities.given_targets, "marginal_density": densities.marginal}
    again = eig_marginal_likelihood(implicit_toy(), "y", "theta", training=Fresh(num_steps=0), **common)
    assert first.eig.shape == (2,)
    noise = torch.hypot(first.standard_error, again.standard_error)
    assert ((again.eig - first.eig).abs() < THRESHOLD * noise).all()
    assert again.history is None
    assert first.history.num_steps == 30
    # A design between two ends is seen as its place and its angle there.
    assert (densities.marginal.context_dim, densities.given_targets.context_dim) == (2, 3)


def test_a_density_of_other_dimensions_is_refused():
    values = torch.randn(10, 2)
    wrong = build_density(SMALL, values, values, num_designs=0, summary=None)
    with pytest.raises(ValueError, match="trained for another model"):
        eig_marginal_likelihood(implicit_toy(), "y", "theta", **{**QUICK, "marginal_density": wrong})


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:target .* never reaches the outcome")
def test_trained_to_the_end_they_are_within_a_fiftieth_of_a_nat(name):
    make, target, exact = CASES[name]
    check_near(eig_marginal_likelihood(make(), "y", target, seed=1), exact, 0.02)


@pytest.mark.slow
def test_one_pair_of_densities_serves_a_batch_of_designs():
    designs = torch.tensor([0.25, 0.75, 1.5])
    result = eig_marginal_likelihood(implicit_toy(), "y", "theta", designs={"xi": designs}, seed=1)
    check_near(result, implicit_eig(designs), 0.03)

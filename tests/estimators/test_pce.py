"""Prior contrastive estimation as an objective."""

import math

import pyro
import pyro.distributions as dist
import pytest

from pyro_voed import Experiment, eig_pce, prior_contrastive
from pyro_voed.experiment.sampling import draw_joint
from tests.closed_forms import scalar


def objective_terms(model, num):
    experiment = Experiment(model, "y")
    return prior_contrastive(draw_joint(experiment, num, experiment.design_values, pairs=True), None)


def test_the_objective_gives_the_terms_that_the_estimate_averages():
    # Re-used contrasts are as many in both, so that the biases are equal too.
    terms, result = objective_terms(scalar, 500), eig_pce(scalar, "y", num_outer_samples=500, seed=0)
    error = math.hypot(terms.std() / math.sqrt(500), result.standard_error)
    assert abs(terms.mean() - result.eig) <= 4.5 * error
    assert prior_contrastive.bound == "lower"


@pytest.mark.parametrize("num", [2, 16])
def test_no_term_exceeds_the_logarithm_of_the_batch(num):
    def sharp():
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(0.0, 1.0)), 1e-4))

    terms = objective_terms(sharp, num)
    assert terms.max() <= math.log(num) + 1e-5
    assert terms.mean() > math.log(num) - 0.3

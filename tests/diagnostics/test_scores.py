"""Scores against closed forms of a posterior that is known exactly; thresholds: see `cases`."""

import math

import pytest
import torch

from pyro_voed import Fresh
from pyro_voed.diagnostics.scores import negative_log_posterior
from pyro_voed.diagnostics.simulated import SimulatedPosteriors, simulate_posteriors
from pyro_voed.estimators import eig_flow
from pyro_voed.problems.linear_gaussian import linear_gaussian
from tests.diagnostics.cases import THRESHOLD, conjugate, near

ENTROPY = 0.5 * math.log(math.pi * math.e)  # of a normal with variance 1/2


def test_the_exact_posterior_scores_its_entropy_with_an_error_that_covers():
    results = [negative_log_posterior(conjugate(200, 1, dim=3)) for _ in range(200)]
    covered = sum(abs(result.value - 3 * ENTROPY) < 1.96 * result.standard_error for result in results)
    assert near(covered / 200, 0.95, 200)
    assert results[0].standard_error == pytest.approx(math.sqrt(3 * 0.5 / 200), rel=0.3)


def test_a_wrong_one_scores_more_by_the_divergence():
    torch.manual_seed(1)
    right = conjugate(2000, 1, dim=3)
    torch.manual_seed(1)
    wrong = conjugate(2000, 1, dim=3, scale=2.0)
    difference = negative_log_posterior(wrong).value - negative_log_posterior(right).value
    divergence = 3 * (math.log(2) + 1 / 8 - 1 / 2)
    error = (wrong.log_density - right.log_density).std().item() / math.sqrt(2000)
    assert abs(difference - divergence) < THRESHOLD * error


def test_a_trained_flow_does_not_beat_the_entropy():
    result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
    score = negative_log_posterior(simulate_posteriors(result, 200, 20, seed=0))
    # Two normals of variances 1/2 and 9/22.
    assert score.value > 2 * ENTROPY + 0.5 * math.log(9 / 11) - THRESHOLD * score.standard_error
    assert str(score).startswith(f"negative log posterior {score.value:.4f} +- ")


def test_what_cannot_be_scored_is_refused():
    truths, draws = torch.randn(10, 2), torch.randn(10, 5, 2)
    with pytest.raises(ValueError, match="expected log densities of the truths"):
        negative_log_posterior(SimulatedPosteriors(truths, draws, ("a", "b")))
    infinite = torch.zeros(10).index_fill(0, torch.tensor([3]), -math.inf)
    with pytest.raises(ArithmeticError, match="log densities of 1 of 10 truths are not finite"):
        negative_log_posterior(SimulatedPosteriors(truths, draws, ("a", "b"), log_density=infinite))
    with pytest.raises(ValueError, match="at least 2 experiments"):
        negative_log_posterior(SimulatedPosteriors(truths[:1], draws[:1], ("a", "b"), log_density=torch.zeros(1)))

"""Scores against closed forms of a posterior that is known exactly.

theta ~ N(0, s^2) and y ~ N(theta, 1) give theta | y ~ N(c y, c) with c = s^2 / (1 + s^2). Thresholds are four standard
errors as stated, which a right estimate exceeds 1 time in 16,000; seeds are fixed besides.
"""

import math

import pytest
import torch

from pyro_voed import Fresh
from pyro_voed.diagnostics.recovery import recovery
from pyro_voed.diagnostics.scores import negative_log_posterior
from pyro_voed.diagnostics.simulated import SimulatedPosteriors, simulate_posteriors
from pyro_voed.estimators import eig_flow
from pyro_voed.problems.linear_gaussian import linear_gaussian

THRESHOLD = 4.0
SCALES = torch.tensor([0.5, 1.0, 3.0], dtype=torch.double)


def exact_posteriors(num_simulations, num_draws, bias=0.0, widening=1.0):
    truths = SCALES * torch.randn(num_simulations, 3, dtype=torch.double)
    y = truths + torch.randn_like(truths)
    shrinkage = SCALES**2 / (1 + SCALES**2)
    mean, scale = shrinkage * y + bias, widening * shrinkage.sqrt()
    draws = mean[:, None] + scale * torch.randn(num_simulations, num_draws, 3, dtype=torch.double)
    log_density = torch.distributions.Normal(mean, scale).log_prob(truths).sum(-1)
    return SimulatedPosteriors(truths, draws, ("a", "b", "c"), y, log_density)


def test_negative_log_posterior_of_the_exact_posterior_is_its_entropy():
    result = negative_log_posterior(exact_posteriors(2000, 1))
    entropy = 0.5 * (2 * math.pi * math.e * SCALES**2 / (1 + SCALES**2)).log().sum().item()
    assert abs(result.value - entropy) < THRESHOLD * result.standard_error
    assert result.standard_error == pytest.approx(math.sqrt(3 * 0.5 / 2000), rel=0.1)


def test_negative_log_posterior_of_a_wrong_one_is_larger_by_the_divergence():
    torch.manual_seed(1)
    right = exact_posteriors(2000, 1)
    torch.manual_seed(1)
    wrong = exact_posteriors(2000, 1, widening=2.0)
    difference = negative_log_posterior(wrong).value - negative_log_posterior(right).value
    divergence = 3 * (math.log(2) + 1 / 8 - 1 / 2)
    error = (wrong.log_density - right.log_density).std().item() / math.sqrt(2000)
    assert abs(difference - divergence) < THRESHOLD * error


def test_nrmse_of_the_exact_posterior_is_what_the_experiment_leaves():
    result = recovery(exact_posteriors(2000, 100))
    exact = (1 / (1 + SCALES**2)).sqrt() * math.sqrt(1 + 1 / 100)
    assert ((result.nrmse - exact).abs() < THRESHOLD * result.nrmse_error).all()


def test_nrmse_counts_bias_and_knows_no_units():
    biased = exact_posteriors(2000, 100, bias=0.7)
    result = recovery(biased)
    exact = (1 / (1 + SCALES**2) * (1 + 1 / 100) + 0.7**2 / SCALES**2).sqrt()
    assert ((result.nrmse - exact).abs() < THRESHOLD * result.nrmse_error).all()
    elsewhere = recovery(SimulatedPosteriors(1e3 * biased.truths + 5.0, 1e3 * biased.draws + 5.0, biased.columns))
    assert torch.allclose(elsewhere.nrmse, result.nrmse)
    assert torch.allclose(elsewhere.nrmse_error, result.nrmse_error)


def test_stated_errors_cover_repeats():
    # 200 repeats of three columns: the share covered by a 95 % interval has standard error 0.009, as does the score's.
    covered, score_covered = [], []
    entropy = 0.5 * (2 * math.pi * math.e * SCALES**2 / (1 + SCALES**2)).log().sum().item()
    exact = (1 / (1 + SCALES**2)).sqrt() * math.sqrt(1 + 1 / 50)
    for _ in range(200):
        simulated = exact_posteriors(200, 50)
        result, score = recovery(simulated), negative_log_posterior(simulated)
        covered.append(((result.nrmse - exact).abs() < 1.96 * result.nrmse_error).double().mean().item())
        score_covered.append(abs(score.value - entropy) < 1.96 * score.standard_error)
    assert abs(sum(covered) / 200 - 0.95) < THRESHOLD * math.sqrt(0.05 * 0.95 / 600)
    assert abs(sum(score_covered) / 200 - 0.95) < THRESHOLD * math.sqrt(0.05 * 0.95 / 200)


def test_perfect_recovery_has_no_error():
    truths = torch.randn(50, 2)
    result = recovery(SimulatedPosteriors(truths, truths[:, None].expand(-1, 4, -1), ("a", "b")))
    assert result.nrmse.tolist() == result.nrmse_error.tolist() == [0.0, 0.0]


def test_scores_of_a_trained_flow():
    result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
    simulated = simulate_posteriors(result, 200, 20, seed=0)
    score = negative_log_posterior(simulated)
    # No density beats the posterior's entropy: two normals of variances 1/2 and 9/22.
    entropy = 0.5 * math.log((2 * math.pi * math.e) ** 2 * 0.5 * 9 / 22)
    assert score.value > entropy - THRESHOLD * score.standard_error
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

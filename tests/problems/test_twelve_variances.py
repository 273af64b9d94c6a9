"""Twelve variances: the quadratures against closed forms, other quadratures and simulation."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2

from pyro_voed import Experiment, eig_nmc, sample_joint
from pyro_voed.problems import twelve_variances as tv

Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""


def simulated(num_samples, num_rows=10, num_variables=12):
    experiment = Experiment(tv.twelve_variances(num_rows, num_variables), "y")
    values = sample_joint(experiment, num_samples).values
    return values["variance"], values["y"]


def log_unnormalised(v, sum_of_squares, num_rows):
    return -0.5 * num_rows * math.log(v) - 0.5 * sum_of_squares / v


@pytest.mark.parametrize(("num_rows", "eig"), tv.EIG_OF_ONE.items())
def test_known_values(num_rows, eig):
    assert tv.exact_eig(num_rows, 1).item() == pytest.approx(eig, abs=5e-5)
    assert tv.exact_eig(num_rows).item() == pytest.approx(12 * eig, abs=6e-4)
    assert tv.exact_correlation(num_rows).item() == pytest.approx(tv.CORRELATION[num_rows], abs=5e-4)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 263, 5_000])
@pytest.mark.parametrize("quantity", [lambda n: tv.exact_eig(n, 1), tv.exact_correlation], ids=["eig", "correlation"])
def test_quadratures_do_not_change_with_more_nodes(num_rows, quantity, monkeypatch):
    coarse = quantity(num_rows).item()
    monkeypatch.setattr(tv, "_NUM_NODES", 130)
    assert coarse == pytest.approx(quantity(num_rows).item(), abs=2e-6)


# At sums of squares that hardly occur the innermost integral is too peaked for an estimate of its error.
@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
def test_the_information_is_that_of_an_adaptive_quadrature():
    # One variance, five rows: E[log p(S | v) - log p(S)] over v and the chi-square of S / v, one integral in another.
    def log_normaliser(sum_of_squares):
        integrand = lambda v: math.exp(log_unnormalised(v, sum_of_squares, 5))  # noqa: E731
        return math.log(quad(integrand, 0, 1, points=[min(0.9, sum_of_squares / 5)], epsrel=1e-4)[0])

    def given(v):
        return quad(lambda c: chi2.pdf(c, 5) * log_normaliser(v * c), 0.01, 35, epsabs=1e-4)[0]

    # In t = v ** (1/3) the integrand is smooth.
    information = -quad(lambda t: 3 * t**2 * given(t**3), 0, 1, epsabs=5e-3, limit=50)[0]
    assert tv.exact_eig(5, 1).item() == pytest.approx(information, abs=5e-3)


@pytest.mark.parametrize("num_rows", [1, 2, 10, 263])
@pytest.mark.parametrize("size", [1e-4, 0.3, 1.0, 3.0])
def test_moments_are_those_of_an_adaptive_quadrature(num_rows, size):
    y = torch.full((num_rows, 1), math.sqrt(size), dtype=torch.double)
    mode = min(size, 1.0)
    highest = log_unnormalised(mode, num_rows * size, num_rows)
    points = sorted({min(factor * mode, 1.0) for factor in (0.3, 0.7, 1.0, 1.5, 4.0, 20.0)})

    def moment(power):
        inside = [point for point in points if point < 1.0]
        integrand = lambda v: v**power * math.exp(log_unnormalised(v, num_rows * size, num_rows) - highest)  # noqa: E731
        return quad(integrand, 0.0, 1.0, points=inside or None, limit=200, epsabs=0.0)[0]

    total, mean, square = moment(0), moment(1), moment(2)
    assert tv.exact_posterior_mean(y).item() == pytest.approx(mean / total, rel=1e-5)
    assert tv.exact_posterior_variance(y).item() == pytest.approx(square / total - (mean / total) ** 2, rel=1e-4)
    v = torch.tensor([0.7 * mode], dtype=torch.double)
    expected = log_unnormalised(v.item(), num_rows * size, num_rows) - highest - math.log(total)
    assert tv.exact_log_posterior(v, y).item() == pytest.approx(expected, abs=1e-4)


def test_posterior_means_leave_no_residual_in_simulations():
    variance, y = simulated(2_000)
    residual = (variance - tv.exact_posterior_mean(y)).flatten()
    for test in (torch.ones_like(residual), tv.exact_posterior_mean(y).flatten()):
        product = residual * test
        assert abs(product.mean()) < Z_MAX * product.std() / math.sqrt(len(product))
    excess = residual.square() - tv.exact_posterior_variance(y).flatten()
    assert abs(excess.mean()) < Z_MAX * excess.std() / math.sqrt(len(excess))
    correlation = torch.corrcoef(torch.stack([variance.flatten(), tv.exact_posterior_mean(y).flatten()]))[0, 1]
    assert abs(correlation - tv.exact_correlation(10)) < Z_MAX / math.sqrt(len(residual))


def test_the_log_posterior_gains_the_information_on_average():
    # The prior density of the variances is one.
    variance, y = simulated(4_000)
    gain = tv.exact_log_posterior(variance, y)
    assert gain.shape == (4_000,)
    assert abs(gain.mean() - tv.exact_eig(10)) < Z_MAX * gain.std() / math.sqrt(4_000)


def test_the_density_is_zero_outside_the_prior():
    outside = torch.tensor([[0.5, 1.5], [-0.1, 0.5]])
    assert tv.exact_log_posterior(outside, torch.ones(5, 2)).tolist() == [-math.inf, -math.inf]


def test_nested_monte_carlo_agrees():
    estimate = eig_nmc(tv.twelve_variances(10, 1), "y", num_outer_samples=2_000, num_inner_samples=400, seed=0)
    # The bias is half the variance of the inner mean's ratio, below 0.02 here.
    assert abs(estimate.eig - tv.exact_eig(10, 1)) < Z_MAX * estimate.standard_error + 0.02


def test_batches_agree_with_their_members():
    _, y = simulated(6, 7, 3)
    batch = y.reshape(2, 3, 7, 3)
    means = tv.exact_posterior_mean(batch)
    assert means.shape == (2, 3, 3)
    torch.testing.assert_close(means[1, 2], tv.exact_posterior_mean(batch[1, 2]))

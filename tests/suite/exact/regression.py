"""Exact values of the regressions, closed forms all of them."""

import numpy as np
from scipy.special import digamma, gammaln

from tests.suite.quadrature import linear_gaussian
from tests.suite.twins import regression as twin


def of_normal_inverse_gamma(covariance, shape, rate, *, with_coefficients):
    """Return the information about the precision, or about precision and coefficients together.

    Given the precision the outcome is normal with `covariance` over the precision, given both normal with independent
    noise; the precision has a gamma prior, so the outcome is multivariate t.
    """
    num, freedom = len(covariance), 2 * shape
    half, together = freedom / 2, (freedom + num) / 2
    log_det = np.linalg.slogdet(covariance)[1]
    marginal = 0.5 * (log_det + num * np.log(rate / shape)) + 0.5 * num * np.log(freedom * np.pi)
    marginal += gammaln(half) - gammaln(together) + together * (digamma(together) - digamma(half))
    mean_log_precision = digamma(shape) - np.log(rate)
    given = 0.5 * num * (np.log(2 * np.pi * np.e) - mean_log_precision)
    return float(marginal - given - (0.0 if with_coefficients else 0.5 * log_det)), 1e-8


def calibration_line():
    return linear_gaussian(twin.LINE, np.array([0.5, 2.0]), 1.5**2 * np.eye(6), 1)


def badly_scaled():
    return linear_gaussian(twin.POWERS, np.array([100.0, 1.0, 0.1, 0.01]), 0.01**2 * np.eye(6))


def low_noise_plane():
    return linear_gaussian(twin.PLANE, np.ones(3), 0.00093**2 * np.eye(4))


def cubic():
    return linear_gaussian(twin.CUBIC, np.array([1.0, 1.0, 2.0, 3.0]), 0.4**2 * np.eye(8))


def precision_of_a_line():
    return of_normal_inverse_gamma(twin.CONJUGATE, 3.0, 2.0, with_coefficients=False)


def normal_inverse_gamma():
    return of_normal_inverse_gamma(twin.CONJUGATE, 3.0, 2.0, with_coefficients=True)


def two_thermometers():
    return linear_gaussian(twin.BATH, np.array([0.1, 10.0]), 0.01**2 * np.eye(2), 1)


def thirty_nats():
    return linear_gaussian(twin.BALANCE, np.ones(6), 0.0067**2 * np.eye(6))


def tiny_information():
    return float(0.5 * np.log1p(0.01414**2)), 1e-12


def placebo():
    return 0.0, 1e-12


def matrix_coefficients():
    return linear_gaussian(twin.MATRIX, np.ones(6), np.diag(np.tile([0.25, 1.0], 4)))


def hundred_readings():
    return of_normal_inverse_gamma(np.eye(100) + 1.0, 4.0, 4.0, with_coefficients=True)


EXACT = {
    function.__name__: function
    for function in (
        calibration_line, badly_scaled, low_noise_plane, cubic, precision_of_a_line, normal_inverse_gamma,
        two_thermometers, thirty_nats, tiny_information, placebo, matrix_coefficients, hundred_readings,
    )
}  # fmt: skip

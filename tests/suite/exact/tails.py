"""Exact values of heavy tails, wild scales and readings that went wrong."""

import numpy as np
from scipy import integrate, stats
from scipy.special import entr, ndtr

from tests.suite.quadrature import averaged, linear_gaussian, summed
from tests.suite.twins import tails as twin


def cauchy_location():
    return averaged(twin.TWINS["cauchy_location"], ("theta",), {"theta": 161}, log2_draws=14)


def student_t_line():
    return averaged(twin.TWINS["student_t_line"], ("intercept", "slope"), {"intercept": 67, "slope": 67}, log2_draws=11)


def lognormal_decay():
    rows = np.stack([np.ones(5), -twin.TIMES], axis=-1)
    return linear_gaussian(rows, np.array([0.5, 0.1]), 0.2**2 * np.eye(5))


def exploding_poisson():
    """Counts up to 20,000 are summed.

    Beyond, the posterior of the log rate is normal about log y with variance 1/y, up to terms of order 1/y, and log y
    has the density of the log rate.
    """
    last, scale = 20_000, 3.0
    twins, y = twin.TWINS["exploding_poisson"], np.arange(last, dtype=float)[:, None]
    value, error = summed(twins, ("log_rate",), y, {"log_rate": 6001})

    def integrand(log_y):
        divergence = -0.5 * (np.log(2 * np.pi * np.e) - log_y) - stats.norm(0.0, scale).logpdf(log_y)
        return stats.norm(0.0, scale).pdf(log_y) * divergence

    start = np.log(last - 0.5)
    tail = integrate.quad(integrand, start, 60.0)[0]
    # What `summed` takes for probability left out is the tail.
    error -= 10 * stats.norm(0.0, scale).sf(start)
    return value + tail, abs(error) + tail / last


def exponential_of_noise():
    return float(0.5 * np.log(5.0)), 1e-12


def gross_errors():
    return float(0.99 * 0.5 * np.log(5.0)), 1e-12


def missing_marker():
    """Entropy of the marker, and information of the reading where it is given.

    There its density is that of a truncated normal plus noise, in closed form, and its entropy a quadrature.
    """
    kept, noise = ndtr(1.0), 0.5
    spread = np.sqrt(1 + noise**2)

    def density(y):
        """Of y and theta below one: given y, theta is normal about y / spread^2."""
        below = ndtr((1.0 - y / spread**2) * spread / noise)
        return stats.norm(0.0, spread).pdf(y) * below / kept

    outcome = integrate.quad(lambda y: entr(density(y)), -10.0, 8.0, epsabs=1e-11, limit=200)[0]
    given = 0.5 * np.log(2 * np.pi * np.e * noise**2)
    return float(entr(kept) + entr(1 - kept) + kept * (outcome - given)), 1e-8


def cubed():
    return float(0.5 * np.log1p(1 / 0.05**2)), 1e-12


EXACT = {
    function.__name__: function
    for function in (
        cauchy_location, student_t_line, lognormal_decay, exploding_poisson, exponential_of_noise, gross_errors,
        missing_marker, cubed,
    )
}  # fmt: skip

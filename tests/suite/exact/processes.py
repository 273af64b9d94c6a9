"""Exact values of Gaussian processes and time series."""

import numpy as np

from tests.suite.quadrature import Twin, averaged, linear_gaussian, scores
from tests.suite.twins import processes as twin
from tests.suite.twins.normal import log_correlated

TWINS = twin.TWINS


def gp_length_scale():
    return averaged(TWINS["gp_length_scale"], ("length",), {"length": 81}, log2_draws=12)


def gp_mean_amplitude():
    """Information about the amplitude, the mean integrated out, and about the mean given the amplitude."""
    whole = TWINS["gp_mean_amplitude"]

    def marginal(t):
        return twin.ornstein_uhlenbeck(t) + 2.0**2

    amplitude = Twin(
        {"amplitude": whole.prior["amplitude"]},
        lambda t, u: twin.correlated(marginal(t), u),
        8,
        lambda t, y: log_correlated(y, marginal(t)),
    )
    value, error = averaged(amplitude, ("amplitude",), {"amplitude": 81}, log2_draws=12)
    nodes, weights = scores(whole.prior["amplitude"], 201, 7.0)
    given = {"amplitude": nodes}
    gains = np.linalg.slogdet(marginal(given))[1] - np.linalg.slogdet(twin.ornstein_uhlenbeck(given))[1]
    return value + float(0.5 * weights @ gains), error


def autoregression():
    return averaged(TWINS["autoregression"], ("phi",), {"phi": 141}, log2_draws=14)


def random_walk():
    sizes = {"drift": 61, "volatility": 61}
    return averaged(TWINS["random_walk"], ("drift", "volatility"), sizes, log2_draws=11)


def local_level():
    return linear_gaussian(twin.LEVELS, np.array([1.0, *[0.5] * 5]), 0.4**2 * np.eye(6), 1)


def state_space():
    return averaged(TWINS["state_space"], ("volatility",), {"volatility": 81}, log2_draws=12)


EXACT = {
    function.__name__: function
    for function in (gp_length_scale, gp_mean_amplitude, autoregression, random_walk, local_level, state_space)
}

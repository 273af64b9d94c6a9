"""Exact values of survival times and censored readings."""

import numpy as np
from scipy.special import digamma, gammaln
from scipy.stats import qmc

from tests.suite.quadrature import averaged
from tests.suite.twins.survival import TWINS


def gamma_entropy(shape, log_rate):
    return shape - log_rate + gammaln(shape) + (1 - shape) * digamma(shape)


def exponential_censored():
    """Prior entropy less the mean entropy of the posteriors, which are gamma."""
    twin, means = TWINS["exponential_censored"], []
    for seed in range(8):
        y = twin.simulate(qmc.Sobol(13, rng=seed).random_base2(13))[1]
        posterior = gamma_entropy(2.0 + y[:, 12:].sum(axis=1), np.log1p(y[:, :12].sum(axis=1)))
        means.append(gamma_entropy(2.0, 0.0) - posterior.mean())
    return float(np.mean(means)), float(np.std(means, ddof=1) / 8**0.5)


def weibull_censored():
    sizes = {"shape": 45, "scale": 45}
    return averaged(TWINS["weibull_censored"], ("shape", "scale"), sizes, log2_draws=10, reach=4.5)


def tobit():
    sizes = {"intercept": 51, "slope": 51}
    return averaged(TWINS["tobit"], ("intercept", "slope"), sizes, log2_draws=10, reach=4.8)


def machine_failures():
    """Given five lifetimes of total T, b / (b + T) is beta with parameters a and 5, and its log has a known mean."""
    shape, num = 2.0, 5
    mean_log_rate = digamma(shape + num) - digamma(shape)
    return float(3 * (gamma_entropy(shape, 0.0) - gamma_entropy(shape + num, mean_log_rate))), 1e-9


EXACT = {function.__name__: function for function in (exponential_censored, weibull_censored, tobit, machine_failures)}

"""Exact values of the generalised linear models: all outcomes summed, latents on a grid."""

import itertools
from dataclasses import replace

import numpy as np
from scipy.special import gammaln

from tests.suite.quadrature import summed
from tests.suite.twins.glm import TWINS


def product(*values):
    """Return all combinations, `(num, len(values))`."""
    return np.array(list(itertools.product(*values)), dtype=float)


def logistic_dose():
    return summed(TWINS["logistic_dose"], ("alpha", "beta"), product(*[(0, 1)] * 6), {"alpha": 91, "beta": 91})


def probit_groups():
    return summed(TWINS["probit_groups"], ("weights",), product(*[range(11)] * 3), {"weights": 61})


def poisson_trend():
    """Totals of three weeks are sufficient."""

    def log_totals(t, y):
        log_rate = np.stack([t["base"], t["base"] + t["trend"]], axis=-1) + np.log(3.0)
        return (y * log_rate - np.exp(log_rate) - gammaln(y + 1)).sum(axis=-1)

    totals = replace(TWINS["poisson_trend"], log_likelihood=log_totals)
    return summed(totals, ("base", "trend"), product(range(100), range(150)), {"base": 61, "trend": 61}, reach=5.0)


def poisson_large():
    return summed(TWINS["poisson_large"], ("rate",), np.arange(9000.0)[:, None], {"rate": 901})


def negative_binomial():
    """The two counts are exchangeable: only pairs in order are summed."""
    pairs = np.array([(i, j) for i in range(250) for j in range(i + 1)], dtype=float)
    log_copies = np.where(pairs[:, 0] == pairs[:, 1], 0.0, np.log(2.0))
    sizes = {"log_mean": 45, "dispersion": 25}
    return summed(TWINS["negative_binomial"], ("log_mean",), pairs, sizes, log_copies=log_copies, reach=5.0)


EXACT = {
    function.__name__: function
    for function in (logistic_dose, probit_groups, poisson_trend, poisson_large, negative_binomial)
}

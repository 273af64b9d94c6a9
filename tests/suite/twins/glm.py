"""Twins of the generalised linear models."""

import numpy as np
from scipy import stats
from scipy.special import expit, gammaln, log_expit, ndtr

from tests.suite.quadrature import Twin
from tests.suite.twins.normal import vector

DOSES = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])
GROUPS = np.array([-1.0, 0.0, 1.0])


def log_poisson(y, log_rate):
    return (y * log_rate - np.exp(log_rate)).sum(axis=-1) - gammaln(y + 1).sum(axis=-1)


def log_binomial(k, n, p):
    """Return the log probability of k among n, minus infinity where k cannot be; p is strictly between 0 and 1."""
    inside = (k >= 0) & (k <= n)
    k, rest = np.where(inside, k, 0), np.where(inside, n - k, 0)
    choices = gammaln(k + rest + 1) - gammaln(k + 1) - gammaln(rest + 1)
    return np.where(inside, choices + k * np.log(p) + rest * np.log1p(-p), -np.inf)


def logistic_line(t):
    return t["alpha"][..., None] + t["beta"][..., None] * DOSES


def probability(t):
    score = t["weights"][..., 0:1] + t["weights"][..., 1:2] * GROUPS
    return np.clip(ndtr(score), 1e-6, 1 - 1e-6)


def log_weekly(t):
    """Periods are the last axis of the outcome, weeks the one before."""
    return t["base"][..., None] + t["trend"][..., None] * np.array([0.0, 1.0] * 3)


def overdispersed(t, y):
    size, mean = t["dispersion"][..., None], np.exp(t["log_mean"])[..., None]
    binomial = gammaln(y + size) - gammaln(size) - gammaln(y + 1)
    return (binomial + size * np.log(size / (size + mean)) + y * np.log(mean / (size + mean))).sum(axis=-1)


TWINS = {
    "logistic_dose": Twin(
        {"alpha": stats.norm(0.0, 1.0), "beta": stats.norm(1.0, 1.0)},
        lambda t, u: (u < expit(logistic_line(t))).astype(float),
        6,
        lambda t, y: log_expit(np.where(y == 1, 1, -1) * logistic_line(t)).sum(axis=-1),
    ),
    "probit_groups": Twin(
        {"weights": vector(2, [0.0, 0.5], [1.0, 0.5])},
        lambda t, u: stats.binom(10, probability(t)).ppf(u),
        3,
        lambda t, y: log_binomial(y, 10, probability(t)).sum(axis=-1),
    ),
    "poisson_trend": Twin(
        {"base": stats.norm(0.5, 0.7), "trend": stats.norm(0.0, 0.5)},
        lambda t, u: stats.poisson(np.exp(log_weekly(t))).ppf(u),
        6,
        lambda t, y: log_poisson(y, log_weekly(t)),
    ),
    "poisson_large": Twin(
        {"rate": stats.lognorm(0.3, scale=np.exp(7.0))},
        lambda t, u: stats.poisson(t["rate"][:, None]).ppf(u),
        1,
        lambda t, y: log_poisson(y, np.log(t["rate"])[..., None]),
    ),
    "negative_binomial": Twin(
        {"log_mean": stats.norm(1.0, 0.6), "dispersion": stats.gamma(4.0)},
        lambda t, u: stats.nbinom(
            t["dispersion"][:, None], (t["dispersion"] / (t["dispersion"] + np.exp(t["log_mean"])))[:, None]
        ).ppf(u),
        2,
        overdispersed,
    ),
}

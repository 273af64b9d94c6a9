"""Exact values of mixtures and bounded noise."""

import numpy as np
from scipy import integrate, stats
from scipy.special import entr
from scipy.stats import qmc

from tests.suite.quadrature import averaged
from tests.suite.twins.mixtures import TWINS


def component_mean():
    """The average of three readings is sufficient: entropy of its mixture less that of its noise."""
    noise = 0.5 / np.sqrt(3)
    spread = np.hypot(0.5, noise)

    def density(y):
        return 0.7 * stats.norm(-2.0, spread).pdf(y) + 0.3 * stats.norm(2.0, spread).pdf(y)

    outcome = integrate.quad(lambda y: entr(density(y)), -8.0, 8.0, epsabs=1e-10, points=[-2.0, 0.0, 2.0])[0]
    return float(outcome - stats.norm(0.0, noise).entropy()), 1e-8


def two_component_noise():
    return averaged(TWINS["two_component_noise"], ("theta",), {"theta": 141}, log2_draws=13)


def mixture_weight():
    return averaged(TWINS["mixture_weight"], ("weight",), {"weight": 61}, log2_draws=12)


def uniform_noise():
    """The posterior is the prior between largest - 1/2 and smallest + 1/2; both are drawn from their own law."""
    means, num = [], 10
    for seed in range(8):
        u = qmc.Sobol(3, rng=seed).random_base2(17)
        smallest = 1 - (1 - u[:, 0]) ** (1 / num)
        largest = smallest + (1 - smallest) * u[:, 1] ** (1 / (num - 1))
        theta = stats.norm.ppf(np.clip(u[:, 2], 1e-12, 1 - 1e-12))
        low, high = np.sort([theta + largest - 1, theta + smallest], axis=0)
        # By symmetry the interval is taken on the side where its probability keeps its digits.
        inside = np.where(
            theta > 0, stats.norm.sf(low) - stats.norm.sf(high), stats.norm.cdf(high) - stats.norm.cdf(low)
        )
        means.append(-np.log(inside).mean())
    return float(np.mean(means)), float(np.std(means, ddof=1) / 8**0.5)


def clipped_detector():
    return averaged(TWINS["clipped_detector"], ("theta",), {"theta": 161}, log2_draws=12)


EXACT = {
    function.__name__: function
    for function in (component_mean, two_component_noise, mixture_weight, uniform_noise, clipped_detector)
}

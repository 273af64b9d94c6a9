"""Exact values of hierarchies."""

import numpy as np
from scipy.special import gammaln, ndtri

from tests.suite.quadrature import Twin, averaged, linear_gaussian, scores
from tests.suite.twins import hierarchies as twin
from tests.suite.twins.normal import log_correlated

TWINS = twin.TWINS


def of_spread(prior, variance_of, num_groups, reach):
    """Return the information that groups with mean zero carry about what their variance depends on.

    Their sum of squares is sufficient: the variance times a chi-squared with as many degrees of freedom. Both it, as a
    logarithm, and the latent are on a grid, where the trapezoidal rule converges exponentially.
    """
    nodes, weights = scores(prior, 1201, reach)
    variance, half = variance_of(nodes), num_groups / 2
    log_squares = np.linspace(np.log(variance.min()) - 14.0, np.log(variance.max()) + 4.5, 6001)
    ratio = log_squares - np.log(variance)[:, None]
    log_density = half * ratio - 0.5 * np.exp(ratio) - half * np.log(2) - gammaln(half)
    density = np.exp(log_density)
    marginal = weights @ density
    terms = weights @ (density * log_density) - marginal * np.log(marginal + 1e-300)
    step = log_squares[1] - log_squares[0]
    return float(terms.sum() * step), float(10 * abs(1 - marginal.sum() * step) + 1e-7)


def group_mean():
    return averaged(TWINS["group_mean"], ("mu",), {"mu": 81, "tau": 31}, log2_draws=11)


def funnel():
    return of_spread(TWINS["funnel"].prior["v"], lambda v: np.exp(v) + 1.0, 8, 7.0)


def random_effects():
    rows = np.concatenate([np.zeros((4, 1)), np.ones((4, 1))])
    rows = np.concatenate([rows, np.tile(np.eye(4), (2, 1))], axis=1)
    return linear_gaussian(rows, np.array([1.0, *[2.0] * 4]), 0.8**2 * np.eye(8), 1)


def eight_schools():
    """Information about the spread, the mean integrated out, and about the mean given the spread."""
    prior = TWINS["eight_schools"].prior["tau"]

    def given(t):
        return np.eye(8) * (t["tau"][..., None, None] ** 2 + twin.ERRORS**2)

    def marginal(t):
        return given(t) + 10.0**2

    def outcome(t, u):
        effects = t["tau"][:, None] * ndtri(u[:, :8]) + twin.ERRORS * ndtri(u[:, 8:16])
        return 10.0 * ndtri(u[:, 16:]) + effects

    spread = Twin({"tau": prior}, outcome, 17, lambda t, y: log_correlated(y, marginal(t)))
    value, error = averaged(spread, ("tau",), {"tau": 121}, log2_draws=12)
    nodes, weights = scores(prior, 401, 5.0)
    gains = np.linalg.slogdet(marginal({"tau": nodes}))[1] - np.linalg.slogdet(given({"tau": nodes}))[1]
    return value + float(0.5 * weights @ gains), error


def group_effects():
    """All that readings tell of spread and effects together: of the spread, and of the effects given it."""
    prior = TWINS["group_effects"].prior["tau"]
    value, error = of_spread(prior, lambda tau: tau**2 + 0.5**2, 5, 7.0)
    nodes, weights = scores(prior, 1201, 7.0)
    return value + float(2.5 * weights @ np.log1p((nodes / 0.5) ** 2)), error


EXACT = {function.__name__: function for function in (group_mean, funnel, random_effects, eight_schools, group_effects)}

"""Twins of hierarchies: effects of groups are integrated out where they are nuisances."""

import numpy as np
from scipy import stats
from scipy.special import ndtri

from tests.suite.quadrature import Twin
from tests.suite.twins.normal import log_normal, noise, vector

ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def log_groups(y, mean, spread):
    """Of groups with a common mean and spread, by their average and sum of squares."""
    average, num = y.mean(axis=-1), y.shape[-1]
    squares = ((y - average[..., None]) ** 2).sum(axis=-1) + num * (average - mean) ** 2
    return -0.5 * squares / spread**2 - num * np.log(spread * np.sqrt(2 * np.pi))


def group_mean_joint(s):
    prior = stats.norm(0.0, 1.0).logpdf(s["mu"]) + stats.halfnorm(scale=1.0).logpdf(s["tau"])
    return prior + log_normal(s["effect"], s["mu"], s["tau"]) + log_normal(s["y"], s["effect"], 0.5)


def funnel_joint(s):
    effects = log_normal(s["effect"], 0.0, np.exp(s["v"] / 2))
    return stats.norm(0.0, 3.0).logpdf(s["v"]) + effects + log_normal(s["y"], s["effect"], 1.0)


def measured(t):
    """Conditions are the first axis of the outcome, subjects the second."""
    without = t["subject"]
    return np.concatenate([without, without + t["treatment"][..., None]], axis=-1)


def schools_joint(s):
    prior = stats.norm(0.0, 10.0).logpdf(s["mu"]) + stats.halfcauchy(scale=10.0).logpdf(s["tau"])
    return prior + log_normal(s["score"], 0.0, 1.0) + log_normal(s["y"], s["mu"] + s["tau"] * s["score"], ERRORS)


def log_schools(t, y):
    """As a quadratic in the mean, whose coefficients need one sum over schools for each spread."""
    mean, variance = t["mu"], t["tau"][..., None] ** 2 + ERRORS**2
    precision = 1 / variance
    squares = (y**2 * precision).sum(-1) - 2 * mean * (y * precision).sum(-1) + mean**2 * precision.sum(-1)
    return -0.5 * squares - 0.5 * np.log(2 * np.pi * variance).sum(-1)


def schools(t, u):
    return t["mu"][:, None] + t["tau"][:, None] * ndtri(u[:, :8]) + ERRORS * ndtri(u[:, 8:])


def group_effects_joint(s):
    prior = stats.halfnorm(scale=1.5).logpdf(s["tau"])
    return prior + log_normal(s["effect"], 0.0, s["tau"]) + log_normal(s["y"], s["effect"], 0.5)


def effects(t):
    return t["tau"][..., None] * t["scores"]


TWINS = {
    "group_mean": Twin(
        {"mu": stats.norm(0.0, 1.0), "tau": stats.halfnorm(scale=1.0)},
        lambda t, u: t["mu"][:, None] + t["tau"][:, None] * ndtri(u[:, :6]) + noise(u[:, 6:], 0.5),
        12,
        lambda t, y: log_groups(y, t["mu"], np.hypot(t["tau"], 0.5)),
        log_joint=group_mean_joint,
    ),
    "funnel": Twin(
        {"v": stats.norm(0.0, 3.0)},
        lambda t, u: np.exp(t["v"] / 2)[:, None] * ndtri(u[:, :8]) + ndtri(u[:, 8:]),
        16,
        lambda t, y: log_groups(y, 0.0, np.sqrt(np.exp(t["v"]) + 1.0)),
        log_joint=funnel_joint,
    ),
    "random_effects": Twin(
        {"treatment": stats.norm(0.0, 1.0), "subject": vector(4, 0.0, 2.0)},
        lambda t, u: measured(t) + noise(u, 0.8),
        8,
        lambda t, y: log_normal(y, measured(t), 0.8),
    ),
    "eight_schools": Twin(
        {"mu": stats.norm(0.0, 10.0), "tau": stats.halfcauchy(scale=10.0)},
        schools,
        16,
        log_schools,
        log_joint=schools_joint,
    ),
    "group_effects": Twin(
        {"tau": stats.halfnorm(scale=1.5), "scores": vector(5)},
        lambda t, u: effects(t) + noise(u, 0.5),
        5,
        lambda t, y: log_normal(y, effects(t), 0.5),
        log_joint=group_effects_joint,
    ),
}

"""Twins of Gaussian processes and time series."""

import numpy as np
from scipy import stats
from scipy.special import ndtri

from tests.suite.quadrature import Twin
from tests.suite.twins.normal import log_correlated, log_normal, log_shifted, noise, vector

TWELVE = np.linspace(0.0, 1.0, 12)
EIGHT = np.linspace(0.0, 2.0, 8)
WALK = np.tril(np.ones((10, 10)))
LEVELS = np.concatenate([np.ones((6, 1)), np.tril(np.ones((6, 5)), -1)], axis=1)


def squared_exponential(t):
    distance = (TWELVE[:, None] - TWELVE) / t["length"][..., None, None]
    return np.exp(-0.5 * distance**2) + 0.01 * np.eye(12)


def ornstein_uhlenbeck(t):
    decay = np.exp(-np.abs(EIGHT[:, None] - EIGHT))
    return t["amplitude"][..., None, None] ** 2 * decay + 0.01 * np.eye(8)


def correlated(covariance, u):
    """Return normal draws with a stack of covariances, one each."""
    return np.einsum("nij,nj->ni", np.linalg.cholesky(covariance), ndtri(u))


def recursion(t, u):
    series, before = [], 0.0
    for column in ndtri(u).T:
        before = t["phi"] * before + column
        series.append(before)
    return np.stack(series, axis=-1)


def log_recursion(t, y):
    before, now = np.concatenate([0 * y[..., :1], y[..., :-1]], axis=-1), y
    phi, num = t["phi"], y.shape[-1]
    squares = (now**2).sum(-1) - 2 * phi * (now * before).sum(-1) + phi**2 * (before**2).sum(-1)
    return -0.5 * squares - 0.5 * num * np.log(2 * np.pi)


def log_walk(t, y):
    """Of the path: its steps are independent, and the map between them has determinant one."""
    steps = np.diff(y, axis=-1, prepend=0.0)
    average, num = steps.mean(axis=-1), y.shape[-1]
    spread = ((steps - average[..., None]) ** 2).sum(axis=-1)
    quadratic = (spread + num * (average - t["drift"]) ** 2) / t["volatility"] ** 2
    return -0.5 * quadratic - num * np.log(t["volatility"] * np.sqrt(2 * np.pi))


def walk_joint(s):
    prior = stats.norm(0.0, 0.5).logpdf(s["drift"]) + stats.lognorm(0.5, scale=np.exp(-1.0)).logpdf(s["volatility"])
    return prior + log_normal(s["steps"], s["drift"], s["volatility"])


def levels_mean(t):
    return np.concatenate([t["level"][..., None], t["moves"]], axis=-1) @ LEVELS.T


def levels_joint(s):
    level = np.array([s["level"], *(s[f"level_{time}"] for time in range(1, 6))])
    y = np.array([s[f"y_{time}"] for time in range(6)])
    wandering = log_normal(level[1:], level[:-1], 0.5)
    return stats.norm(0.0, 1.0).logpdf(s["level"]) + wandering + log_normal(y, level, 0.4)


def hidden(t):
    return t["volatility"][..., None, None] ** 2 * (WALK @ WALK.T) + 0.3**2 * np.eye(10)


def hidden_joint(s):
    prior = stats.lognorm(0.7, scale=np.exp(-0.5)).logpdf(s["volatility"])
    return prior + log_normal(s["moves"], 0.0, s["volatility"]) + log_normal(s["y"], s["moves"].cumsum(), 0.3)


TWINS = {
    "gp_length_scale": Twin(
        {"length": stats.lognorm(0.6, scale=np.exp(-1.0))},
        lambda t, u: correlated(squared_exponential(t), u),
        12,
        lambda t, y: log_correlated(y, squared_exponential(t)),
    ),
    "gp_mean_amplitude": Twin(
        {"mean": stats.norm(0.0, 2.0), "amplitude": stats.lognorm(0.5)},
        lambda t, u: t["mean"][:, None] + correlated(ornstein_uhlenbeck(t), u),
        8,
        lambda t, y: log_shifted(y, t["mean"][..., None], ornstein_uhlenbeck(t)),
    ),
    "autoregression": Twin({"phi": stats.uniform(-0.95, 1.9)}, recursion, 15, log_recursion),
    "random_walk": Twin(
        {"drift": stats.norm(0.0, 0.5), "volatility": stats.lognorm(0.5, scale=np.exp(-1.0))},
        lambda t, u: (t["drift"][:, None] + t["volatility"][:, None] * ndtri(u)).cumsum(axis=-1),
        10,
        log_walk,
        log_joint=walk_joint,
        computed=lambda s: s["steps"].cumsum(),
    ),
    "local_level": Twin(
        {"level": stats.norm(0.0, 1.0), "moves": vector(5, 0.0, 0.5)},
        lambda t, u: levels_mean(t) + noise(u, 0.4),
        6,
        lambda t, y: log_normal(y, levels_mean(t), 0.4),
        log_joint=levels_joint,
    ),
    "state_space": Twin(
        {"volatility": stats.lognorm(0.7, scale=np.exp(-0.5))},
        lambda t, u: (t["volatility"][:, None] * ndtri(u[:, :10])).cumsum(axis=-1) + noise(u[:, 10:], 0.3),
        20,
        lambda t, y: log_correlated(y, hidden(t)),
        log_joint=hidden_joint,
    ),
}

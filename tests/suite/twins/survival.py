"""Twins of survival times and censored readings."""

import numpy as np
from scipy import stats
from scipy.special import log_ndtr

from tests.suite.quadrature import Twin
from tests.suite.twins.normal import log_normal, noise

X = np.linspace(-1.0, 1.0, 5)


def censored(time, end):
    """Return times cut at the end, and whether they came before it, side by side."""
    return np.concatenate([np.minimum(time, end), (time < end).astype(float)], axis=-1)


def log_exponential(t, y):
    time, died = np.split(y, 2, axis=-1)
    return died.sum(axis=-1) * np.log(t["hazard"]) - t["hazard"] * time.sum(axis=-1)


def log_weibull(t, y):
    log_time, failed = np.log(y[..., :8]), y[..., 8:]
    shape, scale = t["shape"], t["scale"]
    relative = log_time - np.log(scale)[..., None]
    hazards = np.exp(shape[..., None] * relative).sum(axis=-1)
    at_failures = failed.sum(axis=-1) * np.log(shape / scale) + (shape - 1) * (failed * relative).sum(axis=-1)
    return at_failures - hazards


def line(t):
    return t["intercept"][..., None] + t["slope"][..., None] * X


def log_tobit(t, y):
    mean = line(t)
    at_zero = y == 0
    above = -0.5 * ((y - mean) / 0.5) ** 2 - np.log(0.5 * np.sqrt(2 * np.pi))
    return np.where(at_zero, log_ndtr(-mean / 0.5), above).sum(axis=-1)


def log_lifetimes(t, y):
    totals = y.reshape(*y.shape[:-1], 5, 3).sum(axis=-2)
    return (5 * np.log(t["rate"]) - t["rate"] * totals).sum(axis=-1)


def tobit_joint(s):
    prior = stats.norm(0.5, 1.0).logpdf(s["intercept"]) + stats.norm(0.0, 1.0).logpdf(s["slope"])
    return prior + log_normal(s["latent"], s["intercept"] + s["slope"] * X, 0.5)


def weibull_joint(s):
    prior = stats.lognorm(0.4, scale=np.exp(0.3)).logpdf(s["shape"]) + stats.lognorm(0.5).logpdf(s["scale"])
    return prior + stats.weibull_min(s["shape"], scale=s["scale"]).logpdf(s["failure"]).sum()


TWINS = {
    "exponential_censored": Twin(
        {"hazard": stats.gamma(2.0)},
        lambda t, u: censored(-np.log1p(-u) / t["hazard"][:, None], 1.0),
        12,
        log_exponential,
        log_joint=lambda s: (
            stats.gamma(2.0).logpdf(s["hazard"]) + stats.expon(scale=1 / s["hazard"]).logpdf(s["death"]).sum()
        ),
        computed=lambda s: censored(s["death"], 1.0),
    ),
    "weibull_censored": Twin(
        {"shape": stats.lognorm(0.4, scale=np.exp(0.3)), "scale": stats.lognorm(0.5)},
        lambda t, u: censored(t["scale"][:, None] * (-np.log1p(-u)) ** (1 / t["shape"][:, None]), 1.5),
        8,
        log_weibull,
        log_joint=weibull_joint,
        computed=lambda s: censored(s["failure"], 1.5),
    ),
    "tobit": Twin(
        {"intercept": stats.norm(0.5, 1.0), "slope": stats.norm(0.0, 1.0)},
        lambda t, u: np.maximum(line(t) + noise(u, 0.5), 0.0),
        5,
        log_tobit,
        log_joint=tobit_joint,
        computed=lambda s: np.maximum(s["latent"], 0.0),
    ),
    "machine_failures": Twin(
        {"rate": [stats.gamma(2.0)] * 3},
        lambda t, u: -np.log1p(-u) / np.tile(t["rate"], 5),
        15,
        log_lifetimes,
    ),
}

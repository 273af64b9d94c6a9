"""Twins of mixtures and bounded noise."""

import numpy as np
from scipy import stats
from scipy.special import log_ndtr, ndtri

from tests.suite.quadrature import Twin
from tests.suite.twins.normal import log_normal, noise

STANDARD = stats.norm(0.0, 1.0)


def log_density(y, mean, scale):
    return -0.5 * ((y - mean) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))


def cluster_mean(t):
    """Everything about label and score that readings tell is in the mean."""
    return (4.0 * t["label"] - 2.0 + 0.5 * t["score"])[..., None]


def clusters_joint(s):
    prior = stats.bernoulli(0.3).logpmf(s["label"]) + stats.norm(4.0 * s["label"] - 2.0, 0.5).logpdf(s["mean"])
    return prior + log_normal(s["y"], s["mean"], 0.5)


def with_outliers(t, y):
    theta = t["theta"][..., None]
    good, bad = np.log(0.9) + log_density(y, theta, 0.3), np.log(0.1) + log_density(y, theta, 3.0)
    return np.logaddexp(good, bad).sum(axis=-1)


def outliers(t, u):
    """One uniform draw says which noise, another how much."""
    return t["theta"][:, None] + np.where(u[:, :6] < 0.1, 3.0, 0.3) * ndtri(u[:, 6:])


def log_brightness(t, y):
    weight = t["weight"][..., None]
    dark, bright = np.exp(log_density(y, 0.0, 1.0)), np.exp(log_density(y, 2.0, 1.0))
    return np.log((1 - weight) * dark + weight * bright).sum(axis=-1)


def brightness(t, u):
    return 2.0 * (u[:, :20] < t["weight"][:, None]) + ndtri(u[:, 20:])


def log_uniform(t, y):
    theta = t["theta"][..., None]
    return np.where((np.abs(y - theta) <= 0.5).all(axis=-1), 0.0, -np.inf)


def log_clipped(t, y):
    mean = 2.0 * t["theta"][..., None]
    low, high = log_ndtr((-1.0 - mean) / 0.4), log_ndtr((mean - 1.0) / 0.4)
    return np.where(y <= -1.0, low, np.where(y >= 1.0, high, log_density(y, mean, 0.4))).sum(axis=-1)


TWINS = {
    "component_mean": Twin(
        {"label": stats.bernoulli(0.3), "score": STANDARD},
        lambda t, u: cluster_mean(t) + noise(u, 0.5),
        3,
        lambda t, y: log_normal(y, cluster_mean(t), 0.5),
        log_joint=clusters_joint,
    ),
    "two_component_noise": Twin({"theta": STANDARD}, outliers, 12, with_outliers),
    "mixture_weight": Twin({"weight": stats.beta(2.0, 2.0)}, brightness, 40, log_brightness),
    "uniform_noise": Twin({"theta": STANDARD}, lambda t, u: t["theta"][:, None] + u - 0.5, 10, log_uniform),
    "clipped_detector": Twin(
        {"theta": STANDARD},
        lambda t, u: np.clip(2.0 * t["theta"][:, None] + noise(u, 0.4), -1.0, 1.0),
        6,
        log_clipped,
        log_joint=lambda s: STANDARD.logpdf(s["theta"]) + log_normal(s["signal"], 2.0 * s["theta"], 0.4),
        computed=lambda s: np.clip(s["signal"], -1.0, 1.0),
    ),
}

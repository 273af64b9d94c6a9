"""Twins of nonlinear models of pharmacology, chemistry and tracking."""

import numpy as np
from scipy import stats
from scipy.special import ive

from tests.suite.quadrature import Twin
from tests.suite.twins.normal import log_normal, log_shifted, noise, vector
from tests.suite.twins.tails import log_lognormal

TIME = np.array([0.5, 1.0, 2.0, 6.0, 12.0])
DOSE = np.array([0.1, 0.5, 1.0, 3.0, 10.0])
LIGAND = 0.25 * np.arange(11.0)
STATIONS = np.array([[-3.0, -3.0], [3.0, -3.0], [0.0, 4.0]])
KAPPA = 30.0


def log_concentration(t):
    rate = (t["clearance"] / t["volume"])[..., None]
    curve = (np.exp(-rate * TIME) - np.exp(-1.2 * TIME)) / (1.2 - rate)
    return np.log(np.abs(100.0 * 1.2 / t["volume"][..., None] * curve) + 1e-8)


def saturation(t):
    return DOSE / (np.exp(t["log_half"])[..., None] + DOSE)


def log_response(t, y):
    """Baseline and height are normal and integrated out."""
    share = saturation(t)
    covariance = 0.25**2 * np.eye(5) + 0.3**2 + 0.5**2 * share[..., :, None] * share[..., None, :]
    return log_shifted(y, 0.5 + 3.0 * share, covariance)


def responses(t, u):
    return 0.5 + noise(u[:, :1], 0.3) + (3.0 + noise(u[:, 1:2], 0.5)) * saturation(t) + noise(u[:, 2:], 0.25)


def responses_joint(s):
    prior = stats.norm(0.0, 1.0).logpdf(s["log_half"]) + stats.norm(0.5, 0.3).logpdf(s["baseline"])
    mean = s["baseline"] + s["height"] * DOSE / (np.exp(s["log_half"]) + DOSE)
    return prior + stats.norm(3.0, 0.5).logpdf(s["height"]) + log_normal(s["y"], mean, 0.25)


def heats(t):
    """Ligand bound when protein and all ligand so far share one volume, as the root of its quadratic equation."""
    total = 1.0 + LIGAND + 1.0 / t["affinity"][..., None]
    return t["heat"][..., None] * np.diff(0.5 * (total - np.sqrt(total**2 - 4.0 * LIGAND)), axis=-1)


def angles(t):
    offset = t["position"][..., None, :] - STATIONS
    return np.arctan2(offset[..., 1], offset[..., 0])


def log_bearings(t, y):
    return (KAPPA * (np.cos(y - angles(t)) - 1) - np.log(2 * np.pi * ive(0, KAPPA))).sum(axis=-1)


def bearings(t, u):
    """The quantiles of the noise from a table."""
    offset = np.linspace(-1.6, 1.6, 20_001)
    turned = angles(t) + np.interp(u, stats.vonmises(KAPPA).cdf(offset), offset)
    return (turned + np.pi) % (2 * np.pi) - np.pi


TWINS = {
    "pharmacokinetics": Twin(
        {"clearance": stats.lognorm(0.4, scale=np.exp(1.0)), "volume": stats.lognorm(0.3, scale=np.exp(3.0))},
        lambda t, u: np.exp(log_concentration(t) + noise(u, 0.15)),
        5,
        lambda t, y: log_lognormal(y, log_concentration(t), 0.15),
    ),
    "dose_response": Twin({"log_half": stats.norm(0.0, 1.0)}, responses, 7, log_response, log_joint=responses_joint),
    "calorimetry": Twin(
        {"affinity": stats.lognorm(0.6, scale=np.exp(1.5)), "heat": stats.norm(-10.0, 2.0)},
        lambda t, u: heats(t) + noise(u, 0.15),
        10,
        lambda t, y: log_normal(y, heats(t), 0.15),
    ),
    "bearings": Twin({"position": vector(2)}, bearings, 3, log_bearings),
}

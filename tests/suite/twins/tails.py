"""Twins of heavy tails, wild scales and readings that went wrong."""

import numpy as np
from scipy import stats
from scipy.special import gammaln

from tests.suite.quadrature import Twin
from tests.suite.twins.glm import log_poisson
from tests.suite.twins.normal import log_normal, noise

PLACES = np.linspace(-1.0, 1.0, 6)
TIMES = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
STANDARD = stats.norm(0.0, 1.0)


def log_cauchy(y, place, scale):
    return -np.log1p(((y - place) / scale) ** 2).sum(axis=-1) - y.shape[-1] * np.log(np.pi * scale)


def log_student(y, place, scale, freedom):
    constant = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - 0.5 * np.log(freedom * np.pi) - np.log(scale)
    terms = constant - (freedom + 1) / 2 * np.log1p(((y - place) / scale) ** 2 / freedom)
    return terms.sum(axis=-1)


def line(t):
    return t["intercept"][..., None] + t["slope"][..., None] * PLACES


def log_activity(t):
    return np.log(t["activity"])[..., None] - t["decay"][..., None] * TIMES


def log_lognormal(y, place, scale):
    return log_normal(np.log(y), place, scale) - np.log(y).sum(axis=-1)


def with_gross_errors(t, y):
    good = np.log(0.99) + log_normal(y, t["theta"][..., None], 0.5)
    return np.where(y[..., 0] == 1e6, np.log(0.01), good)


def with_marker(t, y):
    """The density where the reading is given, the probability where it is marked."""
    marked, above = y[..., 0] == -999.0, t["theta"] > 1.0
    return np.where(marked == above, np.where(marked, 0.0, log_normal(y, t["theta"][..., None], 0.5)), -np.inf)


def of_cubes(t, y):
    root = np.cbrt(y)
    return log_normal(root, t["theta"][..., None], 0.05) - np.log(3 * root[..., 0] ** 2)


TWINS = {
    "cauchy_location": Twin(
        {"theta": STANDARD},
        lambda t, u: t["theta"][:, None] + 0.5 * np.tan(np.pi * (u - 0.5)),
        5,
        lambda t, y: log_cauchy(y, t["theta"][..., None], 0.5),
    ),
    "student_t_line": Twin(
        {"intercept": STANDARD, "slope": STANDARD},
        lambda t, u: line(t) + 0.3 * stats.t(3.0).ppf(u),
        6,
        lambda t, y: log_student(y, line(t), 0.3, 3.0),
    ),
    "lognormal_decay": Twin(
        {"activity": stats.lognorm(0.5, scale=np.exp(3.0)), "decay": stats.norm(0.3, 0.1)},
        lambda t, u: np.exp(log_activity(t) + noise(u, 0.2)),
        5,
        lambda t, y: log_lognormal(y, log_activity(t), 0.2),
    ),
    "exploding_poisson": Twin(
        {"log_rate": stats.norm(0.0, 3.0)},
        lambda t, u: stats.poisson(np.exp(t["log_rate"])[:, None]).ppf(u),
        1,
        lambda t, y: log_poisson(y, t["log_rate"][..., None]),
    ),
    "exponential_of_noise": Twin(
        {"theta": STANDARD},
        lambda t, u: np.exp(3.0 * t["theta"][:, None] + noise(u, 1.5)),
        1,
        lambda t, y: log_lognormal(y, 3.0 * t["theta"][..., None], 1.5),
    ),
    "gross_errors": Twin(
        {"theta": STANDARD},
        lambda t, u: np.where(u[:, :1] < 0.01, 1e6, t["theta"][:, None] + noise(u[:, 1:], 0.5)),
        2,
        with_gross_errors,
        log_joint=lambda s: (
            STANDARD.logpdf(s["theta"])
            + stats.bernoulli(0.01).logpmf(s["bad"])
            + stats.norm(s["theta"], 0.5).logpdf(s["reading"])
        ),
        computed=lambda s: np.where(s["bad"] > 0, 1e6, s["reading"]),
    ),
    "missing_marker": Twin(
        {"theta": STANDARD},
        lambda t, u: np.where(t["theta"] > 1.0, -999.0, t["theta"] + noise(u[:, 0], 0.5))[:, None],
        1,
        with_marker,
        log_joint=lambda s: STANDARD.logpdf(s["theta"]) + stats.norm(s["theta"], 0.5).logpdf(s["reading"]),
        computed=lambda s: np.where(s["theta"] > 1.0, -999.0, s["reading"]),
    ),
    "cubed": Twin(
        {"theta": STANDARD},
        lambda t, u: (t["theta"][:, None] + noise(u, 0.05)) ** 3,
        1,
        of_cubes,
        log_joint=lambda s: STANDARD.logpdf(s["theta"]) + stats.norm(0.0, 0.05).logpdf(s["noise"]),
        computed=lambda s: (s["theta"] + s["noise"]) ** 3,
    ),
}

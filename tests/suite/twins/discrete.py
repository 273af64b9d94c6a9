"""Twins of discrete targets."""

import numpy as np
from scipy import stats
from scipy.special import gammaln

from tests.suite.quadrature import Twin
from tests.suite.twins.mixtures import log_density
from tests.suite.twins.normal import log_normal, noise

X = np.array([0.5, 2.0, 5.0])
TABLE = np.array([[0.1, 0.2, 0.05], [0.8, 0.3, 0.1], [0.3, 0.9, 0.2], [0.5, 0.5, 0.9]])
PLACE = np.array([0.0, 1.0, 1.5, -1.0])
SHARES = stats.rv_discrete(name="shares", values=(np.arange(4), [0.5, 0.25, 0.15, 0.1]))()
WEEKS = np.arange(10)


def response(t):
    """Per unit of the height of the response, given which it is."""
    saturating = X / (t["half"][..., None] + X)
    return np.where(t["saturates"][..., None] > 0, saturating, X)


def log_response(t, y):
    """The height, normal in either case, is integrated out: a rank-one covariance beside the noise."""
    direction, noise_scale = response(t), 0.4
    mean = np.where(t["saturates"] > 0, 4.0, 1.0)[..., None] * direction
    spread = np.where(t["saturates"] > 0, 0.8, 0.2)
    residual = (y - mean) / noise_scale
    gain = (spread / noise_scale) ** 2
    squared = (direction**2).sum(axis=-1)
    along = (residual * direction).sum(axis=-1)
    quadratic = (residual**2).sum(axis=-1) - gain * along**2 / (1 + gain * squared)
    return -0.5 * quadratic - 0.5 * np.log1p(gain * squared) - 3 * np.log(noise_scale * np.sqrt(2 * np.pi))


def responses(t, u):
    saturates = t["saturates"] > 0
    height = np.where(saturates, 4.0 + noise(u[:, 0], 0.8), 1.0 + noise(u[:, 0], 0.2))
    return height[:, None] * response(t) + noise(u[:, 1:], 0.4)


def responses_joint(s):
    prior = (
        stats.bernoulli(0.5).logpmf(s["saturates"])
        + stats.norm(1.0, 0.2).logpdf(s["slope"])
        + stats.norm(4.0, 0.8).logpdf(s["highest"])
        + stats.lognorm(0.3, scale=np.exp(0.5)).logpdf(s["half"])
    )
    mean = s["highest"] * X / (s["half"] + X) if s["saturates"] > 0 else s["slope"] * X
    return prior + log_normal(s["y"], mean, 0.4)


def log_findings(t, y):
    disease = t["disease"].astype(int)
    positive = TABLE[disease]
    tests = np.where(y[..., :3] == 1, np.log(positive), np.log1p(-positive)).sum(axis=-1)
    return tests + log_density(y[..., 3], PLACE[disease], 1.0)


def findings(t, u):
    disease = t["disease"].astype(int)
    marker = PLACE[disease] + noise(u[:, 3])
    return np.concatenate([u[:, :3] < TABLE[disease], marker[:, None]], axis=-1).astype(float)


def rates(t):
    return np.where(t["week"][..., None] >= WEEKS, 2.0, 5.0)


TWINS = {
    "model_discrimination": Twin(
        {"saturates": stats.bernoulli(0.5), "half": stats.lognorm(0.3, scale=np.exp(0.5))},
        responses,
        4,
        log_response,
        log_joint=responses_joint,
    ),
    "diagnosis": Twin({"disease": SHARES}, findings, 4, log_findings),
    "change_point": Twin(
        {"week": stats.randint(0, 9)},
        lambda t, u: stats.poisson(rates(t)).ppf(u),
        10,
        lambda t, y: (y * np.log(rates(t)) - rates(t) - gammaln(y + 1)).sum(axis=-1),
    ),
}

"""Twins of choices and judgements."""

import numpy as np
from scipy import stats
from scipy.special import expit, log_expit, log_softmax

from tests.suite.quadrature import Twin
from tests.suite.twins.glm import log_binomial
from tests.suite.twins.normal import vector

OFFERS = np.array(
    [
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
        [[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]],
        [[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]],
        [[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]],
        [[1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]],
        [[0.5, -0.5], [0.0, 1.0], [1.0, 0.0]],
    ]
)
DIFFICULTY = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
CUTS = np.array([-1.5, 0.0, 1.5])
LEVELS = np.array([-0.5, 0.5, 1.5])
DELAYS = np.array([1.0, 3.0, 7.0, 14.0, 30.0, 60.0, 90.0, 180.0])


def chosen(log_probability, y):
    """Return the sum over rows of the log probability, (..., rows, values), of the value that was seen."""
    values = np.arange(log_probability.shape[-1])
    return np.where(y[..., None] == values, log_probability, 0.0).sum(axis=(-2, -1))


def drawn(log_probability, u):
    """Return the value whose cumulated probability first exceeds a uniform draw."""
    return (np.exp(log_probability).cumsum(axis=-1)[..., :-1] < u[..., None]).sum(axis=-1).astype(float)


def log_offers(t):
    return log_softmax(np.einsum("...a,rva->...rv", t["taste"], OFFERS), axis=-1)


def log_answers(t):
    score = 1.5 * (t["ability"][..., None] - DIFFICULTY)
    below = np.concatenate(
        [np.zeros((*score.shape, 1)), expit(CUTS - score[..., None]), np.ones((*score.shape, 1))], axis=-1
    )
    return np.log(np.diff(below, axis=-1))


def correct(t):
    detected = expit(t["slope"][..., None] * (LEVELS - t["threshold"][..., None]))
    return 0.5 + (0.5 - t["lapse"][..., None] / 2) * detected


def preference(t):
    later = 20.0 / (1.0 + t["rate"][..., None] * DELAYS)
    return (later - 10.0) / (2.0 * t["temperature"][..., None])


TWINS = {
    "softmax_choice": Twin(
        {"taste": vector(2)}, lambda t, u: drawn(log_offers(t), u), 6, lambda t, y: chosen(log_offers(t), y)
    ),
    "ordinal": Twin(
        {"ability": stats.norm(0.0, 1.0)},
        lambda t, u: drawn(log_answers(t), u),
        5,
        lambda t, y: chosen(log_answers(t), y),
    ),
    "psychometric": Twin(
        {"threshold": stats.norm(0.0, 1.0), "slope": stats.lognorm(0.5, scale=np.exp(0.5)), "lapse": stats.beta(2, 20)},
        lambda t, u: stats.binom(10, correct(t)).ppf(u),
        3,
        lambda t, y: log_binomial(y, 10, correct(t)).sum(axis=-1),
    ),
    "delay_discounting": Twin(
        {"rate": stats.lognorm(1.0, scale=np.exp(-3.0)), "temperature": stats.lognorm(0.5)},
        lambda t, u: (u < expit(preference(t))).astype(float),
        8,
        lambda t, y: log_expit(np.where(y == 1, 1, -1) * preference(t)).sum(axis=-1),
    ),
}

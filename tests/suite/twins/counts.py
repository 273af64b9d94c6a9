"""Twins of counts."""

import numpy as np
from scipy import stats
from scipy.special import betaln, gammaln, xlogy

from tests.suite.quadrature import Twin
from tests.suite.twins.glm import log_binomial, log_poisson

EXPOSURE = np.array([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 1.0, 1.0])
CONCENTRATION = np.array([2.0, 1.0, 3.0])


def with_excess_zeros(t, y):
    gate, rate = t["gate"][..., None], t["rate"][..., None]
    zero = np.log(gate + (1 - gate) * np.exp(-rate))
    return np.where(y == 0, zero, np.log1p(-gate) + y * np.log(rate) - rate - gammaln(y + 1)).sum(axis=-1)


def nests(t, u):
    gate = t["gate"][:, None]
    return np.where(u < gate, 0.0, stats.poisson(t["rate"][:, None]).ppf(np.clip((u - gate) / (1 - gate), 1e-12, 1)))


def catches(t, u):
    size = 10 + t["extra"]
    first = stats.binom(size, t["share"]).ppf(u[:, 0])
    again = stats.binom(first, t["share"]).ppf(u[:, 1])
    return np.stack([first, again, stats.binom(size - first, t["share"]).ppf(u[:, 2])], axis=-1)


def log_catches(t, y):
    size, (first, again, new) = 10 + t["extra"], np.moveaxis(y, -1, 0)
    found = log_binomial(first, size, t["share"]) + log_binomial(new, size - first, t["share"])
    return found + log_binomial(again, first, t["share"])


def log_catches_integrated(size, y):
    """Log probability of catches given the size, `(num,)` each, the share caught integrated out: a beta function.

    First catch: `first` caught, `size - first` not. Second: `again` and `new` caught, the rest of `size` not.
    """
    first, again, new = np.moveaxis(y, -1, 0)
    possible = (again <= first) & (new <= size - first)
    caught = first + again + new
    missed = np.where(possible, 2 * size - caught, 0)
    unseen = np.where(possible, size - first - new, 0)
    choices = gammaln(size + 1) - gammaln(again + 1) - gammaln(np.where(possible, first - again, 0) + 1)
    choices = choices - gammaln(new + 1) - gammaln(unseen + 1)
    integral = betaln(4.0 + caught, 4.0 + missed) - betaln(4.0, 4.0)
    return np.where(possible, choices + integral, -np.inf)


def shares(t):
    first, second = t["first"], t["second"]
    return np.stack([first, (1 - first) * second, (1 - first) * (1 - second)], axis=-1)


def kinds(t, u):
    own = shares(t)
    one = stats.binom(12, own[:, 0]).ppf(u[:, 0])
    two = stats.binom(12 - one, own[:, 1] / (1 - own[:, 0])).ppf(u[:, 1])
    return np.stack([one, two, 12 - one - two], axis=-1)


def log_kinds(probability, y):
    return gammaln(13) - gammaln(y + 1).sum(axis=-1) + xlogy(y, probability).sum(axis=-1)


TWINS = {
    "gamma_poisson": Twin(
        {"rate": stats.gamma(3.0)},
        lambda t, u: stats.poisson(EXPOSURE * t["rate"][:, None]).ppf(u),
        10,
        lambda t, y: log_poisson(y, np.log(EXPOSURE * t["rate"][..., None])),
    ),
    "zero_inflated": Twin({"gate": stats.beta(2.0, 4.0), "rate": stats.gamma(4.0)}, nests, 8, with_excess_zeros),
    "capture_recapture": Twin({"extra": stats.randint(0, 31), "share": stats.beta(4.0, 4.0)}, catches, 3, log_catches),
    "dirichlet_multinomial": Twin(
        {"first": stats.beta(2.0, 4.0), "second": stats.beta(1.0, 3.0)},
        kinds,
        2,
        lambda t, y: log_kinds(shares(t), y),
        log_joint=lambda s: (
            # Shares in single precision do not quite sum to one.
            stats.dirichlet(CONCENTRATION).logpdf(s["shares"] / s["shares"].sum()) + log_kinds(s["shares"], s["counts"])
        ),
    ),
}

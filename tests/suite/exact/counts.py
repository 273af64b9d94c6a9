"""Exact values of counts: sums over sufficient statistics."""

import numpy as np
from scipy import stats
from scipy.special import digamma, entr, gammaln, logsumexp

from tests.suite.exact.glm import product
from tests.suite.quadrature import summed
from tests.suite.twins import counts as twin


def gamma_poisson():
    """The total is negative binomial and sufficient: prior entropy less the mean entropy of the posteriors."""
    exposure = twin.EXPOSURE.sum()
    total = np.arange(600)
    mass = stats.nbinom(3.0, 1 / (1 + exposure)).pmf(total)
    posterior = stats.gamma(3.0 + total, scale=1 / (1 + exposure)).entropy()
    return float(stats.gamma(3.0).entropy() - mass @ posterior), 1e-8


def zero_inflated():
    """Sufficient are the number of nests with eggs and their total.

    How many outcomes share them, each weighed by the product of 1 / y!, follows by adding one nest after the other.
    """
    most = 140
    one = np.where(np.arange(most) > 0, np.exp(-gammaln(np.arange(most) + 1.0)), 0.0)
    copies = [np.eye(1, most)[0]]
    for _ in range(8):
        copies.append(np.convolve(copies[-1], one)[:most])
    full, total = np.meshgrid(np.arange(9), np.arange(most), indexing="ij")
    with np.errstate(divide="ignore"):
        log_copies = stats.binom(8, 0.5).logpmf(full) + 8 * np.log(2) + np.log(np.array(copies))

    def log_statistics(t, y):
        full, total = y[..., 0], y[..., 1]
        zero = np.log(t["gate"] + (1 - t["gate"]) * np.exp(-t["rate"]))
        return (8 - full) * zero + full * (np.log1p(-t["gate"]) - t["rate"]) + total * np.log(t["rate"])

    possible = np.isfinite(log_copies)
    statistics = np.stack([full[possible], total[possible]], axis=-1).astype(float)
    nests = twin.Twin(twin.TWINS["zero_inflated"].prior, twin.nests, 8, log_statistics)
    sizes = {"gate": 91, "rate": 91}
    return summed(nests, ("gate", "rate"), statistics, sizes, log_copies=log_copies[possible])


def capture_recapture():
    catches = product(range(41), range(41), range(41))
    catches = catches[(catches[:, 1] <= catches[:, 0]) & (catches[:, 0] + catches[:, 2] <= 40)]
    log_given = np.stack([twin.log_catches_integrated(size, catches) for size in range(10, 41)])
    log_marginal = logsumexp(log_given, axis=0) - np.log(31)
    posterior = np.exp(log_given - np.log(31) - log_marginal)
    return float(np.log(31) - np.exp(log_marginal) @ entr(posterior).sum(axis=0)), 1e-8


def dirichlet_multinomial():
    """Prior entropy less the mean entropy of the Dirichlet posteriors."""
    counts = product(range(13), range(13), range(13))
    counts = counts[counts.sum(axis=1) == 12]

    def entropy(concentration):
        whole = concentration.sum(axis=-1)
        log_beta = gammaln(concentration).sum(axis=-1) - gammaln(whole)
        inner = ((concentration - 1) * digamma(concentration)).sum(axis=-1)
        return log_beta + (whole - concentration.shape[-1]) * digamma(whole) - inner

    mass = stats.dirichlet_multinomial(twin.CONCENTRATION, 12).pmf(counts.astype(int))
    return float(entropy(twin.CONCENTRATION) - mass @ entropy(twin.CONCENTRATION + counts)), 1e-8


EXACT = {
    function.__name__: function for function in (gamma_poisson, zero_inflated, capture_recapture, dirichlet_multinomial)
}

r"""Are numbers of successes at several thresholds those of a uniform quantity? Bands and p-values that hold jointly.

A calibrated posterior makes some quantity uniform, a rank or a level. Of :math:`N` simulated experiments, the number
:math:`S_k` with a value below the threshold of probability :math:`z_k` is then binomial, :math:`S_k \sim
\mathrm{Bin}(N, z_k)`, and the numbers at increasing thresholds are the running sums of a multinomial. The test takes
the least likely of them,

.. math::
    \gamma = \min_k\, 2 \min\{ P(\mathrm{Bin}(N, z_k) \le S_k),\ P(\mathrm{Bin}(N, z_k) \ge S_k) \} ,

and its p-value is the chance of so small a :math:`\gamma` among sets of running sums drawn from the multinomial. The
values of :math:`S_k` that keep :math:`\gamma` above its quantile at one less the confidence are a band that holds at
all thresholds together: the curve leaves the band exactly where the test fails. Nothing is taken to its limit, so for
ranks among :math:`L` draws, with thresholds between whole ranks, the band is that of the discrete uniform distribution.

Because the numbers are whole, few simulations or coarse ranks are rejected less often than stated, never more often (up
to the error of the simulated null).

References:
    T. Säilynoja, P.-C. Bürkner and A. Vehtari (2022), Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison. Statistics and Computing 32, section 2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import bdtr, bdtrc
from torch import Tensor

NUM_NULL_SETS = 10_000
"""Sets drawn under uniformity: the p-value 0.05 is then known to 0.002."""

NULL_SEED = 20_220_301
"""The null is drawn from a generator of its own, so equal sizes have equal bands, regardless of the seed."""


def random_ranks(
    values: Float[Tensor, " num_simulations *dim"], draws: Float[Tensor, "num_simulations num_draws *dim"]
) -> Int[Tensor, " num_simulations *dim"]:
    """Return the rank, 0 to `num_draws`, of each value among its draws; among equal ones every place is as likely.

    Without the random place a discrete quantity would pile up at the low end of its ties, calibrated or not.
    """
    below = (draws < values.unsqueeze(1)).sum(1)
    ties = (draws == values.unsqueeze(1)).sum(1)
    return below + (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).long()


def uniformity_p_values(
    counts: Int[Tensor, "num_thresholds num_tests"], num_simulations: int, probabilities: tuple[float, ...]
) -> Float[Tensor, " num_tests"]:
    """Return, for each set of numbers below increasing thresholds, the chance under uniformity of one as unlikely."""
    table = _pointwise_p_values(num_simulations, probabilities)
    least = table.gather(1, counts.cpu().long()).amin(0)
    null = _null_minima(num_simulations, probabilities)
    simulated = (torch.searchsorted(null, least, right=True) + 1).double() / (len(null) + 1)
    # Far out no simulated set reaches; there the sum of the chances at the thresholds bounds the p-value from above.
    return torch.minimum(simulated, len(probabilities) * least)


def uniformity_band(
    num_simulations: int, probabilities: tuple[float, ...], level: float
) -> tuple[Float[Tensor, " num_thresholds"], Float[Tensor, " num_thresholds"]]:
    """Return the least and the largest share at each threshold in a band that a uniform quantity keeps to.

    A share leaves the band somewhere exactly where `uniformity_p_values` is at most `level`.
    """
    null = _null_minima(num_simulations, probabilities)
    table = _pointwise_p_values(num_simulations, probabilities)
    # The two ways to a p-value at most `level`, as in uniformity_p_values: by the simulated null, and by the sum.
    inside = len(probabilities) * table > level
    most_below = math.floor(level * (len(null) + 1) + 1e-9) - 1
    if most_below >= 0:
        inside &= table >= null[most_below]
    shares = torch.arange(num_simulations + 1, dtype=torch.float64) / num_simulations
    low = torch.where(inside, shares, torch.inf).amin(1)
    return low, torch.where(inside, shares, -torch.inf).amax(1)


def rank_p_value(statistic: Tensor | float, null: Float[Tensor, " num_null"]) -> float:
    """Return the share of a simulated null, the statistic in hand counted in, that is at least the statistic."""
    return (1 + int((null >= statistic).sum())) / (1 + len(null))


@lru_cache(maxsize=64)
def _pointwise_p_values(num: int, probabilities: tuple[float, ...]) -> Float[Tensor, "num_thresholds num_counts"]:
    """Two-sided binomial p-value of every possible number, `0` to `num`, at each threshold."""
    counts, probability = np.arange(num + 1), np.array(probabilities)[:, None]
    tails = np.minimum(bdtr(counts, num, probability), bdtrc(counts - 1, num, probability))
    return torch.from_numpy(np.minimum(2 * tails, 1.0))


@lru_cache(maxsize=64)
def _null_minima(num: int, probabilities: tuple[float, ...]) -> Float[Tensor, " num_null_sets"]:
    """Draw the statistic under uniformity, sorted."""
    shares = np.diff(probabilities, prepend=0.0, append=1.0)
    below = np.random.default_rng(NULL_SEED).multinomial(num, shares, NUM_NULL_SETS)[:, :-1].cumsum(1)
    table = _pointwise_p_values(num, probabilities)
    return table.gather(1, torch.from_numpy(below.T)).amin(0).sort().values

r"""Terms of nested Monte Carlo: a density that is an integral becomes an average over inner draws.

With :math:`S_i = \sum_j p(y_i \mid \theta_{ij})` over M inner draws that are independent of :math:`\theta_i`,

.. math::
    \text{NMC: } \log p(y_i \mid \theta_i) - \log \frac{S_i}{M}, \qquad
    \text{PCE: } \log p(y_i \mid \theta_i) - \log \frac{S_i + p(y_i \mid \theta_i)}{M + 1},

the first an upper, the second a lower bound on average (`estimators.nested` says why).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_average(log_sums: Tensor, num_draws: int, own: Tensor | None = None) -> Tensor:
    """Return the log of an average of densities over inner draws, nats.

    `own` is the log density given the draw that made the outcome, which is then counted too.
    """
    if own is None:
        return log_sums - math.log(num_draws)
    return torch.logaddexp(log_sums, own) - math.log(num_draws + 1)


def nmc_terms(log_likelihood: Tensor, log_sums: Tensor, num_draws: int) -> Tensor:
    """Return nested Monte Carlo terms, nats, whose mean lies above the expected information gain.

    Args:
        log_likelihood: log p(y_i given theta_i), `(num_outer,)`.
        log_sums: Log of the sum of p(y_i given theta_ij) over the inner draws, `(num_outer,)`.
        num_draws: Number of inner draws.

    Example:
        >>> nmc_terms(torch.tensor([0.0]), torch.tensor([0.0]), 2)
        tensor([0.6931])
    """
    return log_likelihood - log_average(log_sums, num_draws)


def pce_terms(log_likelihood: Tensor, log_sums: Tensor, num_draws: int, own: Tensor) -> Tensor:
    """Return prior contrastive estimation terms, nats, whose mean is a lower bound.

    Args:
        log_likelihood: log p(y_i given theta_i), `(num_outer,)`.
        log_sums: Log of the sum of p(y_i given theta_il) over the contrasts, the own draw not among them.
        num_draws: Number of contrasts.
        own: Log density of the outcome given all that made it; `log_likelihood` itself where there is no nuisance.

    Example:
        >>> pce_terms(torch.tensor([0.0]), torch.tensor([-torch.inf]), 1, torch.tensor([0.0]))
        tensor([0.6931])
    """
    return log_likelihood - log_average(log_sums, num_draws, own)

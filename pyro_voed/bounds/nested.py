r"""Terms of nested Monte Carlo: a density that is an integral becomes an average over inner draws.

With :math:`S_i = \sum_j p(y_i \mid \theta_{ij})` over M inner draws that are independent of :math:`\theta_i`,

.. math::
    \text{NMC: } \log p(y_i \mid \theta_i) - \log \frac{S_i}{M}, \qquad
    \text{PCE: } \log p(y_i \mid \theta_i) - \log \frac{S_i + p(y_i \mid \theta_i)}{M + 1},

the first an upper, the second a lower bound on average (`estimators.nested` says why). Where p(y | theta) is itself an
average, over nuisance sites, `contrast_terms` give the lower bound.

References:
    van den Oord, Li and Vinyals (2018), "Representation learning with contrastive predictive coding".
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
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


SHARES, POWERS = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0), (1.0, 0.7, 0.5, 0.3)
"""Shares of the uniform distribution and powers that `contrast_terms` chooses from."""


def contrast_terms(log_ratios: Float[Tensor, "num_blocks size size"]) -> Float[Tensor, " num_terms"]:
    r"""Return terms of the contrastive bound with an estimated likelihood as critic, nats, `num_blocks * size`.

    Of a block's targets, which made outcome i? With critics :math:`f_{ij}`, any estimates of
    :math:`p(y_i \mid \theta_j)` whose random numbers know nothing of who made what,

    .. math::
        \mathrm{EIG} \ge \log n + \mathbb{E} \log \Big[(1 - \alpha) \frac{f_{ii}^\beta}{\sum_j f_{ij}^\beta}
        + \frac{\alpha}{n}\Big],

    for any power :math:`\beta`, which tempers estimates that rest on few draws, and share :math:`\alpha`, which
    bounds the loss where they fail (van den Oord et al. 2018, section 2.3, with this classifier). Both are chosen on
    the other half of the blocks, so the terms stay below. Targets take part in the terms of all their block; what
    that adds to a term's spread is in it, as its influence: the mean is unchanged.

    Args:
        log_ratios: Log critics of blocks of experiments, rows outcomes, columns targets; at least two blocks.

    Example:
        >>> contrast_terms(torch.eye(2).log().expand(2, 2, 2))
        tensor([0.6931, 0.6931, 0.6931, 0.6931])
    """
    half = (len(log_ratios) + 1) // 2
    halves = log_ratios[:half], log_ratios[half:]
    terms = []
    for own, other in (halves, halves[::-1]):
        scores = {
            (share, power): float(_classified(other, share, power)[0].mean()) for share in SHARES for power in POWERS
        }
        values, influence = _classified(own, *max(scores, key=lambda choice: scores[choice]))
        terms.append((values - influence).flatten())
    return torch.cat(terms)


def _classified(log_ratios: Tensor, share: float, power: float) -> tuple[Tensor, Tensor]:
    """Return terms, `(num_blocks, size)`, and each target's influence on the others' terms, which sums to zero."""
    size = log_ratios.shape[-1]
    # Outcomes that no target explains have every target alike.
    tempered = (power * log_ratios.clamp_min(torch.finfo(log_ratios.dtype).min)).softmax(-1)
    own = (1.0 - share) * tempered.diagonal(dim1=-2, dim2=-1)
    mixed = own + share / size
    influence = ((own / mixed).unsqueeze(-1) * tempered).sum(-2)
    return mixed.log() + math.log(size), influence - influence.mean(-1, keepdim=True)

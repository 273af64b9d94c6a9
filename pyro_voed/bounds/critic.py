"""Terms of the critic bounds, from the scores of all pairs of a batch; `critic` has the formulas and their sources."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.monte_carlo import log_mean_exp
from pyro_voed.results import Bound

Scores = Float[Tensor, "num num *batch"]
"""Critic scores T(theta_j, y_i): outcomes in rows, targets in columns, joint pairs on the diagonal."""


def info_nce_terms(scores: Scores) -> Float[Tensor, " num *batch"]:
    """Return InfoNCE terms, nats: a lower bound on average, none above log(num).

    Example:
        >>> info_nce_terms(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))  # pairs told apart: log 2
        tensor([0.6931, 0.6931])
    """
    return _joint(scores) - log_mean_exp(scores, dim=1)


def nwj_terms(scores: Scores) -> Float[Tensor, " num *batch"]:
    """Return Nguyen-Wainwright-Jordan terms (MINE-f), nats, whose mean is a lower bound.

    Example:
        >>> nwj_terms(torch.ones(2, 2))  # the best constant score
        tensor([0., 0.])
    """
    return tuba_terms(scores, torch.ones_like(scores[0]))


def tuba_terms(scores: Scores, log_baseline: Float[Tensor, " num *batch"]) -> Float[Tensor, " num *batch"]:
    """Return TUBA terms, nats, whose mean is a lower bound for any baseline log a(y_i).

    Example:
        >>> tuba_terms(torch.full((2, 2), 3.0), torch.full((2,), 3.0))
        tensor([0., 0.])
    """
    return 1.0 + _joint(scores) - log_baseline - (log_mean_exp_product(scores) - log_baseline).exp()


def donsker_varadhan_terms(scores: Scores) -> Float[Tensor, " num *batch"]:
    """Return Donsker-Varadhan terms, nats, of no guaranteed side: biased upward from a lower bound.

    Example:
        >>> donsker_varadhan_terms(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor([1., 3.])
    """
    return _joint(scores) - log_mean_exp(log_mean_exp_product(scores), dim=0)


@dataclass(frozen=True)
class CriticTerms:
    """Terms of a critic bound, to be given to `eig_critic`.

    Attributes:
        name: What it is called.
        terms: Function from scores (and, with `needs_baseline`, log baselines) to terms `(num, *batch)`.
        bound: Which way the mean of the terms errs.
        needs_baseline: Whether a log baseline is learnt.
        exponential: Whether it averages exp(score) over shuffled pairs, so that an effective sample size matters.
        ceiling: Largest value at a number of pairs; None where there is none.
    """

    name: str
    terms: Callable[..., Tensor]
    bound: Bound
    needs_baseline: bool = False
    exponential: bool = True
    ceiling: Callable[[int], float] | None = None

    def __call__(self, scores: Scores, log_baseline: Tensor | None = None) -> Float[Tensor, " num *batch"]:
        """Return the terms."""
        return self.terms(scores, log_baseline) if self.needs_baseline else self.terms(scores)


info_nce = CriticTerms("info_nce", info_nce_terms, "lower", exponential=False, ceiling=math.log)
nwj = CriticTerms("nwj", nwj_terms, "lower")
tuba = CriticTerms("tuba", tuba_terms, "lower", needs_baseline=True)
donsker_varadhan = CriticTerms("donsker_varadhan", donsker_varadhan_terms, "neither")


def _joint(scores: Tensor) -> Tensor:
    return scores.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def log_mean_exp_product(scores: Tensor) -> Tensor:
    """Average exp(score) over the shuffled pairs of each outcome; its logarithm, `(num, *batch)`."""
    num = scores.shape[0]
    own = torch.eye(num, dtype=torch.bool, device=scores.device).reshape(num, num, *(1,) * (scores.dim() - 2))
    return scores.masked_fill(own, -torch.inf).logsumexp(1) - math.log(num - 1)

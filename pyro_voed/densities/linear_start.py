r"""Where to start learning a posterior: at the best linear prediction of the targets from the context.

With n pilot draws of a centred context C and of centred targets T, ridge regression predicts

.. math:: T \approx C B_\lambda, \qquad B_\lambda = (C^\top C / n + \lambda I)^{-1}\, C^\top T / n .

For each target the penalty is that of least generalised cross-validation,

.. math:: \mathrm{GCV}(\lambda) = \frac{\lVert T - C B_\lambda \rVert^2 / n}{(1 - \mathrm{df}_\lambda / n)^2}, \qquad
    \mathrm{df}_\lambda = 1 + \sum_i \frac{s_i}{s_i + \lambda},

:math:`s_i` the eigenvalues of :math:`C^\top C / n`. It estimates the squared error on new draws, so the spread at which
a density starts is that of predictions, not of the fit, also where the context is longer than the pilot.

References:
    Golub, Heath and Wahba (1979), "Generalized cross-validation as a method for choosing a good ridge parameter",
    Technometrics 21, equation 1.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_PENALTIES = (-14.0, 2.0, 33)
"""First and last decimal logarithm of the penalties tried, relative to the mean eigenvalue, and their number."""

_LEAST_EIGENVALUE = 1e-10
"""Directions with less than this share of the variance are rounding."""


class LinearPrediction(NamedTuple):
    """Targets predicted as `context @ weight.mT + offset`, and the covariance of the errors on new draws."""

    weight: Float[Tensor, "dim context_dim"]
    offset: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]


@torch.no_grad()
def predict_linearly(targets: Float[Tensor, "num dim"], context: Float[Tensor, "num context_dim"]) -> LinearPrediction:
    """Return the ridge regression of at least three finite targets on contexts of the same draws.

    Example:
        >>> context = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> prediction = predict_linearly(2.0 * context + 1.0, context)
        >>> round(prediction.weight.item(), 3), round(prediction.offset.item(), 3)
        (2.0, 1.0)
    """
    centre, mean = context.double().mean(0), targets.double().mean(0)
    c, t = context.double() - centre, targets.double() - mean
    eigenvalues, directions = _principal(c)
    scores = (c @ directions).mT @ t / len(c)  # (rank, dim)
    explained = scores.square() / eigenvalues.unsqueeze(-1)
    logarithms = torch.linspace(*_PENALTIES, dtype=torch.double, device=c.device)
    penalties = 10.0**logarithms * eigenvalues.mean()
    left = penalties / (eigenvalues.unsqueeze(-1) + penalties)  # (rank, num_penalties), share not fitted
    squares = (t.square().mean(0) - (1.0 - left.square()).mT @ explained).clamp(min=0.0)  # (num_penalties, dim)
    freedom = 1.0 - (1.0 + (1.0 - left).sum(0)) / len(c)
    # A penalty that leaves no freedom fits the pilot exactly and says nothing about new draws.
    scored = torch.where(freedom.unsqueeze(-1) > 0.05, squares / freedom.unsqueeze(-1).square(), torch.inf)
    error, chosen = scored.min(0)
    weight = (directions @ (scores / (eigenvalues.unsqueeze(-1) + penalties[chosen]))).mT
    residuals = t - c @ weight.mT
    inflation = (error / residuals.square().mean(0).clamp(min=torch.finfo(torch.double).tiny)).sqrt()
    inflated = residuals * inflation
    covariance = inflated.mT @ inflated / len(c)
    return LinearPrediction(weight, mean - weight @ centre, covariance)


def _principal(c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of the context's covariance that are not rounding, and their directions as columns."""
    num, dim = c.shape
    if dim <= num:
        eigenvalues, directions = torch.linalg.eigh(c.mT @ c / num)
    else:
        eigenvalues, left = torch.linalg.eigh(c @ c.mT / num)
        directions = c.mT @ left / (num * eigenvalues.clamp(min=torch.finfo(torch.double).tiny)).sqrt()
    kept = eigenvalues > _LEAST_EIGENVALUE * eigenvalues.sum()
    return eigenvalues[kept], directions[:, kept]

"""Laplace terms and what they are made of: modes, and curvatures there; derived in `estimators.laplace`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]
"""Log densities `(num_rows,)` of vectors `(num_rows, dim)`, each row's of that row alone."""

HALVINGS = 6
STOP_DECREMENT = 1e-4


def laplace_terms(
    log_prior: Float[Tensor, " num_samples"], precision: Float[Tensor, "num_samples dim dim"]
) -> Float[Tensor, " num_samples"]:
    """Return Laplace terms, nats, whose mean approximates the expected information gain; NaN where none exists.

    Args:
        log_prior: Log prior density of the targets that made an outcome.
        precision: Negative Hessian of their log joint density with that outcome, at the mode, in the same coordinates.
            Where it is not positive definite there is no Gaussian, and the term is NaN.

    Example:
        >>> log_prior = torch.tensor([-0.5 * math.log(2 * math.pi * math.e)])  # the mean of a standard normal's
        >>> laplace_terms(log_prior, torch.tensor([[[4.0]]]))  # log 2
        tensor([0.6931])
    """
    factor, failed = torch.linalg.cholesky_ex(precision)
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    terms = -log_prior - 0.5 * precision.shape[-1] * math.log(2.0 * math.pi * math.e) + half_log_det
    return torch.where(failed == 0, terms, torch.full_like(terms, torch.nan))


def curvature(
    log_density: LogDensity, theta: Float[Tensor, "num_rows dim"]
) -> tuple[Float[Tensor, " num_rows"], Float[Tensor, "num_rows dim"], Float[Tensor, "num_rows dim dim"]]:
    """Return value, gradient and negative Hessian of every row's log density.

    Rows are independent, so the Hessians of all come from `dim` products with the sum of the log densities.
    """
    with torch.enable_grad():
        leaf = theta.detach().clone().requires_grad_()
        value = log_density(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True, materialize_grads=True)
        rows = [_row_of_hessian(gradient[:, index], leaf) for index in range(theta.shape[-1])]
    hessian = torch.stack(rows, dim=-2)
    return value.detach(), gradient.detach(), -0.5 * (hessian + hessian.mT)


def newton_modes(log_density: LogDensity, start: Float[Tensor, "num_rows dim"], num_steps: int) -> Tensor:
    """Climb from every row's start to a mode by damped Newton steps, `(num_rows, dim)`.

    Negative curvatures are taken by their size, so that every direction leads upwards, and a step is halved until the
    row's density does not fall.
    """
    theta = start
    for _ in range(num_steps):
        value, gradient, precision = curvature(log_density, theta)
        step = ascent_direction(gradient, precision)
        decrement = 0.5 * (gradient * step).sum(-1)
        if bool((decrement < STOP_DECREMENT).all()):
            break
        theta = _damped(log_density, theta, value, step)
    return theta


def _row_of_hessian(gradient: Tensor, leaf: Tensor) -> Tensor:
    if not gradient.requires_grad:
        return torch.zeros_like(leaf)
    (row,) = torch.autograd.grad(gradient.sum(), leaf, retain_graph=True, materialize_grads=True)
    return row


def ascent_direction(gradient: Tensor, precision: Tensor) -> Tensor:
    """Solve with the curvatures' absolute values; zero for rows that are not finite."""
    finite = torch.isfinite(precision).flatten(1).all(-1) & torch.isfinite(gradient).all(-1)
    safe = torch.where(finite[:, None, None], precision, torch.eye(precision.shape[-1]).to(precision))
    curvatures, axes = torch.linalg.eigh(safe)
    sizes = curvatures.abs()
    sizes = torch.maximum(sizes, 1e-6 * sizes.amax(-1, keepdim=True)).clamp_min(torch.finfo(sizes.dtype).tiny)
    slopes = torch.where(finite[:, None], gradient, torch.zeros_like(gradient)).unsqueeze(-2) @ axes
    return (slopes / sizes.unsqueeze(-2) * axes).sum(-1)


def _damped(log_density: LogDensity, theta: Tensor, value: Tensor, step: Tensor) -> Tensor:
    """Return rows moved by the longest of the halved steps at which the density does not fall."""
    moved, undecided = theta, torch.ones_like(value, dtype=torch.bool)
    tolerance = 1e-6 * value.abs()
    for halving in range(HALVINGS):
        trial = theta + 0.5**halving * step
        with torch.no_grad():
            accepted = undecided & (log_density(trial) >= value - tolerance)
        moved = torch.where(accepted.unsqueeze(-1), trial, moved)
        undecided = undecided & ~accepted
        if not undecided.any():
            break
    return moved

r"""Raw moments of a set of rows, so that no set network has to discover them.

Over the rows :math:`x_1, \dots, x_n` of a set, per column,

.. math::
    \bar x, \qquad \log s^2, \quad s^2 = \tfrac1n \sum_i (x_i - \bar x)^2, \qquad \log m, \quad m = \bar x^2 + s^2,

and, if asked for, of the standardised rows :math:`z = (x - \bar x) / s` the correlations :math:`R_{jk} = \tfrac1n
\sum_i z_{ij} z_{ik}` of every pair of columns, once as they are and once as coordinates of the Cholesky factor L of R,
:math:`\operatorname{arsinh}(L_{jk} / \sqrt{\sum_{l>k} L_{jl}^2})`. These are Fisher's transform of partial
correlations, what regressions and covariance matrices are made of. (R is drawn towards the identity by the weight of
one row: with fewer rows than columns it is singular.) For rows from an exponential family with
these statistics they say everything about the set. The least and the greatest value of every column go along, which say
everything where noise is bounded, and which a mean over rows is slow to learn.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_VARIANCE = 1e-8
"""Added under logarithms, in units of the pooled variance, so that a set of equal rows has finite moments."""


def num_statistics(row_dim: int, *, cross: bool) -> int:
    """Return how many moments and extremes there are of a set."""
    return 5 * row_dim + (row_dim * (row_dim - 1) if cross else 0)


def row_extremes(
    rows: Float[Tensor, "*batch num_rows row_dim"], weights: Float[Tensor, "*batch num_rows 1"] | None = None
) -> Float[Tensor, "*batch twice_row_dim"]:
    """Return the least and the greatest value of every column, over the rows whose weight is not zero.

    Example:
        >>> row_extremes(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
        tensor([-1.,  0.,  1.,  2.])
    """
    if weights is None:
        return torch.cat([rows.amin(-2), rows.amax(-2)], -1)
    absent = weights == 0
    return torch.cat([rows.masked_fill(absent, torch.inf).amin(-2), rows.masked_fill(absent, -torch.inf).amax(-2)], -1)


def row_moments(
    rows: Float[Tensor, "*batch num_rows row_dim"],
    weights: Float[Tensor, "*batch num_rows 1"] | None = None,
    *,
    cross: bool = False,
) -> Float[Tensor, "*batch num_moments"]:
    """Return mean, log variance and log mean square of every column, and with `cross` correlations of all pairs.

    The weights of the rows have sum one; None stands for equal ones.

    Example:
        >>> row_moments(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
        tensor([0.0000, 1.0000, 0.0000, 0.0000, 0.0000, 0.6931])
    """
    share = 1.0 / rows.shape[-2] if weights is None else weights
    mean = (rows * share).sum(-2, keepdim=True)
    centred = rows - mean
    variance = (centred.square() * share).sum(-2) + SMALLEST_VARIANCE
    mean = mean.squeeze(-2)
    moments = [mean, variance.log(), (mean.square() + variance).log()]
    if cross:
        z = centred / variance.sqrt().unsqueeze(-2)
        products = (z * share).transpose(-1, -2) @ z
        # One over the sum of squared shares is the number of rows.
        number = rows.shape[-2] if weights is None else 1.0 / weights.square().sum(-2, keepdim=True)
        identity = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        factor = torch.linalg.cholesky((number * products + identity) / (number + 1.0))
        squares = factor.square()
        right = squares.flip(-1).cumsum(-1).flip(-1) - squares
        below = torch.ones_like(identity, dtype=torch.bool).tril(-1).flatten().nonzero().flatten()
        partial = torch.asinh(factor / right.clamp(min=SMALLEST_VARIANCE).sqrt())
        moments += [matrix.flatten(-2).index_select(-1, below) for matrix in (products, partial)]
    return torch.cat(moments, -1)

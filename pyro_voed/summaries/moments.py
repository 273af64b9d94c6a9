r"""Raw moments of a set of rows: what no set network should have to discover.

Over the rows :math:`x_1, \dots, x_n` of a set, per column,

.. math::
    \bar x, \qquad \log s^2, \quad s^2 = \tfrac1n \sum_i (x_i - \bar x)^2, \qquad \log m, \quad m = \bar x^2 + s^2,

and, where asked for, of the standardised rows :math:`z = (x - \bar x) / s` the correlations :math:`\tfrac1n \sum_i
z_{ij} z_{ik}` of every pair of columns. For rows from an exponential family with these statistics nothing else is to be
known about the set.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_VARIANCE = 1e-8
"""Added under logarithms, in units of the pooled variance, so that a set of equal rows has finite moments."""


def num_moments(row_dim: int, *, cross: bool) -> int:
    """Return how many moments `row_moments` gives."""
    return 3 * row_dim + (row_dim * (row_dim - 1) // 2 if cross else 0)


def row_moments(
    rows: Float[Tensor, "*batch num_rows row_dim"],
    weights: Float[Tensor, "*batch num_rows 1"] | None = None,
    *,
    cross: bool = False,
) -> Float[Tensor, "*batch num_moments"]:
    """Return mean, log variance and log mean square of every column, and correlations of pairs where asked for.

    Args:
        rows: The set.
        weights: Of each row, adding up to one over the rows; None for equal ones.
        cross: Also give the correlations of all pairs of columns.

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
        below = torch.tril_indices(rows.shape[-1], rows.shape[-1], -1, device=rows.device)
        moments.append(products[..., below[0], below[1]])
    return torch.cat(moments, -1)

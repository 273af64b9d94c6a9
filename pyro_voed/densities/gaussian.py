r"""A conditional Gaussian as a layer: an affine map whose shift, scales and correlations all depend on the context.

With shift :math:`m`, log-scales :math:`\lambda` and a strictly lower-triangular :math:`L`, functions of the context,

.. math:: z = e^{-\lambda} \odot (I + L)(\theta - m), \qquad \log |\partial z / \partial \theta| = - \sum_i \lambda_i ,

so :math:`z \sim N(0, I)` means :math:`\theta \sim N(m, \Sigma)` with :math:`\Sigma^{-1} = (I + L)^T e^{-2 \lambda} (I +
L)`: every covariance matrix is reached (the modified Cholesky factorisation of Pourahmadi, 1999). A flow that starts
with this layer can express every amortised full Gaussian, in its tails too, where couplings are linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAX_CORRELATED_DIM = 32
"""Largest dimension with a context-dependent :math:`L`: beyond it dim**2 / 2 outputs would dwarf the flow."""

MAX_LOG_SCALE = 8.0
"""Bound that log-scales approach smoothly: standardised targets stay far inside, and `exp` cannot overflow."""


Vector = Float[Tensor, "*#batch dim"]
Matrix = Float[Tensor, "*#batch dim dim"]


def soft_clamp(values: Float[Tensor, "*shape"], bound: float) -> Float[Tensor, "*shape"]:
    """Squash values into (-bound, bound) with slope one at zero."""
    return bound * torch.tanh(values / bound)


def whiten(theta: Vector, shift: Vector, log_scale: Vector, lower: Matrix | None) -> Float[Tensor, "... dim"]:
    """Return z from theta; without `lower` the coordinates are independent."""
    residual = theta - shift
    if lower is not None:
        residual = residual + (lower * residual.unsqueeze(-2)).sum(-1)
    return residual * torch.exp(-log_scale)


def colour(z: Vector, shift: Vector, log_scale: Vector, lower: Matrix | None) -> Float[Tensor, "... dim"]:
    """Return theta from z, the inverse of `whiten`."""
    residual = z * torch.exp(log_scale)
    if lower is not None:
        residual = torch.linalg.solve_triangular(lower, residual.unsqueeze(-1), upper=False, unitriangular=True)
        residual = residual.squeeze(-1)
    return residual + shift


class ConditionalGaussian(nn.Module):
    """Give shift, log-scales and correlations from features of the context; at construction N(0, I).

    The shift has a part linear in the context itself: the features alone would have to carry every statistic of a long
    context, and in sharp posteriors each coordinate's shift often follows a statistic of its own. Above
    `MAX_CORRELATED_DIM` dimensions there are no correlations.
    """

    places: Tensor

    def __init__(self, dim: int, feature_dim: int, context_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context_dim, dim, bias=False) if context_dim else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
        self.dim = dim
        self.num_pairs = dim * (dim - 1) // 2 if dim <= MAX_CORRELATED_DIM else 0
        self.head = nn.Linear(feature_dim, 2 * dim + self.num_pairs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("places", _strictly_lower_places(dim), persistent=False)

    def forward(
        self, features: Float[Tensor, "*batch feature_dim"], context: Float[Tensor, "*batch context_dim"]
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim dim"] | None]:
        """Return shift, log-scale and the strictly lower-triangular part (None where there is none)."""
        shift, log_scale, pairs = self.head(features).split([self.dim, self.dim, self.num_pairs], -1)
        if self.linear is not None:
            shift = shift + self.linear(context)
        lower = None
        if self.num_pairs:
            lower = F.pad(pairs, (1, 0)).index_select(-1, self.places).unflatten(-1, (self.dim, self.dim))
        return shift, soft_clamp(log_scale, MAX_LOG_SCALE), lower


def _strictly_lower_places(dim: int) -> Tensor:
    """Return, for each entry of a flattened matrix, where its value lies in [0, packed lower triangle]."""
    places = torch.zeros(dim, dim, dtype=torch.long)
    rows, columns = torch.tril_indices(dim, dim, -1)
    places[rows, columns] = 1 + torch.arange(len(rows))
    return places.flatten()

r"""Bijections from unconstrained coordinates onto the supports of distributions.

Nearly all are torch's and Pyro's own, as `torch.distributions.biject_to` has them registered. Two are added here, for
matrices, without touching that registry.

A Cholesky factor L of a correlation matrix has rows of unit length. With coordinates :math:`x_{ij}`, :math:`j < i`,

.. math::
    L_{ij} = \tanh x_{ij} \prod_{k<j} \operatorname{sech} x_{ik}, \qquad
    L_{ii} = \prod_{k<i} \operatorname{sech} x_{ik}, \qquad
    x_{ij} = \operatorname{arsinh}\Big(L_{ij} \Big/ \sqrt{\textstyle\sum_{k>j} L_{ik}^2}\Big),

    \log \left\lvert \frac{\partial L}{\partial x} \right\rvert = \sum_{j<i}
    \left(1 + \tfrac12 (i - 1 - j)\right) \log \operatorname{sech}^2 x_{ij} .

This is the map of `torch.distributions.CorrCholeskyTransform`, whose formulas take :math:`1 - \sum_{k \le j} L_{ik}^2`
instead: where correlations are strong that difference cancels, and in single precision coordinates are infinite or NaN.

Angles lie in :math:`(-\pi, \pi)`, though torch and Pyro state the real line as the support of their distributions: the
densities are periodic and normalised over one turn, so that on the whole line they would hold endless mass.

A lower triangular matrix with positive diagonal has its entries as coordinates, the diagonal as logarithms. Products
:math:`L L^\top` give correlation matrices and positive definite matrices.

References:
    Stan Development Team, Stan reference manual, "Cholesky factors of correlation matrices".
    D. Lewandowski, D. Kurowicka and H. Joe (2009), Journal of Multivariate Analysis 100.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.distributions.transforms import CholeskyTransform, CorrMatrixCholeskyTransform
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

CIRCULAR = (torch.distributions.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
"""Families of angles, drawn from one turn, whose stated support is the real line."""


def support_of(fn: Any) -> constraints.Constraint:
    """Return the support on which a distribution's density is normalised and from which it is drawn."""
    if isinstance(fn, dist.torch_distribution.MaskedDistribution):
        return support_of(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent):
        own = support_of(fn.base_dist)
        return constraints.independent(own, fn.reinterpreted_batch_ndims) if fn.reinterpreted_batch_ndims else own
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        # Its own support object has no registered bijection even where the components' has.
        return support_of(fn.component_distribution)
    if isinstance(fn, CIRCULAR):
        turn = constraints.interval(-math.pi, math.pi)
        return constraints.independent(turn, len(fn.event_shape)) if fn.event_shape else turn
    return fn.support


def bijection(support: constraints.Constraint) -> Transform:
    """Return the bijection from unconstrained coordinates onto a support."""
    known: Any = support
    if isinstance(known, constraints.independent):
        return IndependentTransform(bijection(known.base_constraint), known.reinterpreted_batch_ndims)
    if isinstance(known, type(constraints.corr_cholesky)):
        return CorrelationFactorTransform()
    if isinstance(known, type(constraints.corr_matrix)):
        return ComposeTransform([CorrelationFactorTransform(), CorrMatrixCholeskyTransform().inv])
    if isinstance(known, type(constraints.lower_cholesky)):
        return LowerFactorTransform()
    if isinstance(known, type(constraints.positive_definite)):
        return ComposeTransform([LowerFactorTransform(), CholeskyTransform().inv])
    return biject_to(support)


def lkj_drawn_right(fn: Any) -> Any:
    r"""Return a distribution like this one whose draws follow its density, where it is an LKJ distribution.

    Left of the diagonal, row i of the factor (counted from zero) has a uniform direction and the squared length
    :math:`\sum_{j<i} L_{ij}^2 \sim \mathrm{Beta}(i / 2, \eta + (K - 1 - i) / 2)` (Lewandowski et al. 2009, section
    3.2). `torch.distributions.LKJCholesky` states the right density but, as of torch 2.13, draws from Beta(i - 1/2,
    ...): from three variables on its correlations are too strong, and simulations are at odds with the density.
    """
    inner = getattr(fn, "base_dist", None)
    if isinstance(fn, torch.distributions.LKJCholesky):
        row = torch.arange(fn.dim, dtype=fn.concentration.dtype, device=fn.concentration.device)
        # The first row has no squares to draw; torch sets it aside whatever is drawn.
        row = row.clamp(min=1.0)
        right = copy.copy(fn)
        lengths = torch.distributions.Beta(0.5 * row, fn.concentration.unsqueeze(-1) + 0.5 * (fn.dim - 1 - row))
        vars(right)["_beta"] = lengths
        return right
    repaired = None if inner is None else lkj_drawn_right(inner)
    if repaired is inner:
        return fn
    wrapped = copy.copy(fn)
    wrapped.base_dist = repaired
    return wrapped


class _TriangularTransform(Transform):
    """Abstract: coordinates fill a lower triangle whose corner is `offset` off the diagonal."""

    domain = constraints.real_vector
    bijective = True
    offset: int

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Return the shape of matrices from that of coordinates."""
        return _matrix_shape(shape, self.offset)

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Return the shape of coordinates from that of matrices."""
        side = shape[-1] + self.offset
        return torch.Size([*shape[:-2], side * (side + 1) // 2])


class CorrelationFactorTransform(_TriangularTransform):
    """Map `K (K - 1) / 2` real coordinates to the Cholesky factor of a correlation matrix, `(K, K)`."""

    codomain = constraints.corr_cholesky
    offset = -1

    def _call(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch size size"]:
        coordinates = _to_lower(x, offset=-1)
        # Entry j of `left` is the length that remains of a row after its first j entries.
        left = torch.cosh(coordinates).reciprocal().cumprod(-1).roll(1, -1)
        left = torch.cat([torch.ones_like(left[..., :1]), left[..., 1:]], dim=-1)
        return (torch.tanh(coordinates) + torch.eye(left.shape[-1], dtype=x.dtype, device=x.device)) * left.tril()

    def _inverse(self, y: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch dim"]:
        squares = y.square().flip(-1).cumsum(-1).flip(-1)
        rows, columns = _lower_indices(y, offset=-1)
        return torch.asinh(y[..., rows, columns] / squares[..., rows, columns + 1].sqrt())

    def log_abs_det_jacobian(
        self, x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch size size"]
    ) -> Float[Tensor, "*batch"]:
        """Return the log of `|d entries below the diagonal / d x|`."""
        rows, columns = _lower_indices(y, offset=-1)
        log_square_sech = 2.0 * (math.log(2.0) - x.abs() - torch.nn.functional.softplus(-2.0 * x.abs()))
        return ((1.0 + 0.5 * (rows - 1 - columns)) * log_square_sech).sum(-1)


class LowerFactorTransform(_TriangularTransform):
    """Map `K (K + 1) / 2` real coordinates to a lower triangular matrix with positive diagonal, `(K, K)`."""

    codomain = constraints.lower_cholesky
    offset = 0

    def _call(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch size size"]:
        entries = _to_lower(x, offset=0)
        return entries.tril(-1) + entries.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def _inverse(self, y: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch dim"]:
        rows, columns = _lower_indices(y, offset=0)
        return (y.tril(-1) + y.diagonal(dim1=-2, dim2=-1).log().diag_embed())[..., rows, columns]

    def log_abs_det_jacobian(
        self, x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch size size"]
    ) -> Float[Tensor, "*batch"]:
        """Return the log of `|d entries on and below the diagonal / d x|`."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _lower_indices(matrix: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(matrix.shape[-1], matrix.shape[-1], offset=offset, device=matrix.device)
    return rows, columns


def _to_lower(x: Float[Tensor, "*batch dim"], offset: int) -> Float[Tensor, "*batch size size"]:
    matrix = x.new_zeros(_matrix_shape(x.shape, offset))
    rows, columns = _lower_indices(matrix, offset)
    matrix[..., rows, columns] = x
    return matrix


def _matrix_shape(shape: Any, offset: int) -> torch.Size:
    dim = shape[-1]
    size = round(math.sqrt(2 * dim + 0.25) - 0.5) - offset
    if (size + offset) * (size + offset + 1) // 2 != dim:
        raise ValueError(f"{dim} coordinates fill no triangle")
    return torch.Size([*shape[:-1], size, size])

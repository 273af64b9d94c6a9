r"""Targets less what a line predicts of them, at the size of what is left: the frozen start of a posterior.

With features :math:`f` of the context and the ridge regression :math:`\theta \approx B f + b` of pilot draws, whose
errors have covariance :math:`C = L L^\top`,

.. math:: z = L^{-1} (\theta - B f - b).

Where the posterior is linear and Gaussian z is standard normal, however narrow the posterior is. What a flow has left
to learn is of size one, while its weights, trained at the size of the prior, would have to find a posterior of 1e-5 of
it. Sums are taken in double precision, and nothing here is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.densities.linear_start import predict_linearly
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.densities.standardise import InDouble

SMALLEST_SPREAD = 1e-7
"""Least standard deviation, of standardised targets, that is left: narrower ones are rounding in single precision."""


@rebuildable
class LinearResidual(InDouble):
    """Subtract the linear prediction of standardised targets and whiten what is left; the identity until fitted.

    Args:
        dim: Number of targets.
        num_features: Features of the context that predictions are made of.
        left_out: Targets that stay as they are, such as discrete ones.

    Example:
        >>> features = torch.randn(2_000, 1)
        >>> theta = 3.0 * features + 1e-4 * torch.randn(2_000, 1)
        >>> residual = LinearResidual(1, 1).fit_(theta, features)
        >>> z = residual(theta, residual.prediction(features))
        >>> bool(abs(z.std() - 1.0) < 0.01)
        True
    """

    weight: Tensor
    offset: Tensor
    whitening: Tensor
    colouring: Tensor

    def __init__(self, dim: int, num_features: int, left_out: Sequence[int] = ()) -> None:
        super().__init__()
        self.dim, self.num_features, self.left_out = dim, num_features, list(left_out)
        self.kept = [entry for entry in range(dim) if entry not in self.left_out]
        eye = torch.eye(dim, dtype=torch.double)
        self.register_buffer("weight", torch.zeros(num_features, dim, dtype=torch.double))
        self.register_buffer("offset", torch.zeros(dim, dtype=torch.double))
        self.register_buffer("whitening", eye.clone())
        self.register_buffer("colouring", eye)

    @torch.no_grad()
    def fit_(self, theta: Float[Tensor, "num dim"], features: Float[Tensor, "num num_features"]) -> LinearResidual:
        """Take predictions and the covariance of their errors from simulations, in place.

        Too few of them, or features that are not finite, leave it as it is.
        """
        kept = torch.tensor(self.kept, device=theta.device)
        if not len(kept) or len(theta) <= 2 * len(kept) or not features.isfinite().all():
            return self
        centred = features.double() - features.double().mean(0)
        scale = centred.square().mean(0).sqrt()
        scale = torch.where(scale > 0.0, scale, 1.0)
        prediction = predict_linearly(theta.double()[:, kept], features.double() / scale)
        spread = prediction.covariance + SMALLEST_SPREAD**2 * torch.eye(len(kept)).to(prediction.covariance)
        factor = torch.linalg.cholesky(spread)
        self.weight[:, kept] = (prediction.weight / scale).mT
        self.offset[kept] = prediction.offset
        rows, columns = kept[:, None], kept[None, :]
        self.colouring[rows, columns] = factor.mT
        identity = torch.eye(len(kept), dtype=torch.double, device=theta.device)
        self.whitening[rows, columns] = torch.linalg.solve_triangular(factor, identity, upper=False).mT
        return self

    def prediction(self, features: Float[Tensor, "*batch num_features"]) -> Float[Tensor, "*batch dim"]:
        """Return the prediction of each standardised target, zero for those left out."""
        return features.double() @ self.weight + self.offset

    def forward(
        self, theta: Float[Tensor, "*#batch dim"], prediction: Float[Tensor, "*#batch dim"]
    ) -> Float[Tensor, "... dim"]:
        """Return z of standardised targets, in double precision."""
        return (theta.double() - prediction) @ self.whitening

    def inverse(
        self, z: Float[Tensor, "*#batch dim"], prediction: Float[Tensor, "*#batch dim"]
    ) -> Float[Tensor, "... dim"]:
        """Undo `forward`."""
        return z.double() @ self.colouring + prediction

    def log_det(self) -> Float[Tensor, ""]:
        """Return the log-determinant of the Jacobian of `forward`, the same everywhere."""
        return self.whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1)

"""Scales of targets and contexts, learnt from simulations and kept outside the weights.

Means and scales are buffers: they travel with `state_dict` and across devices, and no optimiser sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.rebuilding import rebuildable


class InDouble(nn.Module):
    """A module whose buffers in double precision stay so where a model is moved to single precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InDouble:
        def moved(tensor: Tensor) -> Tensor:
            stays = tensor.dtype == torch.double and not isinstance(tensor, nn.Parameter)
            return tensor.to(fn(tensor).device) if stays else fn(tensor)

        return super()._apply(moved, recurse)


@rebuildable
class Standardise(nn.Module):
    """Shift and scale vectors to mean zero and standard deviation one; the identity until fitted.

    Args:
        dim: Dimension of the vectors.
        groups: A number for each entry; entries with the same number share mean and scale, as those in one
            column of exchangeable rows must, and entries with -1 stay as they are. Default: each has its own.

    Example:
        >>> scaling = Standardise(2).fit_(torch.tensor([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0]]))
        >>> scaling.mean, scaling.scale  # a constant column keeps its scale
        (tensor([2., 7.]), tensor([2., 1.]))
        >>> scaling(torch.tensor([4.0, 8.0]))
        tensor([1., 1.])
        >>> Standardise(3, groups=[0, 0, -1]).fit_(torch.tensor([[1.0, 3.0, 5.0], [1.0, 3.0, 9.0]])).mean
        tensor([2., 2., 0.])
    """

    mean: Tensor
    scale: Tensor
    groups: Tensor

    def __init__(self, dim: int, groups: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dim = check_count(dim, "dim", minimum=0)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer(
            "groups", torch.arange(dim) if groups is None else torch.tensor(list(groups)).long(), persistent=False
        )

    @torch.no_grad()
    def fit_(self, x: Float[Tensor, "num dim"], dtype: torch.dtype | None = None) -> Standardise:
        """Take mean and standard deviation from at least two simulations, in place and without gradient.

        A column that is constant up to rounding, in the precision of `dtype` where simulations came in another than
        that of x, gets scale one: dividing by its deviation would amplify noise.
        """
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"x: expected shape (num, {self.dim}) with num >= 2, got {tuple(x.shape)}. "
                "Flatten batches to one dimension."
            )
        if not x.isfinite().all():
            num_wrong = int((~x.isfinite()).any(-1).sum())
            raise ArithmeticError(f"x: {num_wrong} of {x.shape[0]} vectors are not finite. Check the simulator.")
        if not self.dim:
            return self
        mean, deviation = self._pooled(x.mean(0), x.std(0))
        rounding = 8.0 * torch.finfo(dtype or x.dtype).eps * mean.abs()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > rounding, deviation, 1.0))
        return self

    def _pooled(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and deviations over all entries of a group, 0 and 0 where an entry stays as it is."""
        same = (self.groups[:, None] == self.groups) & (self.groups >= 0)
        if not (same.sum(1) > 1).any() and (self.groups >= 0).all():
            return mean, deviation
        share = same.to(mean.dtype) / same.sum(1).clamp(min=1)
        pooled = share @ mean
        variance = share @ (deviation.square() + mean.square()) - pooled.square()
        return pooled, variance.clamp(min=0.0).sqrt()

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Standardise."""
        return (x - self.mean) / self.scale

    def inverse(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Undo `forward`."""
        return z * self.scale + self.mean

    def log_det(self) -> Float[Tensor, ""]:
        """Return the log-determinant of the Jacobian of `forward`, the same everywhere."""
        return -self.scale.log().sum()


def summarise(
    context: Float[Tensor, "*batch context_dim"], summary: nn.Module | None, *, num_bypass: int
) -> Float[Tensor, "*batch encoded_dim"]:
    """Return the summary of all but the last `num_bypass` entries of a standardised context, and those as they are."""
    if summary is None:
        return context
    seen, bypassing = context.split([context.shape[-1] - num_bypass, num_bypass], -1)
    features = summary(seen.reshape(math.prod(seen.shape[:-1]), seen.shape[-1]))
    return torch.cat([features.reshape(*seen.shape[:-1], features.shape[-1]), bypassing], -1)

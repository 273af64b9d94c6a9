r"""Standardisation of targets and contexts, learned from simulations and kept outside the weights.

With means :math:`\mu` and standard deviations :math:`\sigma` of simulated targets and :math:`c` the standardised, then
summarised context,

.. math:: q(\theta \mid c) = q_z\big( (\theta - \mu) / \sigma \mid c \big) \prod_i \sigma_i^{-1} .

Means and scales are buffers: they travel with `state_dict` and across devices, and no optimiser sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.contract import as_density, evaluating
from pyro_voed.densities.distribution import Density
from pyro_voed.densities.rebuilding import rebuildable


@rebuildable
class Standardise(nn.Module):
    """Shift and scale vectors to mean zero and standard deviation one; the identity until fitted.

    Args:
        dim: Dimension of the vectors.
        groups: A number for each entry; entries of one number share mean and scale, as those in one column of
            exchangeable rows must, and entries of number -1 stay as they are. Default: each has its own.

    Example:
        >>> scaling = Standardise(2).fit_(torch.tensor([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0]]))
        >>> scaling.mean, scaling.scale  # a constant column keeps its scale
        (tensor([2., 7.]), tensor([2., 1.]))
        >>> scaling(torch.tensor([4.0, 8.0]))
        tensor([1., 1.])
        >>> Standardise(3, groups=torch.tensor([0, 0, -1])).fit_(torch.tensor([[1.0, 3.0, 5.0], [1.0, 3.0, 9.0]])).mean
        tensor([2., 2., 0.])
    """

    mean: Tensor
    scale: Tensor
    groups: Tensor

    def __init__(self, dim: int, groups: Int[Tensor, " dim"] | None = None) -> None:
        super().__init__()
        self.dim = check_count(dim, "dim", minimum=0)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("groups", torch.arange(dim) if groups is None else groups, persistent=False)

    @torch.no_grad()
    def fit_(self, x: Float[Tensor, "num dim"]) -> Standardise:
        """Take mean and standard deviation from simulations, in place and without gradient.

        A column that is constant up to rounding gets scale one: dividing by its deviation would blow noise up.

        Args:
            x: At least two simulated vectors.

        Raises:
            ValueError: If the shape is wrong or there are fewer than two vectors.
            ArithmeticError: If a value is not finite.
        """
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"x: expected shape (num, {self.dim}) with num >= 2, got {tuple(x.shape)}. "
                "Flatten batches to one dimension."
            )
        if not x.isfinite().all():
            num_wrong = int((~x.isfinite()).any(-1).sum())
            raise ArithmeticError(f"x: {num_wrong} of {x.shape[0]} vectors are not finite. Check the simulator.")
        mean, deviation = self._pooled(x.mean(0), x.std(0))
        rounding = 8.0 * torch.finfo(x.dtype).eps * mean.abs()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > rounding, deviation, 1.0))
        return self

    def refit_(self, x: Float[Tensor, "num dim"]) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
        """Fit anew; return the factor and the shift for which what was given as z is now (z - shift) / factor."""
        mean, scale = self.mean.clone(), self.scale.clone()
        self.fit_(x)
        return self.scale / scale, (self.mean - mean) / scale

    def _pooled(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and deviations over all entries of a group, 0 and 0 where an entry stays as it is."""
        same = (self.groups[:, None] == self.groups) & (self.groups >= 0)
        if not (same.sum(1) > 1).any() and (self.groups >= 0).all():
            return mean, deviation
        share = same / same.sum(1).clamp(min=1)
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


@runtime_checkable
class Startable(Protocol):
    """A density that can start at pilot draws."""

    def start_(self, theta: Tensor, context: Tensor) -> None:
        """Take what can be had in closed form from standardised draws."""


@runtime_checkable
class Rescalable(Protocol):
    """A density or critic that can stay what it is when its context gets another scale."""

    def rescale_(self, factor: Tensor, shift: Tensor) -> None:
        """Stay the same function of contexts c that from now on come as (c - shift) / factor."""


@torch.no_grad()
def rescale_layer_(layer: nn.Module, factor: Float[Tensor, " dim"], shift: Float[Tensor, " dim"]) -> None:
    """Let a linear layer stay the same function of inputs c that from now on come as (c - shift) / factor, in place."""
    assert isinstance(layer, nn.Linear)
    layer.bias.add_(layer.weight @ shift)
    layer.weight.mul_(factor)


@rebuildable
class StandardisedDensity(Density):
    """Standardise theta and context, summarise the context, then apply a density; in raw coordinates outside.

    The context runs through its scaling, then all but its last `num_bypass` entries through the summary, whose output
    and the bypassing entries (design values, say) are what the density sees.

    Args:
        density: Anything `as_density` takes, of standardised theta and summarised context.
        theta_scaling: Scaling of theta.
        context_scaling: Scaling of the raw context.
        summary: A module that maps standardised contexts (*batch, dim) to features (*batch, summary_dim); None for the
            identity.
        num_bypass: How many of the last context entries the summary does not see.

    Raises:
        ValueError: If the dimensions do not fit together.

    Example:
        >>> from pyro_voed.densities import AffineCouplingFlow
        >>> summary = nn.Linear(10, 4)  # of ten outcomes; the eleventh entry is the design
        >>> flow = AffineCouplingFlow(theta_dim=2, context_dim=4 + 1)
        >>> density = StandardisedDensity(flow, Standardise(2), Standardise(11), summary, num_bypass=1)
        >>> density.condition(torch.zeros(5, 11)).sample().shape
        torch.Size([5, 2])
    """

    density: Any

    def __init__(
        self,
        density: Any,
        theta_scaling: Standardise,
        context_scaling: Standardise,
        summary: nn.Module | None = None,
        *,
        num_bypass: int = 0,
    ) -> None:
        super().__init__()
        self.theta_dim = theta_scaling.dim
        self.context_dim = context_scaling.dim
        self.num_bypass = check_count(num_bypass, "num_bypass", minimum=0)
        if num_bypass > self.context_dim:
            raise ValueError(
                f"num_bypass: expected at most the context's dimension {self.context_dim}, got {num_bypass}."
            )
        self.theta_scaling = theta_scaling
        self.context_scaling = context_scaling
        self.summary = summary
        with torch.no_grad(), evaluating(self):
            encoded = self.encode(context_scaling.mean.expand(2, -1))
        self.density = as_density(density, self.theta_dim, encoded.shape[-1])
        self.has_rsample: bool = self.density.has_rsample

    def encode(self, context: Float[Tensor, "*batch context_dim"]) -> Float[Tensor, "*batch encoded_dim"]:
        """Return what the density sees of a raw context."""
        standardised = self.context_scaling(context)
        if self.summary is None:
            return standardised
        seen, bypassing = standardised.split([self.context_dim - self.num_bypass, self.num_bypass], -1)
        return torch.cat([self.summary(seen), bypassing], -1)

    @torch.no_grad()
    def start_(self, theta: Float[Tensor, "num theta_dim"], context: Float[Tensor, "num context_dim"]) -> None:
        """Let a flow start at the linear-Gaussian posterior of pilot draws; other densities stay as they are.

        Args:
            theta: Raw draws, which must take no part in choosing when training stops.
            context: Their raw contexts.
        """
        if isinstance(self.density, Startable):
            with evaluating(self):
                self.density.start_(self.theta_scaling(theta), self.encode(context))

    @torch.no_grad()
    def rescale_context_(self, context: Float[Tensor, "num context_dim"]) -> None:
        """Standardise contexts as they now are; a flow stays the density of raw contexts that it was.

        Behind a summary, which is no linear map, the density is another afterwards, as densities of other kinds are.

        Args:
            context: Raw contexts.
        """
        change = self.context_scaling.refit_(context)
        if self.summary is None and isinstance(self.density, Rescalable):
            self.density.rescale_(*change)

    def log_prob(
        self, theta: Float[Tensor, "*#batch theta_dim"], context: Float[Tensor, "*#batch context_dim"]
    ) -> Float[Tensor, "..."]:
        """Return the log-density of raw theta given the raw context; the batches broadcast."""
        return self.density.log_prob(self.theta_scaling(theta), self.encode(context)) + self.theta_scaling.log_det()

    def draw(
        self, context: Float[Tensor, "*batch context_dim"], batch_shape: Sequence[int]
    ) -> Float[Tensor, "... theta_dim"]:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""
        return self.theta_scaling.inverse(self.density.draw(self.encode(context), batch_shape))


def context_groups(summary: nn.Module | None, context_dim: int, *, num_bypass: int) -> Int[Tensor, " context_dim"]:
    """Return which context entries share a scale: those that the summary says, the others each on its own.

    Args:
        summary: Sees all but the last `num_bypass` entries; its method `column_groups(dim)` says which of them do.
        context_dim: Entries in all.
        num_bypass: Entries that the summary does not see.

    Example:
        >>> from pyro_voed.summaries import DeepSetSummary
        >>> context_groups(DeepSetSummary(row_dim=2), 5, num_bypass=1)  # two rows of two, and a design
        tensor([0, 1, 0, 1, 6])
    """
    own = getattr(summary, "column_groups", None)
    if own is None or num_bypass == context_dim:
        return torch.arange(context_dim)
    bypassing = torch.arange(context_dim - num_bypass, context_dim)
    seen = own(context_dim - num_bypass)
    # Numbers that the summary's own cannot have.
    return torch.cat([seen, bypassing + int(seen.max()) + 1])

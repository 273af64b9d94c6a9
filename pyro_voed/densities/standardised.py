r"""A density behind standardisation and a summary.

With means :math:`\mu` and standard deviations :math:`\sigma` of simulated targets and :math:`c` the standardised, then
summarised context,

.. math:: q(\theta \mid c) = q_z\big( (\theta - \mu) / \sigma \mid c \big) \prod_i \sigma_i^{-1} .
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.contract import as_density, evaluating
from pyro_voed.densities.distribution import Context, Density, LogProb, Theta
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.densities.standardise import Standardise, summarise


@runtime_checkable
class Startable(Protocol):
    """A density that can start from pilot draws."""

    def start_(self, theta: Tensor, context: Tensor) -> None:
        """Set in closed form what standardised draws allow."""


@runtime_checkable
class Rescalable(Protocol):
    """A density or critic that can stay what it is when its context gets another scale."""

    def rescale_(self, factor: Tensor, shift: Tensor) -> None:
        """Stay the same function of contexts c that from now on come as (c - shift) / factor."""


@rebuildable
class StandardisedDensity(Density):
    """Standardise theta and context, summarise the context, then apply a density; in raw coordinates outside.

    The context runs through its scaling, then all but its last `num_bypass` entries through the summary, whose output
    and the bypassing entries (design values, say) are what the density sees.

    Args:
        density: Anything `as_density` takes, of standardised theta and summarised context.
        theta_scaling: Scaling of theta.
        context_scaling: Scaling of the raw context.
        summary: A module that maps standardised contexts (num, dim) to features (num, summary_dim), or None.
        num_bypass: How many of the last context entries the summary does not see.

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
        return summarise(self.context_scaling(context), self.summary, num_bypass=self.num_bypass)

    @torch.no_grad()
    def start_(self, theta: Float[Tensor, "num theta_dim"], context: Float[Tensor, "num context_dim"]) -> None:
        """Let a flow start at the linear-Gaussian posterior of raw pilot draws; other densities stay as they are.

        None of the draws may be among those that decide when training stops.
        """
        if isinstance(self.density, Startable):
            with evaluating(self):
                self.density.start_(self.theta_scaling(theta), self.encode(context))

    @torch.no_grad()
    def rescale_context_(self, context: Float[Tensor, "num context_dim"]) -> None:
        """Standardise raw contexts as they now are; a flow stays the density of these that it was.

        Behind a summary, which is not a linear map, the density changes, and so do densities without `rescale_`.
        """
        change = self.context_scaling.refit_(context)
        if self.summary is None and isinstance(self.density, Rescalable):
            self.density.rescale_(*change)

    def log_prob(self, theta: Theta, context: Context) -> LogProb:
        """Return the log-density of raw theta given the raw context; the batches broadcast."""
        return self.density.log_prob(self.theta_scaling(theta), self.encode(context)) + self.theta_scaling.log_det()

    def draw(self, context: Context, batch_shape: Sequence[int]) -> Float[Tensor, "... theta_dim"]:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""
        return self.theta_scaling.inverse(self.density.draw(self.encode(context), batch_shape))

"""A conditional density at one context, as a Pyro distribution.

`FlowDistribution` holds the context and a reference to the density, and nothing computed from them. So there is no
cache to go stale: a second backward pass works, and after an optimiser step the log-density is that of the new weights.
A call costs one pass of the context through the trunk, for any number of samples: they broadcast against it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

Theta = Float[Tensor, "*#batch theta_dim"]
Context = Float[Tensor, "*#batch context_dim"]
LogProb = Float[Tensor, "..."]


class Density(nn.Module, ABC):
    """The densities of this package: modules that state a log-density and draw, from which the rest follows."""

    theta_dim: int
    context_dim: int
    has_rsample: bool

    @abstractmethod
    def log_prob(self, theta: Theta, context: Context) -> LogProb:
        """Return the log-density of theta given the context, nats; the batches broadcast."""

    @abstractmethod
    def draw(self, context: Context, batch_shape: Sequence[int]) -> Float[Tensor, "... theta_dim"]:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""

    def condition(self, context: Context) -> FlowDistribution:
        """Return the distribution of theta given the context."""
        return FlowDistribution(self, context)

    def forward(self, theta: Theta, context: Context) -> LogProb:
        """Return `log_prob`, under the name by which `torch.func.functional_call` reaches a module."""
        return self.log_prob(theta, context)


class FlowDistribution(TorchDistribution):
    """Condition a density on a context.

    Args:
        density: A `Density`, or an object that has all that one has; its weights are read at each call.
        context: Shape (*batch, context_dim).
        batch_shape: Shape to which the batch shape of the context broadcasts; by default that batch shape itself.
        validate_args: As for every torch distribution.

    Example:
        >>> from pyro_voed.densities import AffineCouplingFlow
        >>> conditioned = AffineCouplingFlow(2, 3).condition(torch.zeros(5, 3))
        >>> conditioned.batch_shape, conditioned.event_shape, conditioned.sample((4,)).shape
        (torch.Size([5]), torch.Size([2]), torch.Size([4, 5, 2]))
    """

    arg_constraints = {"context": constraints.real_vector}  # noqa: RUF012 (torch's own convention)
    support = constraints.real_vector

    def __init__(
        self,
        density: Any,
        context: Context,
        batch_shape: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if context.shape[-1] != density.context_dim:
            raise ValueError(
                f"context: expected shape (..., {density.context_dim}), got {tuple(context.shape)}. "
                "Build the density with the context_dim of your data."
            )
        self.density = density
        self.context = context
        batch_shape = context.shape[:-1] if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch_shape, torch.Size([density.theta_dim]), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients to the weights and the context."""
        return self.density.has_rsample

    def expand(self, batch_shape: Sequence[int], _instance: FlowDistribution | None = None) -> FlowDistribution:
        """Return the same distribution with a larger batch shape; the network still sees each context once."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.density = self.density
        new.context = self.context
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Theta) -> LogProb:
        """Return the log-density at the value under the current weights."""
        if self._validate_args:
            self._validate_sample(value)
        batch_shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.density.log_prob(value.expand(batch_shape + self.event_shape), self.context)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "... theta_dim"]:
        """Return draws that carry gradients."""
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self.density).__name__} has draws without gradients: use sample(), or a density that is a flow."
            )
        return self.density.draw(self.context, torch.Size(sample_shape) + self.batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "... theta_dim"]:
        """Return draws without gradients."""
        with torch.no_grad():
            return self.density.draw(self.context, torch.Size(sample_shape) + self.batch_shape)

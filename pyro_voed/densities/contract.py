"""What the library asks of a conditional density, and how densities of other libraries are adapted to it.

The contract is Pyro's own: `condition(context)` returns a distribution. `as_density` turns other densities into a
`torch.nn.Module` with `condition`, `log_prob`, `draw`, `theta_dim` and `context_dim`:

- the flows of this package and anything else that has all of these: unchanged;
- modules with `condition(context)` alone;
- Zuko's lazy distributions, modules whose call with a context returns a distribution;
- Pyro's `ConditionalTransformedDistribution`, which is not a module: its transforms that are modules become visible to
  optimisers.

Zuko is recognised by behaviour and never imported: its import turns argument validation off in the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pyro.distributions import ConditionalTransformedDistribution, TransformedDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_voed.checks import check_count
from pyro_voed.densities.distribution import Context, Density, LogProb, Theta


@runtime_checkable
class ConditionalDensity(Protocol):
    """A density of a vector given a context."""

    def condition(self, context: Tensor) -> Distribution:
        """Return a distribution of event shape (theta_dim,) and batch shape `context.shape[:-1]`."""


class AdaptedDensity(Density):
    """Adapt a density of another library; made by `as_density`."""

    def __init__(self, source: Any, theta_dim: int, context_dim: int) -> None:
        super().__init__()
        self.theta_dim, self.context_dim = theta_dim, context_dim
        self.source, self.has_rsample = source, True
        if not isinstance(source, nn.Module):
            self.transforms = nn.ModuleList(_modules_of(source))

    def log_prob(self, theta: Theta, context: Context) -> LogProb:
        """Return the log-density of theta given the context; the batches broadcast."""
        batch_shape = torch.broadcast_shapes(theta.shape[:-1], context.shape[:-1])
        conditioned = self.conditioned(context.expand(*batch_shape, context.shape[-1]))
        log_prob = conditioned.log_prob(theta.expand(*batch_shape, theta.shape[-1]))
        _forget(conditioned, self)
        return log_prob

    def draw(self, context: Context, batch_shape: Sequence[int]) -> Float[Tensor, "... theta_dim"]:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""
        conditioned = self.conditioned(context.expand(*batch_shape, context.shape[-1]))
        theta = conditioned.rsample() if self.has_rsample else conditioned.sample()
        _forget(conditioned, self)
        return theta

    def conditioned(self, context: Tensor) -> Any:
        """Return what the source gives for a context: a distribution, as `_probe` checks."""
        source = self.source
        if not isinstance(source, ConditionalTransformedDistribution):
            return source.condition(context) if isinstance(source, ConditionalDensity) else source(context)
        # On a base of the context's batch shape: with Pyro's own, of shape (), `sample` raises.
        base = source.base_dist.condition(context).expand(context.shape[:-1])
        return TransformedDistribution(base, [transform.condition(context) for transform in source.transforms])


def as_density(density: Any, theta_dim: int, context_dim: int) -> nn.Module:
    """Return a density as a module that fulfils the contract, or say why that is impossible.

    The result shares its weights with the density given. A Pyro base distribution stays on its device.

    Args:
        density: A flow of this package, a module with `condition(context)`, a Zuko lazy distribution, or a Pyro
            `ConditionalTransformedDistribution`; TypeError if it is none of these.
        theta_dim: Dimension of theta.
        context_dim: Dimension of the context; ValueError if the density has other dimensions.

    Example:
        >>> import pyro.distributions as dist
        >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> coupling = dist.transforms.conditional_affine_coupling(2, context_dim=3)
        >>> density = as_density(dist.ConditionalTransformedDistribution(base, [coupling]), theta_dim=2, context_dim=3)
        >>> density.condition(torch.zeros(5, 3)).sample().shape
        torch.Size([5, 2])
    """
    check_count(theta_dim, "theta_dim")
    check_count(context_dim, "context_dim", minimum=0)
    if fulfils_contract(density):
        if (density.theta_dim, density.context_dim) != (theta_dim, context_dim):
            raise ValueError(
                f"density: expected theta_dim {theta_dim} and context_dim {context_dim}, got {density.theta_dim} and "
                f"{density.context_dim} from {type(density).__name__}. Build it with the dimensions of your data."
            )
        return density
    if not isinstance(density, nn.Module | ConditionalTransformedDistribution):
        raise TypeError(
            "density: expected a flow of pyro_voed.densities, a torch module with condition(context), a Zuko lazy "
            f"distribution or a Pyro ConditionalTransformedDistribution, got {type(density).__name__}. Pass the "
            "density itself, before it is conditioned."
        )
    adapted = AdaptedDensity(density, theta_dim, context_dim)
    adapted.has_rsample = _probe(adapted).has_rsample
    return adapted


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while: a batch norm would learn from the probe."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def fulfils_contract(density: Any) -> bool:
    """Return whether an object is a module with all that densities of this package have."""
    return isinstance(density, nn.Module) and all(
        hasattr(density, name) for name in ("condition", "log_prob", "draw", *Density.__annotations__)
    )


def _modules_of(source: ConditionalTransformedDistribution) -> list[nn.Module]:
    """Return the parts that have weights, including those that Pyro has wrapped as constant."""
    transforms = [getattr(transform, "transform", transform) for transform in source.transforms]
    return [part for part in (source.base_dist, *transforms) if isinstance(part, nn.Module)]


def _forget(conditioned: Distribution, density: nn.Module) -> None:
    """Clear the caches of transforms, which outlive a call where a transform ignores the context.

    A cached pair keeps its graph, so a second backward pass would fail, and is wrong once an optimiser has stepped.
    """
    for part in (*getattr(conditioned, "transforms", ()), *density.modules()):
        if isinstance(part, Transform):
            part.clear_cache()  # type: ignore[attr-defined]  # patched in by Pyro


def _probe(adapted: AdaptedDensity) -> Distribution:
    """Condition on two contexts and evaluate, with every check of the outcome; return the distribution."""
    name = type(adapted.source).__name__
    like = next(adapted.parameters(), torch.empty(()))
    context, theta = like.new_zeros(2, adapted.context_dim), like.new_zeros(2, adapted.theta_dim)
    expected = f"theta_dim {adapted.theta_dim} and context_dim {adapted.context_dim}"
    log_prob_shape = None
    with torch.no_grad(), evaluating(adapted):
        try:
            conditioned = adapted.conditioned(context)
            if isinstance(conditioned, Distribution):
                log_prob_shape = conditioned.log_prob(theta).shape
        # Other libraries raise anything on wrong shapes.
        except Exception as error:
            raise ValueError(
                f"density: a {name} failed on {expected}: {error!r}. Build it with the dimensions of your data, and so "
                "that the log-density of a given theta can be evaluated."
            ) from error
    if log_prob_shape is None:
        raise TypeError(
            f"density: expected that {name}, given a context, returns a torch distribution, got "
            f"{type(conditioned).__name__}. Give the module a method condition(context) that returns one."
        )
    shapes = (conditioned.batch_shape, conditioned.event_shape, log_prob_shape)
    if shapes != ((2,), (adapted.theta_dim,), (2,)):
        raise ValueError(
            f"density: for {expected} and two contexts expected batch shape (2,) and event shape "
            f"({adapted.theta_dim},), got {tuple(shapes[0])} and {tuple(shapes[1])} from {name}. Build it with the "
            "dimensions of your data."
        )
    return conditioned

r"""Densities of discrete and of mixed vectors.

Discrete entries :math:`m = (m_1, ..., m_D)` with finitely many values each are modelled by a classifier in chain-rule
order, continuous ones by a flow given them too:

.. math::
    q(m, \theta \mid c) = \prod_d q(m_d \mid m_{<d}, c) \; q(\theta \mid m, c).

The classifier starts at the frequencies it is given, the flow at a standard normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.contract import as_density
from pyro_voed.densities.distribution import Context, Density, LogProb, Theta
from pyro_voed.densities.layers import perceptron
from pyro_voed.densities.rebuilding import rebuildable


@rebuildable
class Classifier(Density):
    """Model the probabilities of discrete vectors given a context.

    Args:
        values: The values that each entry can take, one 1-d tensor for each entry.
        context_dim: Dimension of the context.
        hidden_dim: Width of the hidden layers.
        frequencies: Probabilities that each entry's values start with; default: equal ones.

    Example:
        >>> classifier = Classifier([torch.tensor([0.0, 1.0])], context_dim=3)
        >>> classifier.log_prob(torch.ones(2, 1), torch.zeros(2, 3)).exp()
        tensor([0.5000, 0.5000], grad_fn=...)
    """

    has_rsample = False

    def __init__(
        self,
        values: Sequence[Tensor],
        context_dim: int,
        *,
        hidden_dim: int = 64,
        frequencies: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not values or any(entry.dim() != 1 or len(entry) < 1 for entry in values):
            raise ValueError("values: expected one 1-d tensor of values for each discrete entry.")
        self.theta_dim, self.context_dim = len(values), check_count(context_dim, "context_dim", minimum=0)
        self.sizes = [len(entry) for entry in values]
        for index, entry in enumerate(values):
            self.register_buffer(f"values_{index}", entry.clone())
        seen = [context_dim + sum(self.sizes[:index]) for index in range(self.theta_dim)]
        self.heads = nn.ModuleList(
            perceptron([max(1, dim), hidden_dim, hidden_dim, size]) for dim, size in zip(seen, self.sizes, strict=True)
        )
        for index, head in enumerate(self.heads):
            last: Any = list(head.children())[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            if frequencies is not None:
                with torch.no_grad():
                    last.bias.copy_(frequencies[index].log())

    def log_prob(self, theta: Theta, context: Context) -> LogProb:
        """Return the log probability; -inf where an entry is not one of its values."""
        batch = torch.broadcast_shapes(theta.shape[:-1], context.shape[:-1])
        seen, theta = context.expand(*batch, -1), theta.expand(*batch, -1)
        total = theta.new_zeros(batch)
        for index, head in enumerate(self.heads):
            matches = self.one_hot(theta, index)
            log_probs = torch.log_softmax(head(_not_empty(seen)), -1)
            # Not a product: another value, of probability zero, would give 0 * -inf.
            picked = torch.where(matches, log_probs, torch.zeros_like(log_probs)).sum(-1)
            total = total + torch.where(matches.any(-1), picked, torch.full_like(picked, -torch.inf))
            seen = torch.cat([seen, matches.to(seen.dtype)], -1)
        return total

    def draw(self, context: Float[Tensor, "*batch context_dim"], batch_shape: Sequence[int]) -> Tensor:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""
        seen, entries = context.expand(*batch_shape, -1), []
        for index, head in enumerate(self.heads):
            picked = torch.distributions.Categorical(logits=head(_not_empty(seen))).sample()
            entries.append(self._values(index)[picked])
            matches = nn.functional.one_hot(picked, self.sizes[index])
            seen = torch.cat([seen, matches.to(seen.dtype)], -1)
        return torch.stack(entries, -1).to(context.dtype)

    def one_hot(self, theta: Tensor, index: int) -> Tensor:
        """Return which of its values entry `index` has, `(*batch, size)` of bools."""
        return theta[..., index, None] == self._values(index)

    def _values(self, index: int) -> Tensor:
        return getattr(self, f"values_{index}")


@rebuildable
class MixedDensity(Density):
    """Model vectors with some discrete entries: a classifier of these, and a density of the others given them.

    Args:
        classifier: Models the discrete entries given the context.
        density: Models the continuous entries given the context and the one-hot discrete entries.
        is_discrete: Which entries are discrete, `(theta_dim,)`.

    Example:
        >>> from pyro_voed.densities import SplineCouplingFlow
        >>> classifier = Classifier([torch.tensor([0.0, 1.0])], context_dim=3)
        >>> mixed = MixedDensity(classifier, SplineCouplingFlow(2, 3 + 2), torch.tensor([False, True, False]))
        >>> mixed.log_prob(torch.zeros(4, 3), torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    has_rsample = False
    discrete: Tensor
    continuous: Tensor
    order: Tensor

    def __init__(self, classifier: Classifier, density: Any, is_discrete: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.theta_dim, self.context_dim = len(is_discrete), classifier.context_dim
        self.density: Any = as_density(
            density, self.theta_dim - classifier.theta_dim, self.context_dim + sum(classifier.sizes)
        )
        # Indices, not a mask: a mask gives shapes that depend on values, which stacking does not allow.
        self.register_buffer("discrete", is_discrete.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("continuous", (~is_discrete).nonzero().squeeze(-1), persistent=False)
        # Where each entry of (discrete, continuous) goes in the vector.
        self.register_buffer("order", torch.cat([self.discrete, self.continuous]).argsort(), persistent=False)

    def log_prob(self, theta: Theta, context: Context) -> LogProb:
        """Return the log density with respect to counting times Lebesgue measure."""
        batch = torch.broadcast_shapes(theta.shape[:-1], context.shape[:-1])
        theta, context = theta.expand(*batch, -1), context.expand(*batch, -1)
        discrete, continuous = theta.index_select(-1, self.discrete), theta.index_select(-1, self.continuous)
        given = torch.cat([context, self._encoded(discrete)], -1)
        return self.classifier.log_prob(discrete, context) + self.density.log_prob(continuous, given)

    def draw(self, context: Float[Tensor, "*batch context_dim"], batch_shape: Sequence[int]) -> Tensor:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""
        context = context.expand(*batch_shape, -1)
        discrete = self.classifier.draw(context, batch_shape)
        given = torch.cat([context, self._encoded(discrete)], -1)
        joined = torch.cat([discrete, self.density.condition(given).sample()], -1)
        return joined[..., self.order]

    def _encoded(self, discrete: Tensor) -> Tensor:
        matches = [self.classifier.one_hot(discrete, index) for index in range(self.classifier.theta_dim)]
        return torch.cat(matches, -1).to(discrete.dtype)


def _not_empty(seen: Tensor) -> Tensor:
    # A classifier without context sees the constant one, so its head learns plain numbers.
    return seen if seen.shape[-1] else seen.new_ones(*seen.shape[:-1], 1)

"""Densities of equal structure with their weights stacked: trained together, each as if it were alone.

On a CPU a training step of a small flow is mostly the overhead of its many small operations. Stacked, all members go
through each operation at once (`torch.func.vmap`). They share no weight, no scaling and no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from pyro_voed.densities.distribution import Density
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.densities.standardise import InDouble
from pyro_voed.densities.standardised import StandardisedDensity


@rebuildable
class StackedDensity(InDouble, Density):
    """Hold densities of equal structure as one module, whose members are the last batch dimension of its arguments.

    Members have equal structure (else ValueError), dtype and device, and no recurrent networks (NotImplementedError).

    Example:
        >>> from pyro_voed.densities import SplineCouplingFlow, Standardise
        >>> made = [StandardisedDensity(SplineCouplingFlow(2, 3), Standardise(2), Standardise(3)) for _ in range(4)]
        >>> stacked = StackedDensity(made)
        >>> stacked.log_prob(torch.zeros(100, 4, 2), torch.zeros(100, 4, 3)).shape
        torch.Size([100, 4])
    """

    def __init__(self, members: Sequence[StandardisedDensity]) -> None:
        super().__init__()
        _check_alike(members)
        self.num_members = len(members)
        self.theta_dim, self.context_dim = members[0].theta_dim, members[0].context_dim
        self.has_rsample = members[0].has_rsample
        weights, buffers = stack_module_state(list(members))
        travelling = members[0].state_dict().keys()
        # A module's own names contain dots, which those of parameters and buffers may not.
        self._weight_names = {name.replace(".", "/"): name for name in weights}
        self._buffer_names = {name.replace(".", "/"): name for name in buffers}
        trained = {name: weight.requires_grad for name, weight in members[0].named_parameters()}
        self.weights = nn.ParameterDict(
            {key: nn.Parameter(weights[name].detach(), trained[name]) for key, name in self._weight_names.items()}
        )
        # Buffers that do not travel with the state are constants, equal in all members: they are not stacked.
        self._buffer_dims = {name: 0 if name in travelling else None for name in buffers}
        own = dict(members[0].named_buffers())
        for key, name in self._buffer_names.items():
            if name in travelling:
                self.register_buffer(key, buffers[name])
            else:
                self.register_buffer(key, own[name], persistent=False)
        # In a list, so that the pattern's own weights are not among those of this module.
        self._pattern = [copy.deepcopy(members[0])]

    def log_prob(
        self, theta: Float[Tensor, "*batch members theta_dim"], context: Float[Tensor, "*batch members context_dim"]
    ) -> Float[Tensor, "*batch members"]:
        """Return each member's log-density of its own theta given its own context, nats."""
        weights = {name: self.weights[key] for key, name in self._weight_names.items()}
        buffers = {name: self.get_buffer(key) for key, name in self._buffer_names.items()}
        pattern = self._pattern[0]
        if pattern.training != self.training:  # as it is not a submodule
            pattern.train(self.training)

        in_dims = (0, self._buffer_dims, theta.dim() - 2, context.dim() - 2)
        each = vmap(partial(_log_prob_of, pattern), in_dims, out_dims=-1, randomness="different")
        return each(weights, buffers, theta, context)

    def draw(
        self, context: Float[Tensor, "*batch members context_dim"], batch_shape: Sequence[int]
    ) -> Float[Tensor, "... members theta_dim"]:
        """Return one draw of its member for each entry of `batch_shape`, whose last dimension is the members."""
        members = [self.member(index) for index in range(self.num_members)]
        own = context.expand(*batch_shape, self.context_dim).unbind(-2)
        return torch.stack([one.draw(given, given.shape[:-1]) for one, given in zip(members, own, strict=True)], -2)

    def constructor_arguments(self) -> dict[str, Any]:
        """Return members of equal structure, for `describe`; their weights are none of this module's."""
        return {"members": self._pattern * self.num_members}

    @property
    def summary(self) -> nn.Module | None:
        """A summary with the structure of the members' own; its weights are not the trained ones."""
        return self._pattern[0].summary

    def member(self, index: int) -> StandardisedDensity:
        """Return a copy of one member as a separate density."""
        alone = copy.deepcopy(self._pattern[0])
        state = {name: self.weights[key][index] for key, name in self._weight_names.items()}
        state |= {
            name: self.get_buffer(key)[index]
            for key, name in self._buffer_names.items()
            if self._buffer_dims[name] is not None
        }
        alone.to(next(iter(state.values()))).load_state_dict(state)
        return alone.train(self.training)

    @torch.no_grad()
    def select(self, members: Sequence[int]) -> StackedDensity:
        """Return some of the members, stacked."""
        return StackedDensity([self.member(index) for index in members])

    @torch.no_grad()
    def fit_scales_(
        self, theta: Float[Tensor, "num members theta_dim"], context: Float[Tensor, "num members context_dim"]
    ) -> None:
        """Take each member's scales from its own draws, see `StandardisedDensity`."""
        for index, own in enumerate(zip(theta.unbind(-2), context.unbind(-2), strict=True)):
            member = self.member(index)
            member.fit_scales_(*own)
            self._replace(index, member)

    def _replace(self, index: int, member: StandardisedDensity) -> None:
        """Take weights and scales of a member, in place."""
        state = member.state_dict()
        for key, name in self._weight_names.items():
            self.weights[key][index] = state[name]
        for key, name in self._buffer_names.items():
            if name in state:
                self.get_buffer(key)[index] = state[name]


def _log_prob_of(
    pattern: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], theta: Tensor, context: Tensor
) -> Tensor:
    """Return the log-density of one member, whose structure is the pattern's."""
    return functional_call(pattern, (weights, buffers), (theta, context))


def member_density(density: Any, index: int) -> Any:
    """Return the density for one design of a batch: a member of an ensemble, else the density that all share."""
    return density.member(index) if isinstance(density, StackedDensity) else density


def _check_alike(members: Sequence[StandardisedDensity]) -> None:
    if not members:
        raise ValueError("members: expected at least one density, got none.")
    if any(isinstance(part, nn.RNNBase) for part in members[0].modules()):
        raise NotImplementedError(
            "torch cannot run several recurrent networks stacked, as an ensemble, several learning rates or several "
            "starts do. Use one density for all designs (ensemble=False), one rate and start at a time, or a "
            "ConvolutionalSummary."
        )
    shapes = [{name: value.shape for name, value in (*m.named_parameters(), *m.named_buffers())} for m in members]
    for index, own in enumerate(shapes):
        if own != shapes[0]:
            differing = sorted(set(own.items()) ^ set(shapes[0].items()))[0][0]
            raise ValueError(
                f"members: expected densities of equal structure, but number {index} differs from the first at "
                f"'{differing}'. Build them alike."
            )

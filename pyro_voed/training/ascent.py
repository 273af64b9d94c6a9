"""One step of stochastic gradient ascent: gradients, clipping, Adam; for one set of parameters or for many stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Ascent:
    """Adam on groups of parameters, gradients taken for those alone, each group's clipped to the norm `clip_norm`.

    A group has `params` and `lr`. One whose tensors stack independent members also has `members`, their number: each is
    clipped by itself and climbs its own mean, not its share of the mean over all; `factors` scale each one's rate.
    """

    groups: Sequence[dict[str, Any]]
    clip_norm: float = 5.0
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        plain = [{key: group[key] for key in group if key not in ("members", "factors")} for group in self.groups]
        self._rates = [group["lr"] for group in plain]
        self.optimiser = torch.optim.Adam(plain, fused=True)
        self._stacks = [
            (group.get("members", 1), None if group.get("factors") is None else group["factors"].to(group["params"][0]))
            for group in self.groups
        ]
        self._members = [group["params"] for group in self.optimiser.param_groups]
        self._parameters = [parameter for members in self._members for parameter in members]

    def scale_rates(self, factor: float) -> None:
        """Set every group's rate to `factor` times its own."""
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate

    def step(self, bound: Tensor) -> bool:
        """Climb one step; return False, leaving the parameters alone, where a gradient is not finite."""
        finite = self._take_gradients(bound)
        if finite:
            self._move()
        self._drop_gradients()
        return finite

    def _take_gradients(self, bound: Tensor) -> bool:
        gradients = torch.autograd.grad(-bound, self._parameters, allow_unused=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            # Clipping writes in place, which an expanded gradient does not allow.
            parameter.grad = None if gradient is None else gradient.contiguous()
        norms = [
            torch.nn.utils.clip_grad_norm_(group, self.clip_norm)
            if members == 1
            else _clip_members(group, members, self.clip_norm)
            for group, (members, _) in zip(self._members, self._stacks, strict=True)
        ]
        # The norm of a group without gradients is a zero on the CPU, wherever the group itself is.
        return bool(torch.isfinite(torch.stack([norm.to(bound.device) for norm in norms])).all())

    def _move(self) -> None:
        before = [
            None if factors is None else [parameter.detach().clone() for parameter in group]
            for group, (_, factors) in zip(self._members, self._stacks, strict=True)
        ]
        self.optimiser.step()
        for group, old, (_, factors) in zip(self._members, before, self._stacks, strict=True):
            if old is not None and factors is not None:
                _scale_steps(group, old, factors)

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _clip_members(parameters: Sequence[Tensor], members: int, clip_norm: float) -> Tensor:
    """Make gradients of the mean over members those of each member's own mean, clip each, return the largest norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    torch._foreach_mul_(gradients, members)
    squares = [gradient.reshape(members, -1).square().sum(-1) for gradient in gradients]
    norms = torch.stack(squares).sum(0).sqrt()
    factor = (clip_norm / (norms + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factor.reshape(-1, *(1,) * (gradient.dim() - 1)))
    return norms.max()


@torch.no_grad()
def _scale_steps(parameters: Sequence[Tensor], before: Sequence[Tensor], factors: Tensor) -> None:
    """Shorten the step just taken by each member's own factor: Adam's step is proportional to its rate."""
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(torch.lerp(old, parameter, factors.reshape(-1, *(1,) * (parameter.dim() - 1))))

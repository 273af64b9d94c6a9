"""Plans of the learning rate: when it is constant, when it cools down, and when training ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import StopReason


@dataclass
class Plan:
    """When the rate is constant, when it cools down, and why."""

    total: int
    cooldown: int
    window: int
    fixed: bool
    start: int | None = None
    reason: StopReason = "budget"

    @property
    def end(self) -> int:
        """Step at which training ends."""
        return self.total if self.start is None else self.start + self.cooldown

    def starts_cooling(self, step: int, bounds: Sequence[float]) -> bool:
        """Return whether cooling down starts at a step, by the bounds so far."""
        if self.start is not None:
            return False
        plateau = step % self.window == 0 and step >= 2 * self.window and not self._rises(bounds)
        if step < self.total - self.cooldown and (self.fixed or not plateau):
            return False
        self.start = step
        # With a fixed number of steps only the look at the last windows tells whether it was enough.
        self.reason = "converged" if plateau or (step >= 2 * self.window and not self._rises(bounds)) else "budget"
        return True

    def _rises(self, bounds: Sequence[float]) -> bool:
        recent = torch.tensor(bounds[-2 * self.window :], dtype=torch.float64)
        before, now = recent[: self.window], recent[self.window :]
        (mean_before, error_before), (mean_now, error_now) = map(mean_and_standard_error, (before, now))
        return bool(mean_now - mean_before > torch.hypot(error_before, error_now))

    def factor(self, step: int) -> float:
        """Return the rate's factor at a step."""
        if self.start is None:
            return 1.0
        return half_cosine(step - self.start, self.cooldown)


@dataclass
class PoolPlan:
    """The rate on a pool: constant, then cooling down, then low where cooling down was too slow for a small pool."""

    patience: int
    phase: Literal["constant", "cooling", "low"] = "constant"
    length: int = 0
    epochs: int = 0
    stale: int = 0
    improved: bool = False

    def count(self, *, better: bool) -> None:
        """Count an epoch."""
        self.epochs += 1
        self.stale = 0 if better else self.stale + 1
        self.improved = self.improved or better

    @property
    def is_stalled(self) -> bool:
        """Whether this phase is over."""
        if self.phase == "cooling":
            return self.epochs >= self.length or self.stale >= max(self.patience, self.length // 2)
        return self.stale >= self.patience

    def goes_on(self) -> bool:
        """Enter the next phase; return whether there is one."""
        if self.phase == "constant":
            self.phase, self.length = "cooling", max(self.patience, self.epochs)
        elif self.phase == "cooling" and not self.improved:
            self.phase = "low"
        else:
            return False
        self.epochs, self.stale, self.improved = 0, 0, False
        return True

    @property
    def factor(self) -> float:
        """The rate's factor in the next epoch."""
        if self.phase == "cooling":
            return half_cosine(self.epochs, self.length)
        return 1.0 if self.phase == "constant" else 0.1


def half_cosine(step: int, length: int) -> float:
    """Return the rate's factor in a step of cooling down, which falls from 1 to 0 without reaching either."""
    return 0.5 * (1.0 + math.cos(math.pi * (step + 1) / (length + 1)))


class Best:
    """The best weights so far and how to put them back."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters, self.score = parameters, -math.inf
        self.weights: list[Tensor] = []

    def offer(self, score: float) -> bool:
        """Keep the weights if their score is the best so far; return whether it is."""
        if score <= self.score:
            return False
        self.score, self.weights = score, [parameter.detach().clone() for parameter in self.parameters]
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.copy_(weight)

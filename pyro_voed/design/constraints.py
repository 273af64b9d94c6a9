r"""Constraints between the entries of a design: their order, their distances, their sum.

Bounds of one entry belong to `pyro.param`. What couples entries is given to a search as `constraints=`:

==================================  ======================================================================
`increasing("xi", gap=0.0)`         every entry at least `gap` above the one before
`min_gap("xi", gap)`                any two entries at least `gap` apart, in whatever order they are
`fixed_sum("xi", total)`            entries, times `weights` if given, add up to `total`
`budget("xi", at_most)`             entries, times `weights` if given, add up to `at_most` or less
==================================  ======================================================================

Each is kept by the exact Euclidean projection, in the design's own units, onto what satisfies the constraint *and* the
bounds, :math:`\min_z \sum_i (z_i - x_i)^2`:

* Order is isotonic regression of :math:`x_i - i g`, by pooling adjacent violators; with bounds the level of a pool is
  its mean, moved into the bounds that all its members share. For distances the entries are sorted before and put back
  after, since no other order is nearer.
* A sum gives :math:`z_i = \operatorname{clip}(x_i - \tau w_i)` with one number :math:`\tau`. The sum falls in
  :math:`\tau` by straight lines between the points where an entry reaches a bound, so :math:`\tau` is found exactly.
* Several constraints of one design are projected onto by Dykstra's algorithm, in the order that the entries have.

References:
    Barlow, Bartholomew, Bremner and Brunk (1972), "Statistical inference under order restrictions"; Brucker (1984), "An
    O(n) algorithm for quadratic knapsack problems", Operations Research Letters 3; Boyle and Dykstra (1986), "A method
    for finding projections onto the intersection of convex sets in Hilbert spaces".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_voed.checks import check_positive
from pyro_voed.experiment.sites import DesignSite

ROUNDS = 1_000
AGREED = 1e-9
"""Dykstra's algorithm ends where a round moves no entry by more than this share of the design's size."""

OPEN_MARGIN = 1e-3
"""An end that an entry must not reach, as 0 for a positive one, is moved inside by this share of the design's size."""


@dataclass(frozen=True)
class Order:
    """Entries that keep a distance: each above the one before, or in the order that they have (`sorts`)."""

    label: str
    gap: float
    sorts: bool

    def __str__(self) -> str:
        return f"min_gap('{self.label}', {self.gap:g})" if self.sorts else f"increasing('{self.label}', {self.gap:g})"

    def projected(
        self,
        x: Float[Tensor, " dim"],
        low: Float[Tensor, " dim"],
        high: Float[Tensor, " dim"],
        order: Int[Tensor, " dim"],
    ) -> Float[Tensor, " dim"]:
        """Return the nearest admissible entries; `order` sorts those that the constraint is to keep sorted."""
        order = order if self.sorts else torch.arange(len(x))
        steps = self.gap * torch.arange(len(x), dtype=x.dtype)
        levels = _pooled((x[order] - steps).tolist(), *self._bounds(low[order], high[order]))
        out = torch.empty_like(x)
        out[order] = x.new_tensor(levels) + steps
        # Levels and steps are rounded apart.
        return torch.minimum(torch.maximum(out, low), high)

    def lacks(self, low: Float[Tensor, " dim"], high: Float[Tensor, " dim"]) -> str | None:
        """Say what is wrong where no design satisfies the constraint."""
        lows, highs = self._bounds(low, high)
        if all(one <= other + 1e-12 * (1 + abs(one)) for one, other in zip(lows, highs, strict=True)):
            return None
        return f"{len(low)} entries {self.gap:g} apart do not fit into [{low.min():g}, {high.max():g}]"

    def _bounds(self, low: Tensor, high: Tensor) -> tuple[list[float], list[float]]:
        """Return bounds of the levels that are left once neighbours' bounds are taken into account."""
        steps = self.gap * torch.arange(len(low), dtype=low.dtype)
        lows = (low - steps).cummax(0).values
        highs = (high - steps).flip(0).cummin(0).values.flip(0)
        return lows.tolist(), highs.tolist()


@dataclass(frozen=True)
class Sum:
    """Entries whose weighted sum is `total`, or at most that."""

    label: str
    total: float
    weights: tuple[float, ...] | None
    exactly: bool

    def __str__(self) -> str:
        return f"{'fixed_sum' if self.exactly else 'budget'}('{self.label}', {self.total:g})"

    def projected(
        self, x: Float[Tensor, " dim"], low: Float[Tensor, " dim"], high: Float[Tensor, " dim"], order: Any = None
    ) -> Float[Tensor, " dim"]:
        """Return the nearest admissible entries."""
        inside, weights = torch.minimum(torch.maximum(x, low), high), self._weights(x)
        if not self.exactly and weights @ inside <= self.total:
            return inside
        ends = torch.cat([(x - low) / weights, (x - high) / weights])
        ends = ends[torch.isfinite(ends)].unique()
        # Beyond the outermost of these points the sum goes on along a straight line.
        points = torch.cat([ends[:1] - 1, ends, ends[-1:] + 1]) if len(ends) else x.new_tensor([0.0, 1.0])
        at = torch.minimum(torch.maximum(x - points.unsqueeze(-1) * weights, low), high) @ weights  # it falls
        left = int((at >= self.total).sum().clamp(1, len(points) - 1)) - 1
        fall = at[left] - at[left + 1]
        share = (at[left] - self.total) / fall if fall > 0 else 0.0
        tau = points[left] + share * (points[left + 1] - points[left])
        return torch.minimum(torch.maximum(x - tau * weights, low), high)

    def lacks(self, low: Float[Tensor, " dim"], high: Float[Tensor, " dim"]) -> str | None:
        """Say what is wrong where no design satisfies the constraint."""
        if self.weights is not None and len(self.weights) != len(low):
            return f"expected {len(low)} weights, one for each entry, got {len(self.weights)}"
        weights = self._weights(low)
        least, most = (weights @ low).item(), (weights @ high).item()
        slack = 1e-12 * (1 + abs(self.total))
        if self.total < least - slack or (self.exactly and self.total > most + slack):
            return f"the bounds of the entries allow sums from {least:g} to {most:g}"
        return None

    def _weights(self, like: Tensor) -> Tensor:
        return torch.ones_like(like) if self.weights is None else like.new_tensor(self.weights)


Constraint = Order | Sum


def increasing(label: str, gap: float = 0.0) -> Constraint:
    """Keep the entries of a design in increasing order, each at least `gap` above the one before.

    Args:
        label: Name of the design, of one dimension.
        gap: Least difference of neighbours, at least 0, in the design's own unit.

    Example:
        >>> import torch
        >>> from pyro_voed.design.constraints import nearest
        >>> nearest([increasing("times")], torch.tensor([1.0, 4.0, 2.0]))
        tensor([1., 3., 3.])
    """
    if not 0.0 <= gap < math.inf:
        raise ValueError(f"gap: expected a finite number of at least 0, got {gap!r}.")
    return Order(label, float(gap), sorts=False)


def min_gap(label: str, gap: float) -> Constraint:
    """Keep any two entries of a design at least `gap` apart, in whatever order they are.

    Args:
        label: Name of the design, of one dimension.
        gap: Least distance, above 0, in the design's own unit.

    Example:
        >>> import torch
        >>> from pyro_voed.design.constraints import nearest
        >>> nearest([min_gap("times", 1.0)], torch.tensor([5.0, 2.0, 2.5]))
        tensor([5.0000, 1.7500, 2.7500])
    """
    return Order(label, float(check_positive(gap, "gap")), sorts=True)


def fixed_sum(label: str, total: float, weights: Sequence[float] | Tensor | None = None) -> Constraint:
    """Keep the sum of a design's entries at a total.

    Args:
        label: Name of the design, of any shape.
        total: The sum.
        weights: Positive factors of the entries in the sum, of the design's shape; default 1.

    Example:
        >>> import torch
        >>> from pyro_voed.design.constraints import nearest
        >>> nearest([fixed_sum("xi", 3.0)], torch.tensor([1.0, 1.0, 4.0]))
        tensor([0., 0., 3.])
    """
    return _sum(label, total, weights, exactly=True)


def budget(label: str, at_most: float, weights: Sequence[float] | Tensor | None = None) -> Constraint:
    """Keep the sum of a design's entries at or below a budget; arguments are those of `fixed_sum`.

    Example:
        >>> import torch
        >>> from pyro_voed.design.constraints import nearest
        >>> nearest([budget("xi", 3.0, weights=[1.0, 2.0])], torch.tensor([3.0, 2.5]))
        tensor([2.0000, 0.5000])
    """
    return _sum(label, at_most, weights, exactly=False)


def _sum(label: str, total: float, weights: Sequence[float] | Tensor | None, *, exactly: bool) -> Sum:
    if not math.isfinite(total):
        raise ValueError(f"{'total' if exactly else 'at_most'}: expected a finite number, got {total!r}.")
    factors = None if weights is None else torch.as_tensor(weights, dtype=torch.double).flatten()
    if factors is not None and not bool(((factors > 0) & torch.isfinite(factors)).all()):
        raise ValueError(f"weights: expected finite numbers above 0, got {factors.tolist()}.")
    return Sum(label, float(total), None if factors is None else tuple(factors.tolist()), exactly)


def nearest(
    constraints: Sequence[Constraint], value: Tensor, low: Tensor | float = -math.inf, high: Tensor | float = math.inf
) -> Tensor:
    """Return the admissible value nearest to one of a design, in double precision within.

    Args:
        constraints: Constraints of this design.
        value: The design, `(*shape)`.
        low, high: Bounds of the entries, as numbers or `(*shape)`.

    Raises:
        ArithmeticError: If no value satisfies all constraints together.
    """
    x = value.detach().cpu().double().flatten()
    ends = [torch.as_tensor(end).cpu().to(x).expand(value.shape).flatten() for end in (low, high)]
    order = x.argsort(stable=True)
    if len(constraints) == 1:
        found = constraints[0].projected(x, ends[0], ends[1], order)
    else:
        found = _by_dykstra(constraints, x, ends[0], ends[1], order)
    return found.reshape(value.shape).to(value)


def _by_dykstra(constraints: Sequence[Constraint], x: Tensor, low: Tensor, high: Tensor, order: Tensor) -> Tensor:
    corrections = [torch.zeros_like(x) for _ in constraints]
    size = AGREED * (1.0 + x.abs().max())
    for _ in range(ROUNDS):
        moved = x.new_zeros(())
        for index, constraint in enumerate(constraints):
            shifted = x + corrections[index]
            new = constraint.projected(shifted, low, high, order)
            corrections[index] = shifted - new
            moved = torch.maximum(moved, (new - x).abs().max())
            x = new
        if moved <= size:
            return x
    raise ArithmeticError(
        f"constraints: found no design that satisfies {', '.join(map(str, constraints))} and its bounds together. "
        "Loosen one of them."
    )


def _pooled(values: list[float], lows: list[float], highs: list[float]) -> list[float]:
    """Return the nearest non-decreasing numbers within bounds that do not decrease themselves."""
    pools: list[tuple[float, int, float, float, float]] = []  # sum, size, largest low, smallest high, level
    for value, low, high in zip(values, lows, highs, strict=True):
        pool = (value, 1, low, high, min(max(value, low), high))
        while pools and pools[-1][4] > pool[4]:
            total, size, least, most, _ = pools.pop()
            total, size = total + pool[0], size + pool[1]
            least, most = max(least, pool[2]), min(most, pool[3])
            pool = (total, size, least, most, min(max(total / size, least), most))
        pools.append(pool)
    return [level for _, size, _, _, level in pools for _ in range(size)]


def bounds_of(site: DesignSite) -> tuple[Tensor, Tensor]:
    """Return the bounds that the constraint of `pyro.param` sets, infinite where there is none, of the design's shape.

    Raises:
        ValueError: If the constraint is neither the real line, nor an interval, nor half a line.
    """
    constraint: Any = site.constraint
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    low, high = (getattr(constraint, name, None) for name in ("lower_bound", "upper_bound"))
    if low is None and high is None and type(constraint).__name__ != "_Real":
        raise ValueError(
            f"constraints: design '{site.name}' has the constraint {site.support} itself, and these constraints know "
            "bounds alone. Give a function of the designs that returns the nearest admissible ones."
        )
    value = site.value.detach().double()
    return _end(site, low, -math.inf, value), _end(site, high, math.inf, value)


def _end(site: DesignSite, end: Any, otherwise: float, value: Tensor) -> Tensor:
    if end is None:
        return torch.full_like(value, otherwise)
    end = torch.as_tensor(end).to(value).expand(value.shape).clone()
    if bool(site.constraint.check(end.to(site.value)).all()):
        return end
    return end - math.copysign(OPEN_MARGIN, otherwise) * (value - end).abs().mean()

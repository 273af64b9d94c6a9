r"""What constraints make of designs, moved to the nearest admissible ones, and of gradients, to stay there.

A gradient that points out of the admissible set would be undone by projecting back, and Adam, which gives every
coordinate steps of about equal length, would spend the whole step on it. So where the constraints are those of
`design.constraints`, a gradient is projected onto the face of the admissible set that the ascent presses against. Which
one this is, a mean over the last gradients :math:`\bar g` says: one noisy gradient would leave a face half of the time,
and be let. The face is the one that :math:`x + h \bar g` is projected to with a small h, and there the projection is
linear: :math:`(P(x + h \bar g + \epsilon g) - P(x + h \bar g)) / \epsilon` is the gradient along the face. A user's own
projection is differentiated, where it is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_voed.checks import check_known
from pyro_voed.design.constraints import Constraint, Order, Sum, bounds_of, nearest
from pyro_voed.experiment.sites import DesignSite

ROUNDING = 1e-6
"""How far beyond its end, in lengths of the interval, rounding may put a value that is meant to be at the end."""

SMALL_STEP, SHORTER = 1e-4, 1e-2
"""Length of the step that tells the face, as a share of the design's size; of the one along it, as a share of that."""

NEWEST = 0.02
"""Weight of the newest gradient in the mean of the last ones."""

Project = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Constraints = Constraint | Project | Sequence[Constraint | Project]
"""What searches take as `constraints`: one or several."""


@dataclass(frozen=True)
class Projection:
    """The nearest admissible designs, by constraints of each design and by a user's functions of all."""

    of_labels: Mapping[str, Sequence[Constraint]]
    functions: Sequence[Project]
    sites: Sequence[DesignSite]
    bounds: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, constraints: Any, sites: Sequence[DesignSite]) -> Projection | None:
        """Return the projection onto constraints as a user gives them, checked; None where there are none."""
        given = () if constraints is None else constraints
        listed = list(given) if isinstance(given, Sequence) else [given]
        of_labels: dict[str, list[Constraint]] = {}
        for one in listed:
            if isinstance(one, Order | Sum):
                of_labels.setdefault(one.label, []).append(one)
            elif not callable(one):
                raise TypeError(
                    "constraints: expected constraints such as min_gap('xi', 0.1), or functions from a dict of designs "
                    f"to one of the nearest admissible, got {type(one).__name__}."
                )
        own = {site.name: site for site in sites}
        check_known(of_labels, own, "constraints", "design")
        bounds = {label: bounds_of(own[label]) for label in of_labels}
        for label, constraints_of in of_labels.items():
            _check_possible(own[label], constraints_of, *bounds[label])
        functions = [one for one in listed if not isinstance(one, Order | Sum)]
        return cls(of_labels, functions, sites, bounds) if listed else None

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the designs that the constraints are of, moved and checked."""
        projected = self._nearest(values)
        for function in self.functions:
            moved: Any = function({**values, **projected})
            if not isinstance(moved, Mapping) or not all(isinstance(value, Tensor) for value in moved.values()):
                raise TypeError(
                    "constraints: expected a dict from design labels to tensors from a function, such as "
                    f"{{'xi': designs['xi'].clamp(0, 1)}}, got {_kind(moved)}."
                )
            check_known(moved, [site.name for site in self.sites], "constraints", "design")
            if both := [name for name in moved if name in self.of_labels]:
                raise ValueError(
                    f"constraints: a function moves {both}, for which other constraints stand beside it. State all "
                    "constraints of a design ready-made, or all by one function."
                )
            projected |= moved
        own = {site.name: site for site in self.sites}
        return {name: _checked(own[name], value, values[name].shape) for name, value in projected.items()}

    def of_rows(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `(num, *shape)` designs, each moved to the nearest admissible one."""
        check_known(self.of_labels, rows, "constraints", "candidate value of a design")
        num = len(next(iter(rows.values())))
        moved = [{n: v[row] for n, v in rows.items()} for row in range(num)]
        moved = [{**row, **self(row)} for row in moved]
        return {name: torch.stack([row[name] for row in moved]) for name in rows}

    def passed(self, values: Mapping[str, Tensor], smoothed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all designs as projected, with gradients as above, whose means `smoothed` are updated when taken.

        Where a user's projection carries no gradient, that of the designs before it is used.
        """
        full = dict(values)
        for name in self.of_labels:
            project = partial(self._one_nearest, name)
            full[name] = _Tangent.apply(values[name], project, smoothed[name])
        for function in self.functions:
            moved = function(dict(full))
            full |= {
                name: value if value.requires_grad else full[name] + (value - full[name]).detach()
                for name, value in moved.items()
            }
        return full

    def _nearest(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._one_nearest(name, values[name]) for name in self.of_labels}

    def _one_nearest(self, name: str, value: Tensor) -> Tensor:
        return nearest(self.of_labels[name], value, *self.bounds[name])


class _Tangent(torch.autograd.Function):
    """A projection whose gradients, of something that is to fall, are those along which designs can go."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, project: Callable[[Tensor], Tensor], smoothed: Tensor) -> Tensor:
        projected = project(value)
        ctx.project, ctx.smoothed = project, smoothed
        ctx.save_for_backward(projected)
        return projected

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        if not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            return gradient, None, None  # what is not finite is told by the training loop
        ctx.smoothed.lerp_(gradient.to(ctx.smoothed), NEWEST)
        at = at.double()
        size = SMALL_STEP * (at.abs().max() + at.std(unbiased=False) + 1e-12)
        beyond = at - size * ctx.smoothed / ctx.smoothed.abs().max()
        step = SHORTER * size / gradient.abs().max()
        along = (ctx.project(beyond - step * gradient) - ctx.project(beyond)) / step
        return -along.to(gradient), None, None


def _check_possible(site: DesignSite, constraints: Sequence[Constraint], low: Tensor, high: Tensor) -> None:
    for constraint in constraints:
        if isinstance(constraint, Order) and site.value.dim() != 1:
            raise ValueError(
                f"{constraint}: expected a design of one dimension, got shape {tuple(site.value.shape)}. Give a "
                "function of the designs that returns the nearest admissible ones."
            )
        lacking = constraint.lacks(low.flatten(), high.flatten())
        if lacking is not None:
            raise ValueError(f"{constraint}: {lacking}. Loosen the constraint, or the bounds of pyro.param.")
    try:
        nearest(constraints, site.value, low, high)
    except ArithmeticError as error:
        raise ValueError(str(error)) from None


def _checked(site: DesignSite, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"constraints: expected '{site.name}' of shape {tuple(shape)}, got {tuple(value.shape)}.")
    ends = site.interval_ends
    if ends is not None:
        inside = torch.minimum(torch.maximum(value, ends[0]), ends[1])
        value = torch.where((value - inside).abs() <= ROUNDING * (ends[1] - ends[0]), inside, value)
    if not site.constraint.check(value).all():
        raise ValueError(
            f"constraints: a function puts design '{site.name}' at {value.tolist()}, outside its constraint "
            f"{site.constraint}. Return designs that satisfy that as well, or give pyro.param a wider one."
        )
    return value


def _kind(projected: Any) -> str:
    if isinstance(projected, Mapping):
        return str({name: type(value).__name__ for name, value in projected.items()})
    return type(projected).__name__

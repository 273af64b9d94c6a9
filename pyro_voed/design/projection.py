"""What a projection makes of designs: checked where it moves them, differentiated where a gradient passes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_voed.checks import check_known
from pyro_voed.experiment.sites import DesignSite

ROUNDING = 1e-6
"""How far beyond its end, in lengths of the interval, rounding may put a value that is meant to be at the end."""


@dataclass(frozen=True)
class Projection:
    """A user's map from a dict of designs to one of the nearest admissible values of those that it moves."""

    function: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    sites: Sequence[DesignSite]

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the designs that the projection states, checked."""
        projected: Any = self.function(dict(values))
        if not isinstance(projected, Mapping) or not all(isinstance(value, Tensor) for value in projected.values()):
            raise TypeError(
                "projection: expected a dict from design labels to tensors, such as {'xi': designs['xi'].clamp(0, 1)}, "
                f"got {_kind(projected)}."
            )
        own = {site.name: site for site in self.sites}
        check_known(projected, own, "projection", "design")
        return {name: _checked(own[name], value, values[name].shape) for name, value in projected.items()}

    def passed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all designs as projected, gradients taken through the projection where it is differentiable.

        So a step is not spent on a direction that projecting back would undo. Where the projection carries no gradient,
        that of the designs before it is used.
        """
        projected = {**values, **self.function(dict(values))}
        return {
            name: projected[name] if projected[name].requires_grad else value + (projected[name] - value).detach()
            for name, value in values.items()
        }


def _checked(site: DesignSite, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"projection: expected '{site.name}' of shape {tuple(shape)}, got {tuple(value.shape)}.")
    ends = site.interval_ends
    if ends is not None:
        inside = torch.minimum(torch.maximum(value, ends[0]), ends[1])
        value = torch.where((value - inside).abs() <= ROUNDING * (ends[1] - ends[0]), inside, value)
    if not site.constraint.check(value).all():
        raise ValueError(
            f"projection: it puts design '{site.name}' at {value.tolist()}, outside its constraint {site.constraint}. "
            "Project onto designs that satisfy the constraint as well, or give pyro.param a wider one."
        )
    return value


def _kind(projected: Any) -> str:
    if isinstance(projected, Mapping):
        return str({name: type(value).__name__ for name, value in projected.items()})
    return type(projected).__name__

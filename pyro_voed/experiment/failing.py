"""Draws of distributions some of whose parameters are NaN, as a solver that breaks down leaves them.

Normals draw NaN then. Poisson, Bernoulli and others refuse to draw at all, for all runs, so they draw with other
parameters where these are NaN, and the draws there become NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to


def draw_or_fail(fn: Any) -> Tensor:
    """Return a draw, NaN where a parameter is."""
    try:
        return fn.sample()
    except (RuntimeError, ValueError):
        mended = copy.copy(fn)
        broken = torch.zeros(fn.batch_shape + (1,) * len(fn.event_shape), dtype=torch.bool)
        for layer, name, value in _nan_parameters(mended):
            own = torch.isnan(value)
            usual = transform_to(layer.arg_constraints[name])(torch.zeros_like(value))
            setattr(layer, name, torch.where(own, usual, value))
            # A parameter has the batch dimensions of its own layer, some of which are events of the outer one.
            while own.dim() > len(fn.batch_shape):
                own = own.any(-1)
            broken = broken.to(own.device) | own.reshape(own.shape + (1,) * len(fn.event_shape))
        drawn = mended.sample()
        if not drawn.dtype.is_floating_point or not bool(broken.any()):
            raise
        return torch.where(broken, torch.nan, drawn)


def _nan_parameters(fn: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """Yield layers of a distribution, copied in place, with the parameters that they hold NaN in."""
    for name, constraint in fn.arg_constraints.items():
        value = vars(fn).get(name)
        if isinstance(value, Tensor) and not constraints.is_dependent(constraint) and bool(torch.isnan(value).any()):
            yield fn, name, value
    if hasattr(fn, "base_dist"):
        fn.base_dist = copy.copy(fn.base_dist)
        yield from _nan_parameters(fn.base_dist)

"""Increasing maps of the real line, with raw parameters that a network supplies; raw zeros give the identity.

A coupling moves each coordinate through one of these. Both have linear tails whose slope the network sets, so that the
context has an influence at any distance from the centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.densities.gaussian import soft_clamp
from pyro_voed.densities.spline import bin_map, positive_slope, spline_bins, spline_forward, spline_inverse, spline_size

MAX_COUPLING_LOG_SCALE = 3.0
"""Bound that the log-scale of one affine coupling approaches smoothly; several together reach further."""


Values = Float[Tensor, "*batch dim"]
Raw = Float[Tensor, "num_parameters *#batch dim"]


@runtime_checkable
class ElementwiseMap(Protocol):
    """What a coupling needs of a map."""

    @property
    def num_parameters(self) -> int:
        """How many raw parameters one coordinate takes."""

    def constants(self, like: Tensor) -> Any:
        """Return what all calls of one pass through a flow share, in the dtype and on the device of `like`."""

    def forward(self, inputs: Tensor, raw: Tensor, constants: Any) -> tuple[Tensor, Tensor]:
        """Return outputs and log-slopes."""

    def inverse(self, outputs: Tensor, raw: Tensor, constants: Any) -> Tensor:
        """Return inputs."""


@dataclass(frozen=True)
class AffineMap:
    """Scale and shift."""

    num_parameters: int = 2

    def constants(self, like: Tensor) -> None:
        """Return None: an affine map needs no constants."""

    def forward(self, inputs: Values, raw: Raw, constants: None) -> tuple[Values, Float[Tensor, "*#batch dim"]]:
        """Return outputs and log-slopes."""
        shift, log_scale = raw.unbind(0)
        log_scale = soft_clamp(log_scale, MAX_COUPLING_LOG_SCALE)
        return torch.addcmul(shift, inputs, log_scale.exp()), log_scale

    def inverse(self, outputs: Values, raw: Raw, constants: None) -> Values:
        """Return inputs."""
        shift, log_scale = raw.unbind(0)
        return (outputs - shift) * torch.exp(-soft_clamp(log_scale, MAX_COUPLING_LOG_SCALE))


@dataclass(frozen=True)
class SplineMap:
    """Scale and shift, then a rational-quadratic spline bending [-bound, bound]; its linear tails have free slopes."""

    num_bins: int
    bound: float

    @property
    def num_parameters(self) -> int:
        """Shift, scale and the parameters of the spline."""
        return 2 + spline_size(self.num_bins)

    def constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear map from fractions and slopes to bins."""
        return bin_map(self.num_bins, self.bound, like)

    def forward(self, inputs: Values, raw: Raw, constants: tuple[Tensor, Tensor]) -> tuple[Values, Values]:
        """Return outputs and log-slopes."""
        shift, scale, bins = self._unpack(raw, constants)
        outputs, slope = spline_forward(torch.addcmul(shift, inputs, scale), bins, bound=self.bound)
        return outputs, torch.log(slope * scale)

    def inverse(self, outputs: Values, raw: Raw, constants: tuple[Tensor, Tensor]) -> Values:
        """Return inputs."""
        shift, scale, bins = self._unpack(raw, constants)
        return (spline_inverse(outputs, bins, bound=self.bound) - shift) / scale

    def _unpack(self, raw: Tensor, constants: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        # One split: in the backward pass each slice would cost a tensor of zeros.
        shift, slopes, sizes = raw.split([1, self.num_bins, 2 * self.num_bins])
        scale, inner = positive_slope(slopes).split([1, self.num_bins - 1])
        return shift.squeeze(0), scale.squeeze(0), spline_bins(sizes, inner, constants)

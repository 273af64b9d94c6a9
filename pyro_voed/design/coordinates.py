"""Coordinates that searches without gradients move in.

A design's coordinates are its place in its interval, from 0 to 1, or the unconstrained coordinates of its constraint
where that is no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_voed.experiment.sites import DesignSite


def to_coordinates(sites: Sequence[DesignSite], designs: Mapping[str, Tensor]) -> Float[Tensor, "*batch dim"]:
    """Return designs side by side: their place in [0, 1] where they lie in an interval, else unconstrained."""
    packed = []
    for site in sites:
        value, ends = designs[site.name].detach().double(), site.interval_ends
        coordinates = site.transform.inv(value) if ends is None else (value - ends[0]) / (ends[1] - ends[0])
        own = len(coordinate_shape(site))
        packed.append(coordinates.reshape(*coordinates.shape[: coordinates.dim() - own], -1))
    return torch.cat(packed, -1)


def from_coordinates(sites: Sequence[DesignSite], x: Float[Tensor, "*batch dim"]) -> dict[str, Tensor]:
    """Return designs `(*batch, *shape)` of their own type from coordinates."""
    shapes = [coordinate_shape(site) for site in sites]
    designs = {}
    for site, shape, piece in zip(sites, shapes, x.split([shape.numel() for shape in shapes], -1), strict=True):
        piece, ends = piece.reshape(x.shape[:-1] + shape), site.interval_ends
        if ends is None:
            designs[site.name] = site.transform(piece).to(site.value)
        else:
            value = (ends[0] + (ends[1] - ends[0]) * piece).to(site.value)
            # Rounding must not put a value beyond the end it is meant to be at.
            designs[site.name] = torch.minimum(torch.maximum(value, ends[0]), ends[1])
    return designs


def in_interval(sites: Sequence[DesignSite]) -> Bool[Tensor, " dim"]:
    """Return which coordinates are places in [0, 1]."""
    return torch.cat([torch.full((coordinate_shape(site).numel(),), site.interval_ends is not None) for site in sites])


def scattered(
    sites: Sequence[DesignSite], centre: Float[Tensor, " dim"], num: int, generator: torch.Generator
) -> Float[Tensor, "num dim"]:
    """Draw coordinates: uniform in intervals, N(0, 1) about the centre elsewhere."""
    uniform = torch.rand(num, len(centre), generator=generator, dtype=torch.double)
    normal = torch.randn(num, len(centre), generator=generator, dtype=torch.double)
    return torch.where(in_interval(sites), uniform, centre.cpu() + normal).to(centre)


def coordinate_shape(site: DesignSite) -> torch.Size:
    """Return the shape of a design's coordinates."""
    return site.value.shape if site.interval_ends is not None else site.transform.inv(site.value).shape

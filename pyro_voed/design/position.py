"""Where the starts of a search by gradient stand, and where they have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_voed.design.projection import Projection
from pyro_voed.design.starts import nudged
from pyro_voed.experiment.sites import DesignSite

MAX_PROJECTED = 7.0
"""Unconstrained coordinate of the outermost place in an interval, a thousandth of it from the end, after projection."""


@dataclass(frozen=True)
class Position:
    """Where starts stand and where they have been.

    `batch` is `(num_starts,)`, or `()` for one start; `leaves` are unconstrained coordinates, `(*batch, *shape)`,
    `smoothed` means of the designs' last gradients, which constraints ask for, and `path` records of the designs.
    """

    sites: Sequence[DesignSite]
    batch: torch.Size
    leaves: dict[str, Tensor]
    projection: Projection | None
    smoothed: dict[str, Tensor] = field(default_factory=dict)
    path: dict[str, list[Tensor]] = field(default_factory=dict)
    path_steps: list[int] = field(default_factory=list)

    @classmethod
    def at(
        cls, sites: Sequence[DesignSite], starts: Sequence[Mapping[str, Tensor]], projection: Projection | None
    ) -> Position:
        """Return the position of starts."""
        leaves = {}
        for site in sites:
            rows = [nudged(site, start[site.name]) for start in starts]
            leaves[site.name] = (torch.stack(rows) if len(rows) > 1 else rows[0]).requires_grad_()
        batch = torch.Size([len(starts)] if len(starts) > 1 else [])
        smoothed = {site.name: site.value.new_zeros(batch + site.value.shape).double() for site in sites}
        return cls(sites, batch, leaves, projection, smoothed, {site.name: [] for site in sites})

    def designs(self) -> dict[str, Tensor]:
        """Return the designs, `(*batch, *shape)` each, with their gradients' way back to the coordinates."""
        values = self._unprojected()
        if self.projection is None:
            return values
        if not self.batch:
            return self.projection.passed(values, self.smoothed)
        rows = [
            self.projection.passed(
                {n: v[index] for n, v in values.items()}, {n: v[index] for n, v in self.smoothed.items()}
            )
            for index in self._members()
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in values}

    def _unprojected(self) -> dict[str, Tensor]:
        return {site.name: site.transform(self.leaves[site.name]) for site in self.sites}

    @torch.no_grad()
    def present(self) -> dict[str, Tensor]:
        """Return the designs as they are now, detached."""
        # A design on the real line is its leaf, which later steps would change, so it is copied.
        return {name: value.detach().clone() for name, value in self.designs().items()}

    def record(self, step: int) -> None:
        """Add the present designs to the path, once for each step."""
        if not self.path_steps or self.path_steps[-1] != step:
            self.path_steps.append(step)
            for name, value in self.present().items():
                self.path[name].append(value)

    @torch.no_grad()
    def project_(self) -> None:
        """Move the coordinates to where the projection puts their designs; at a bound they stop short of it.

        There the map to an interval is flat, and they would stay for ever. Designs, projected again, may reach it.
        """
        if self.projection is None:
            return
        own = {site.name: site for site in self.sites}
        values = self._unprojected()
        for index in self._members():
            for name, value in self.projection({n: v[index] for n, v in values.items()}).items():
                coordinates = own[name].transform.inv(value)
                if own[name].interval_ends is not None:
                    coordinates = coordinates.clamp(-MAX_PROJECTED, MAX_PROJECTED)
                self.leaves[name][index].copy_(coordinates)

    def _members(self) -> Sequence[Any]:
        return range(self.batch.numel()) if self.batch else [...]

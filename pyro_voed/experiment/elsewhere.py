"""Is what was read at one design so at the others?

A mask, the values that an outcome can take, and which sites follow from which may all depend on a design. So before a
call simulates at its candidates in bulk, a few experiments are run at every one of them and looked at:

* what is measured must be the same in all runs at one design. Where it differs between designs, the outcome is packed
  with a flag for each element (`Site.fill`);
* values of discrete outcomes are those that any candidate allows;
* where an outcome's value reaches another site at any candidate, outcomes are *linked* or cannot be drawn anew;
* sites and their shapes must be the same everywhere.

Where the program takes one design an experiment, all candidates are in one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.experiment.dependence import is_redrawable
from pyro_voed.experiment.describe import flagged, support_values
from pyro_voed.experiment.parameters import naming_sites
from pyro_voed.experiment.programs import ProgramRun, is_deterministic, run_rows, sample_nodes, sites_come_and_go
from pyro_voed.experiment.sites import Site
from pyro_voed.experiment.statements import changed
from pyro_voed.experiment.static import moving_mask
from pyro_voed.printing import shortened

ROWS_TOGETHER, ROWS_ALONE = 5, 2
"""Experiments at each design; a second one is what the values of the first are exchanged for."""

MEMBERS_AT_ONCE = 1_000
"""Designs in one run."""

Experiment = Any
"""`experiment.Experiment`, which imports this module."""


def facts_at(experiment: Experiment, designs: Mapping[str, Tensor], *, certain: bool) -> dict[str, Any]:
    """Return the fields of an experiment that are other at `designs`, `(num_designs, *shape)` each, than as read.

    Unless it is `certain` that the model will be run there, designs at which it cannot be are passed over.
    """
    found: dict[str, Any] = {}
    measured: dict[str, list[Tensor]] = {site.name: [] for site in experiment.observations}
    values: dict[str, list[Tensor | None]] = {site.name: [] for site in experiment.observations if site.is_discrete}
    followers: set[str] = set()
    leaking = dict(experiment.leaking_nuisance)
    first = None
    for place in _places(experiment, designs):
        run = place.look(certain=certain)
        if run is None:
            continue
        first = run if first is None else first
        for site in experiment.observations:
            measured[site.name].append(place.measured(run, site))
            if site.is_discrete:
                values[site.name] += place.support_values(run, site)
        followed = place.followed(run)
        followers |= {name for site in experiment.observations for name in followed.get(site.name, ())}
        for site in experiment.nuisance:
            targets = followed.get(site.name, set()) & set(experiment.target_labels)
            leaking |= {name: site.name for name in targets if name not in leaking}
    if first is None:
        return found
    observations = [
        _with_measured(_with_values(site, values.get(site.name)), torch.cat(measured[site.name]), first)
        for site in experiment.observations
    ]
    if any(new is not old for new, old in zip(observations, experiment.observations, strict=True)):
        found["observations"] = tuple(observations)
    sites = (*experiment.targets, *experiment.observations, *experiment.others)
    if followers & set(experiment.observation_labels):
        found["linked_outcomes"] = True
    if followers and not is_redrawable(sites, followers):
        found["redrawable"] = False
    if leaking != experiment.leaking_nuisance:
        found["leaking_nuisance"] = leaking
    return found


def _with_measured(site: Site, measured: Tensor, run: ProgramRun) -> Site:
    """Return an outcome site as it is measured at some designs, `(num_designs, *shape)`."""
    usual = measured.new_ones(site.shape) if site.measured is None else site.measured
    if site.fill is not None or torch.equal(measured, usual.expand_as(measured)):
        return site
    if bool((measured == measured[0]).all()) and bool(measured[0].any()):
        return replace(site, measured=measured[0], transform=None, packed_dim=int(measured[0].sum()))
    return flagged(site, run)


def _with_values(site: Site, values: list[Tensor | None] | None) -> Site:
    if not values or site.support_values is None:
        return site
    known = [value for value in values if value is not None]
    every = torch.cat(known).unique() if len(known) == len(values) else None
    if every is not None and torch.equal(every, site.support_values.unique()):
        return site
    return replace(site, support_values=every)


def _places(experiment: Experiment, designs: Mapping[str, Tensor]) -> Iterator[_Place]:
    """Yield designs in groups that one run can take."""
    count = len(next(iter(designs.values())))
    # Two of a kind tell nothing new.
    packed = torch.cat([value.reshape(count, -1) for value in designs.values()], -1)
    _, index = packed.unique(dim=0, return_inverse=True)
    first = [int((index == kind).nonzero()[0]) for kind in range(int(index.max()) + 1)]
    together = experiment.program.vectorised and experiment.takes_design_rows
    for members in torch.tensor(first).split(MEMBERS_AT_ONCE if together else 1):
        yield _Place(experiment, {name: value[members] for name, value in designs.items()}, together)


@dataclass(frozen=True)
class _Place:
    """One design, or many that are run together; rows of a run are at each of them in turn."""

    experiment: Experiment
    designs: Mapping[str, Tensor]
    together: bool

    @property
    def size(self) -> int:
        """Experiments at each design."""
        return ROWS_TOGETHER if self.experiment.program.vectorised else ROWS_ALONE

    @property
    def count(self) -> int:
        """Number of designs."""
        return len(next(iter(self.designs.values())))

    def run(self, values: Mapping[str, Tensor]) -> ProgramRun:
        """Run the program with values of sites put in."""
        program, shapes = self.experiment.program, self.experiment.shapes
        if self.together:
            rows = {name: value.repeat(self.size, *(1,) * (value.dim() - 1)) for name, value in self.designs.items()}
            return run_rows(program, self.size * self.count, shapes, row_designs=rows, row_values=values)
        own = {name: value[0] for name, value in self.designs.items()}
        return run_rows(program, self.size, shapes, designs=own, row_values=values)

    def look(self, *, certain: bool) -> ProgramRun | None:
        """Run the program and check that its sites are those that were read."""
        experiment = self.experiment
        try:
            run = naming_sites(partial(self.run, {}), may_fail=experiment.program.may_fail)
        except Exception:  # whatever a model raises where it was not meant to be run
            if certain:
                raise
            return None
        nodes = sample_nodes(run.traces[0])
        if set(nodes) != set(experiment.shapes):
            raise ValueError(sites_come_and_go(set(nodes) ^ set(experiment.shapes)))
        for name, shape in experiment.shapes.items():
            try:
                run.value(name)
            except ValueError as error:
                at = ", ".join(f"{label} = {shortened(value[0])}" for label, value in self.designs.items())
                raise ValueError(
                    f"site '{name}' has shape {tuple(shape)} at the designs that the model was read at, and another at "
                    f"{at}: {error} Give its plate the largest size and mask what is not measured, as in "
                    "poutine.mask(mask=torch.arange(20) < n)."
                ) from error
        return run

    def measured(self, run: ProgramRun, site: Site) -> Tensor:
        """Return what is measured at each design, `(num_designs, *shape)`."""
        measured = run.measured(site.name)
        if measured is None:
            return torch.ones(self.count, *site.shape, dtype=torch.bool, device=self.experiment.device)
        rows = measured.reshape(self.size, self.count, *site.shape)
        if not bool((rows == rows[0]).all()):
            raise ValueError(moving_mask(site.name))
        return rows[0]

    def support_values(self, run: ProgramRun, site: Site) -> list[Tensor | None]:
        """Return the values that a discrete outcome can take, at all designs or at each; None where not known."""
        if site.support_values is None:
            return []
        found = [support_values(trace.nodes[site.name]["fn"]) for trace in run.traces]
        if self.together and self.count > 1 and any(values is None for values in found):
            # Distributions of rows that differ in their values do not tell them.
            alone = [
                _Place(self.experiment, {name: value[[index]] for name, value in self.designs.items()}, together=False)
                for index in range(self.count)
            ]
            return [values for place in alone for values in place.support_values(place.run({}), site)]
        return found

    def followed(self, run: ProgramRun) -> dict[str, set[str]]:
        """Return for outcomes and nuisance sites what depends on their values."""
        nodes = sample_nodes(run.traces[0])
        names = list(nodes)
        random = [name for name in names if not is_deterministic(nodes[name])]
        outcomes = [name for name in self.experiment.observation_labels if name in random and name != names[-1]]
        targets = [names.index(name) for name in self.experiment.target_labels]
        nuisance = [site.name for site in self.experiment.nuisance if names.index(site.name) < max(targets)]
        if not outcomes and not nuisance:
            return {}
        values = {name: run.value(name) for name in random}
        found = {}
        # Values move between draws, some perhaps to where a dependent support ends.
        with pyro.validation_enabled(False), torch.no_grad():
            held = self._on_one_stream(values)
            for name in (*outcomes, *nuisance):
                # The same design's next draw.
                other = self._on_one_stream({**values, name: values[name].roll(self.count if self.together else 1, 0)})
                found[name] = {follower for follower in names if follower != name and changed(held, other, follower)}
        return found

    def _on_one_stream(self, values: Mapping[str, Tensor]) -> ProgramRun:
        with common_stream(0):
            return self.run(values)

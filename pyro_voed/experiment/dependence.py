"""Which site depends on which? A Pyro program does not state its graph, so it is found in two ways at once.

* *Provenance*: what flows into a site in one recorded run (`provenance`). It sees branches that are seldom taken and
  misses what leaves torch (NumPy, `.item()`, `if`).
* *Intervention*: values of some sites are exchanged for those of other draws, all else equal, and what changes depends
  on them. It sees through any code and misses branches that none of a few draws takes.

A site depends on another where either says so, because the two errors do not weigh alike. Dependence that is missed
makes numbers wrong without a word. Dependence that is found but is none (`0 * n`) costs time (densities averaged over
what does not matter, models run again at every pair, bijections rebuilt), a warning or a refusal that names the site.

Only the warning that a target never reaches the outcome claims an absence, so there both must see none. A rare branch
behind NumPy, `.item()` or `if` can still be missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.experiment.programs import Program, ProgramRun, is_deterministic, run_rows
from pyro_voed.experiment.provenance import run_recorded, supports_at_zero
from pyro_voed.experiment.sites import DesignSite, Site
from pyro_voed.experiment.statements import changed, same

ROWS_TOGETHER, ROWS_ALONE = 5, 2
"""Experiments in a probe run: exchanging more values shows more, and one by one each is paid for."""


class Dependence:
    """Which sites depend on which others, found by running a program a few times; `nodes` are all sites of one run.

    A `noisy` program draws random numbers outside its sample sites.
    """

    def __init__(
        self,
        program: Program,
        shapes: Mapping[str, torch.Size],
        nodes: Mapping[str, Any],
        designs: tuple[DesignSite, ...],
        *,
        noisy: bool,
    ):
        self.program, self.shapes, self.designs = program, shapes, designs
        self.names = list(nodes)
        self.size = ROWS_TOGETHER if program.vectorised else ROWS_ALONE
        self.random = [name for name, node in nodes.items() if not is_deterministic(node)]
        free = lambda: run_rows(program, self.size, shapes)  # noqa: E731
        first, self.parents = run_recorded(free, nodes, [site.name for site in designs])
        self.other = free()
        self.values = {name: first.value(name) for name in self.random}
        self.exchange = {name: self.other.value(name) for name in self.random}
        # A simulator's own noise must be equal in all runs that are compared.
        self.base = self.run(self.values) if noisy else first

    def run(self, values: Mapping[str, Tensor], designs: Mapping[str, Tensor] | None = None) -> ProgramRun:
        """Run with values put in, on the random numbers of every other such run."""
        with common_stream(0):
            return run_rows(self.program, self.size, self.shapes, designs=designs, row_values=values)

    def exchanged(self, names: Iterable[str]) -> ProgramRun:
        """Run with the values of the named sites exchanged for those of other draws."""
        return self.run({**self.values, **{name: self.exchange[name] for name in names}})

    def influenced(self, names: Iterable[str]) -> set[str]:
        """Return other sites whose distribution (or deterministic value) depends on values of the named ones."""
        names = set(names)
        run = self.exchanged(names)
        moved = {name for name in self.names if changed(self.base, run, name)}
        flowed = {name for name, parents in self.parents.of_site.items() if parents & names}
        return (moved | flowed) - names

    def has_parents(self, name: str) -> bool:
        """Whether the site depends on any other random site."""
        others = set(self.random) - {name}
        flowed = self.parents.of_site.get(name, frozenset()) & others
        return bool(flowed) or (bool(others) and changed(self.base, self.exchanged(others), name))

    def support_moves(self, name: str, parent: str | None = None) -> bool:
        """Whether the bijection onto the site's support depends on values of the parent (None: of any other site)."""
        names = {parent} if parent else set(self.random) - {name}
        if self.parents.of_support.get(name, frozenset()) & names:
            return True
        before = supports_at_zero(self.base, name)
        # A support does not depend on the site's own value, so one free run answers for all others.
        after = supports_at_zero(self.exchanged([parent]) if parent else self.other, name)
        return before is not None and after is not None and not bool(same(before, after).all())

    def moves_support(self, name: str) -> bool:
        """Whether the bijection onto the site's support depends on any other site or on a design."""
        labels = {design.name for design in self.designs}
        return bool(self.parents.of_support.get(name, frozenset()) & labels) or self.support_moves(name)

    def moved_by_designs(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """Return the sites whose distribution depends on a design."""
        if not self.designs:
            return ()
        labels = {design.name for design in self.designs}
        moved = self.run(self.values, {design.name: _moved(design) for design in self.designs})
        return tuple(
            site.name
            for site in sites
            if self.parents.of_site.get(site.name, frozenset()) & labels or changed(self.base, moved, site.name)
        )


def _moved(site: DesignSite) -> Tensor:
    unconstrained = site.transform.inv(site.value)
    return site.transform(unconstrained + 0.1 + 0.1 * torch.rand_like(unconstrained))


def leaks(dependence: Dependence, targets: Iterable[Site], nuisance: Iterable[str]) -> dict[str, str]:
    """Return for each target whose distribution depends on nuisance sites one of them."""
    names = [site.name for site in targets]
    found: dict[str, str] = {}
    for parent in nuisance:
        influenced = dependence.influenced([parent])
        for name in names:
            if name in influenced:
                found.setdefault(name, parent)
    return found


def joins_targets(dependence: Dependence, targets: Iterable[Site], nuisance: Iterable[str]) -> bool:
    """Whether a target, or a nuisance site that targets are drawn given, depends on another target's value."""
    names = {site.name for site in targets}
    above, growing = set(names), True
    while growing:
        parents = {name for name in nuisance if name not in above and dependence.influenced([name]) & above}
        above, growing = above | parents, bool(parents)
    return any(dependence.influenced([name]) & above for name in names & set(dependence.random))


def check_supports(dependence: Dependence, targets: Iterable[Site], nuisance: Iterable[str]) -> None:
    """Refuse targets whose support depends on what is no target."""
    for site in targets:
        for parent in nuisance if site.dependent_support else ():
            if dependence.support_moves(site.name, parent):
                raise NotImplementedError(
                    f"the support of target '{site.name}' depends on '{parent}', which is not a target: its bounds "
                    f"would tell the posterior what was not observed. Add '{parent}' to the targets."
                )


def is_redrawable(sites: Iterable[Site], followers: set[str]) -> bool:
    """Whether outcomes can be drawn anew, given everything before them, without running the model again.

    Nothing that is learnt or observed may be among the `followers` of an outcome's value, and a site that states no
    density hides whether it is.
    """
    sites = list(sites)
    random = [site for site in sites if not site.is_deterministic and site.role != "history"]
    matter = {site.name for site in random} | {site.name for site in sites if site.role == "target"}
    return (
        not any(site.is_deterministic for site in sites if site.role == "observation")
        and all(site.has_density for site in random)
        and not matter & followers
    )

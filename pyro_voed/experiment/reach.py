"""Which targets, or elements of them, never reach the outcome? The experiment tells nothing about those.

It is a claim of absence, so neither way of finding dependence may see any (`dependence`): no value of the target flows
to an outcome, and exchanging it for that of another draw changes nothing there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_voed.experiment.dependence import Dependence
from pyro_voed.experiment.programs import ProgramRun
from pyro_voed.experiment.sites import Site
from pyro_voed.experiment.statements import changed, statement
from pyro_voed.results import element_names

MAX_ELEMENTS = 64
"""Targets of more elements are asked as a whole whether they reach the outcome."""


def unreached(dependence: Dependence, targets: Iterable[Site], outcomes: Iterable[str]) -> list[list[str]]:
    """Return for each target the elements that never reach an outcome, also by way of nuisance sites; none left out."""
    outcomes = list(outcomes)
    found = []
    for site in targets:
        # A target drawn given others is informed through them even where it reaches nothing itself.
        if site.is_deterministic or dependence.has_parents(site.name):
            continue
        found.append(_unreached_elements(dependence, site, outcomes))
    return [elements for elements in found if elements]


def _unreached_elements(dependence: Dependence, site: Site, outcomes: list[str]) -> list[str]:
    elementwise = site.transform is not None and not site.dependent_support and dependence.program.vectorised
    names = element_names(site.name, site.shape)
    new = dependence.exchange[site.name]
    flows = bool(dependence.parents.reached_from(site.name, stop=outcomes) & set(outcomes))
    if not elementwise or site.packed_dim != len(names) or not 1 < len(names) <= MAX_ELEMENTS:
        return [] if flows or _Reach(dependence, site.name, outcomes)(new) else [f"'{site.name}'"]
    reaches = _Reach(dependence, site.name, outcomes)
    old = dependence.values[site.name].reshape(dependence.size, -1)
    missing = []
    for index, name in enumerate(names):
        mixed = old.clone()
        mixed[:, index] = new.reshape(dependence.size, -1)[:, index]
        if not reaches(mixed.reshape(new.shape)):
            missing.append(name)
    # Provenance does not tell elements apart: where none is seen to arrive, the branch may be a rare one.
    return [] if flows and len(missing) == len(names) else missing


class _Reach:
    """Whether exchanging values of a target changes what is stated of the outcomes.

    Nuisance sites in between are drawn afresh with equal random numbers, outcomes with a density are held.
    """

    def __init__(self, dependence: Dependence, name: str, outcomes: list[str]):
        self.dependence, self.name, self.outcomes = dependence, name, outcomes
        self.held = {other: dependence.values[other] for other in outcomes if other in dependence.random}
        self.before = self._run(dependence.values[name])

    def __call__(self, values: Tensor) -> bool:
        if torch.equal(self.dependence.values[self.name], values):
            return True
        after = self._run(values)
        return any(_may_differ(self.before, after, outcome) for outcome in self.outcomes)

    def _run(self, values: Tensor) -> ProgramRun:
        return self.dependence.run({**self.held, self.name: values})


def _may_differ(before: ProgramRun, after: ProgramRun, name: str) -> bool:
    # An outcome that states nothing may hide that it changes.
    return statement(before, name) is None or changed(before, after, name)

"""Probe runs: what a few runs of a program tell of it, put together.

Checks come first, in the order in which one can rely on another: that single runs are alike (`static`), that
experiments run together are those run alone (`vectorisation`). Then what depends on what is found (`dependence`), each
site is described (`describe`), and targets that the experiment tells nothing of are looked for (`reach`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.experiment.dependence import Dependence, check_supports, is_redrawable, joins_targets, leaks
from pyro_voed.experiment.describe import describe
from pyro_voed.experiment.programs import Program, sample_nodes
from pyro_voed.experiment.reach import unreached
from pyro_voed.experiment.sites import DesignSite, Failures, Role
from pyro_voed.experiment.static import check_static, measured_elements, moving_mask
from pyro_voed.experiment.vectorisation import check_vectorised


def probe(
    program: Program,
    prototype: poutine.Trace,
    own: poutine.Trace,
    roles: Mapping[str, Role],
    designs: tuple[DesignSite, ...],
    *,
    vectorize: bool,
    failures: Failures,
) -> dict[str, Any]:
    """Run every probe and return what an experiment is made of, by the names of its fields.

    `prototype` is one run of the released program, `own` one of the model with its own prior.
    """
    nodes = sample_nodes(prototype)
    shapes = {name: torch.as_tensor(node["value"]).shape for name, node in nodes.items()}
    measured = {name: measured_elements(name, roles[name], nodes[name], shapes[name]) for name in nodes}
    noisy = check_static(program, shapes, roles, measured, vectorize=vectorize)
    unchecked: tuple[str, ...] = ()
    if vectorize:
        program = replace(program, vectorised=True)
        unchecked = check_vectorised(program, shapes)
    # From here on values move between draws, some perhaps to where a dependent support ends.
    with pyro.validation_enabled(False), torch.no_grad():
        dependence = Dependence(program, shapes, nodes, designs, noisy=noisy)
        for name, parents in dependence.parents.of_mask.items():
            if parents & set(dependence.random):
                raise ValueError(moving_mask(name))
        own_nodes = sample_nodes(own)
        fails = {name: failures == "outcome" and roles[name] == "observation" for name in nodes}
        sites = [
            describe(name, roles[name], node, own_nodes.get(name), measured[name], dependence, fails=fails[name])
            for name, node in nodes.items()
        ]
        targets = tuple(site for site in sites if site.role == "target")
        observations = tuple(site for site in sites if site.role == "observation")
        nuisance = [site.name for site in sites if site.role == "nuisance"]
        check_supports(dependence, targets, nuisance)
        leaking = leaks(dependence, targets, nuisance)
        joined = bool(leaking) and joins_targets(dependence, targets, nuisance)
        design_dependent = dependence.moved_by_designs(targets)
        drawn = [site.name for site in targets if site.name in dependence.random]
        followed = any(dependence.influenced([name]) & set(nuisance) for name in drawn)
        moved = design_dependent or (leaking and dependence.moved_by_designs(s for s in sites if s.role == "nuisance"))
        outcomes = {site.name for site in observations}
        random = [site.name for site in observations if not site.is_deterministic]
        followers = {follower for name in random for follower in dependence.influenced([name])}
        missing = unreached(dependence, targets, outcomes)
    if design_dependent:
        warn(
            f"the prior of target {list(design_dependent)} depends on a design: what is learnt then also depends on "
            "how much there was to learn. Check that the design belongs there."
        )
    for elements in missing:
        warn(
            f"target {', '.join(elements)} never reaches the outcome: exchanging its value changes nothing that is "
            "observed, so the experiment tells nothing about it."
        )
    values = [node["value"] for node in nodes.values()]
    floating = [value for value in values if value.dtype.is_floating_point]
    return {
        "program": program,
        "targets": targets,
        "observations": observations,
        "others": tuple(site for site in sites if site.role not in ("target", "observation")),
        "designs": designs,
        "leaking_nuisance": leaking,
        "joined_targets": joined,
        "nuisance_follows_targets": followed,
        "design_dependent_targets": design_dependent,
        "prior_follows_design": bool(moved),
        "linked_outcomes": bool(outcomes & followers),
        "redrawable": failures != "ignore" and is_redrawable(sites, followers),
        "surveyed_at": None,
        "unchecked": unchecked,
        "bytes_per_row": sum(value.numel() * value.element_size() for value in values),
        "dtype": _widest(floating) if floating else torch.get_default_dtype(),
        "device": (floating[0] if floating else torch.empty(())).device,
    }


def _widest(values: list[Tensor]) -> torch.dtype:
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype

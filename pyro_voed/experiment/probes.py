"""Probe runs: does the model vectorise, and which site depends on which?

*Vectorisation.* Shapes alone do not tell: `theta / theta.sum()` or a softmax over the first dimension keep every shape
and mix experiments. So a small vectorised trace is replayed element by element through the single-run model, and
every site's log density (a deterministic site's value) must agree. Two odd sizes tell row dimensions from dimensions
of the model that happen to have the same size.

*Dependence.* A Pyro program does not state its graph. It is found by intervention: values of some sites are exchanged
for those of other draws, all else equal, and what changes depends on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.experiment.programs import (
    Program,
    ProgramRun,
    base_distribution,
    has_discrete_support,
    is_deterministic,
    run_rows,
    sample_nodes,
    support_transform,
    trace_program,
)
from pyro_voed.experiment.sites import DesignSite, Experiment, Role, Site, site_transform
from pyro_voed.results import element_names

PROBE_SIZES = (3, 5)
"""Odd, distinct and small: a model dimension can equal one of them, not both."""


def probe(
    program: Program,
    prototype: poutine.Trace,
    own: poutine.Trace,
    roles: Mapping[str, Role],
    designs: tuple[DesignSite, ...],
    candidates: Mapping[str, Tensor],
    *,
    vectorize: bool,
) -> Experiment:
    """Run every probe and return the resolved sites."""
    nodes = sample_nodes(prototype)
    shapes = {name: torch.as_tensor(node["value"]).shape for name, node in nodes.items()}
    measured = {name: _measured(name, roles[name], nodes[name], shapes[name]) for name in nodes}
    _check_static(program, shapes, roles, measured)
    unchecked: tuple[str, ...] = ()
    if vectorize:
        program = replace(program, vectorised=True)
        unchecked = _check_vectorised(program, shapes, roles)
    program = _lay_out_designs(program, shapes, roles, designs, candidates)
    # From here on values move between draws, some perhaps to where a dependent support ends.
    with pyro.validation_enabled(False), torch.no_grad():
        dependence = _Dependence(program, shapes, nodes)
        own_nodes = sample_nodes(own)
        described = {
            name: _describe(name, roles[name], node, own_nodes.get(name), measured[name], dependence)
            for name, node in nodes.items()
        }
        by_role = lambda role: tuple(site for site in described.values() if site.role == role)  # noqa: E731
        targets, observations = by_role("target"), by_role("observation")
        nuisance = [site.name for site in by_role("nuisance")]
        leaking = {} if not nuisance else _leaks(dependence, targets, nuisance)
        _check_supports(dependence, targets, nuisance, described)
        design_dependent = _design_dependent(program, shapes, designs, targets)
        if design_dependent:
            warn(
                f"the prior of target {list(design_dependent)} depends on a design: what is learnt then also depends "
                "on how much there was to learn. Check that the design belongs there.",
            )
        outcomes = {site.name for site in observations}
        followers = {
            name for site in observations if not site.is_deterministic for name in dependence.influenced([site.name])
        }
        linked = bool(outcomes & followers)
        redrawable = _redrawable(described, followers)
        _warn_unreached(dependence, targets, observations)
    floating = [node["value"] for node in nodes.values() if node["value"].dtype.is_floating_point]
    reference = floating[0] if floating else torch.empty(())
    dtype = torch.get_default_dtype() if not floating else _widest(floating)
    return Experiment(
        program=program,
        targets=targets,
        observations=observations,
        others=tuple(site for site in described.values() if site.role not in ("target", "observation")),
        designs=designs,
        leaking_nuisance=leaking,
        design_dependent_targets=design_dependent,
        linked_outcomes=linked,
        redrawable=redrawable,
        unchecked=unchecked,
        bytes_per_row=sum(node["value"].numel() * node["value"].element_size() for node in nodes.values()),
        dtype=dtype,
        device=reference.device,
    )


def _widest(values: list[Tensor]) -> torch.dtype:
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _check_static(
    program: Program,
    shapes: Mapping[str, torch.Size],
    roles: Mapping[str, Role],
    measured: Mapping[str, Tensor | None],
) -> None:
    for _ in range(2):
        again = sample_nodes(trace_program(program, {}, {}, None))
        program.calls[0] += 1
        if set(again) != set(shapes):
            raise ValueError(
                f"the model's sites change from run to run: {sorted(set(again) ^ set(shapes))} come and go. "
                "Sample every site in every run (a site that plays no part may be ignored afterwards)."
            )
        for name, node in again.items():
            if node["value"].shape != shapes[name]:
                raise ValueError(
                    f"site '{name}' changes its shape from run to run: {tuple(shapes[name])}, then "
                    f"{tuple(node['value'].shape)}. Pad it to a fixed shape."
                )
            before, now = measured[name], _measured(name, roles[name], node, shapes[name])
            if before is not None and now is not None and not torch.equal(before, now):
                raise ValueError(
                    f"the mask of outcome '{name}' changes from run to run: what is measured must not depend on "
                    "chance. Use a fixed mask, or make the missingness an outcome of its own."
                )


def _measured(name: str, role: Role, node: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Return which elements of an outcome its mask leaves in; None where there is no mask."""
    if is_deterministic(node):
        return None
    layer, found = node["fn"], [] if node["mask"] is None else [(node["mask"], len(node["fn"].event_shape))]
    while layer is not None:
        if getattr(layer, "_mask", None) is not None:
            found.append((layer._mask, len(layer.event_shape)))
        layer = getattr(layer, "base_dist", None)
    if not found:
        return None
    if role != "observation":
        raise ValueError(
            f"site '{name}' is masked but is no outcome: a mask changes the log density, not the simulation. "
            "On an outcome it means 'not measured'; elsewhere remove it."
        )
    measured = torch.ones(shape, dtype=torch.bool, device=node["value"].device)
    for mask, event_dim in found:
        own = torch.as_tensor(mask, device=measured.device)
        measured = measured & own.reshape(own.shape + (1,) * event_dim)
    if not measured.any():
        raise ValueError(f"outcome '{name}' is masked everywhere: nothing of it is measured.")
    return measured


def _check_vectorised(program: Program, shapes: Mapping[str, torch.Size], roles: Mapping[str, Role]) -> tuple[str, ...]:
    """Raise unless single runs agree with vectorised ones; return the sites that could not be checked."""
    unchecked: tuple[str, ...] = ()
    for size in PROBE_SIZES:
        run = _vectorised_run(program, size, shapes)
        unchecked = _replay(program, run, size, shapes, {})
    return unchecked


def _vectorised_run(
    program: Program, size: int, shapes: Mapping[str, torch.Size], row_designs: Mapping[str, Tensor] | None = None
) -> ProgramRun:
    advice = "Write the model batch-friendly (index dimensions from the right), or pass vectorize=False."
    try:
        run = run_rows(program, size, shapes, row_designs=row_designs)
    except Exception as error:  # whatever a model may raise on batched input
        raise ValueError(
            f"vectorisation failed: run for {size} experiments at once the model raised {type(error).__name__}: "
            f"{error}. {advice}"
        ) from error
    nodes = sample_nodes(run.traces[0])
    if set(nodes) != set(shapes):
        raise ValueError(f"vectorisation failed: sites {sorted(set(nodes) ^ set(shapes))} come and go. {advice}")
    for name in shapes:
        try:
            run.value(name)
        except ValueError as error:
            raise ValueError(f"vectorisation failed: {error} {advice}") from error
    return run


def _replay(
    program: Program,
    run: ProgramRun,
    size: int,
    shapes: Mapping[str, torch.Size],
    row_designs: Mapping[str, Tensor],
) -> tuple[str, ...]:
    """Replay each row of a vectorised run through the single-run model and compare what it says of every site."""
    nodes = sample_nodes(run.traces[0])
    random = {name: run.value(name) for name, node in nodes.items() if not is_deterministic(node)}
    single = run_rows(replace(program, vectorised=False), size, shapes, row_designs=row_designs, row_values=random)
    unchecked = []
    for name, node in nodes.items():
        together, alone = _statement(run, name, node), _statement(single, name, node)
        if together is None or alone is None:
            unchecked.append(name)
        elif not _same(together, alone).all():
            what = "value" if is_deterministic(node) else "log density"
            raise ValueError(
                f"vectorisation is wrong at site '{name}': replayed one experiment at a time its {what} differs "
                f"({_first_difference(together, alone)}). Somewhere before it the model mixes experiments, for example "
                "by a sum or a softmax over the first dimension; index dimensions from the right, or pass "
                "vectorize=False."
            )
    return tuple(unchecked)


def _statement(run: ProgramRun, name: str, node: Mapping[str, Any]) -> Tensor | None:
    """What a run says of a site given its parents: a value, a log density, or nothing."""
    if is_deterministic(node):
        return run.flat_value(name)
    try:
        return run.log_prob(name)
    except NotImplementedError:
        return None


def _same(first: Tensor, second: Tensor) -> Tensor:
    if not first.dtype.is_floating_point:
        return first == second
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return torch.isclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)


def _first_difference(first: Tensor, second: Tensor) -> str:
    index = tuple((~_same(first, second)).nonzero()[0].tolist())
    return f"{first[index].item():.6g} together, {second[index].item():.6g} alone"


def _lay_out_designs(
    program: Program,
    shapes: Mapping[str, torch.Size],
    roles: Mapping[str, Role],
    designs: tuple[DesignSite, ...],
    candidates: Mapping[str, Tensor],
) -> Program:
    """Find the fewest singletons between row and design value that pass the replay check."""
    if not candidates:
        return program
    if not program.vectorised:
        return replace(program, design_singletons=dict.fromkeys((site.name for site in designs), 0))
    size = PROBE_SIZES[0]
    rows = {
        site.name: _spread(candidates.get(site.name, site.value).reshape(-1, *site.value.shape), size)
        for site in designs
    }
    layouts = itertools.product(range(program.max_plate_nesting + 1), repeat=len(rows))
    for layout in sorted(layouts, key=sum):
        trial = replace(program, design_singletons=dict(zip(rows, layout, strict=True)))
        try:
            run = _vectorised_run(trial, size, shapes, rows)
            _replay(trial, run, size, shapes, rows)
        except ValueError:
            continue
        return trial
    warn(
        "the model does not take one design an experiment, so candidate designs are simulated one after the other. "
        "Use the designs by broadcasting from the right to have them simulated together.",
    )
    return program


def _spread(values: Tensor, size: int) -> Tensor:
    return values[torch.linspace(0, values.shape[0] - 1, size).round().long()]


class _Dependence:
    """Which sites change when the values of others are exchanged."""

    def __init__(self, program: Program, shapes: Mapping[str, torch.Size], nodes: Mapping[str, Any]):
        self.program, self.shapes, self.nodes = program, shapes, nodes
        self.size = PROBE_SIZES[1] if program.vectorised else 2
        self.random = [name for name, node in nodes.items() if not is_deterministic(node)]
        first, second = (run_rows(program, self.size, shapes) for _ in range(2))
        self.values = {name: first.value(name) for name in self.random}
        self.exchange = {name: second.value(name) for name in self.random}
        self.base = self.run([])

    def run(self, exchanged: Iterable[str]) -> ProgramRun:
        values = {**self.values, **{name: self.exchange[name] for name in exchanged}}
        return run_rows(self.program, self.size, self.shapes, row_values=values)

    def influenced(self, exchanged: Iterable[str]) -> list[str]:
        """Sites whose distribution (or deterministic value) changes with the values of `exchanged`."""
        run = self.run(exchanged)
        changed = []
        for name, node in self.nodes.items():
            before, after = _statement(self.base, name, node), _statement(run, name, node)
            if name not in exchanged and before is not None and after is not None and not _same(before, after).all():
                changed.append(name)
        return changed

    def support_moves(self, name: str, exchanged: Iterable[str]) -> bool:
        """Whether the bijection onto the site's support changes with the values of `exchanged`."""
        try:
            before = _supports_at_zero(self.base, name)
            after = _supports_at_zero(self.run(exchanged), name)
        except NotImplementedError:
            return False
        return not _same(before, after).all()


def _supports_at_zero(run: ProgramRun, name: str) -> Tensor:
    points = []
    for trace in run.traces:
        node = trace.nodes[name]
        transform = support_transform(node["fn"])
        zero = torch.zeros_like(transform.inv(node["value"]))
        points.append(transform(zero).reshape(run.rows_per_trace, -1))
    return torch.cat(points)


def _describe(
    name: str,
    role: Role,
    node: Mapping[str, Any],
    own_node: Mapping[str, Any] | None,
    measured: Tensor | None,
    dependence: _Dependence,
) -> Site:
    fn, value = node["fn"], node["value"]
    deterministic = is_deterministic(node)
    transform = site_transform(name, role, node, own_node) if role in ("target", "observation") else None
    latents = [other for other in dependence.random if other != name]
    dependent = transform is not None and own_node is node and dependence.support_moves(name, latents)
    if transform is not None and own_node is not node:
        dependent = False
    if dependent and role == "observation":
        # Bounds that move with the latents would carry them into the packed outcome; its raw values do not.
        transform, dependent = None, False
    try:
        fn.log_prob(value)
        has_density = not deterministic
    except NotImplementedError:
        has_density = False
    discrete = not value.dtype.is_floating_point or (not deterministic and has_discrete_support(fn))
    dim = value.numel() if transform is None else transform.inv(value).numel()
    if measured is not None:
        transform, dim = None, int(measured.sum())
    return Site(
        name=name,
        role=role,
        shape=value.shape,
        is_deterministic=deterministic,
        is_discrete=discrete,
        has_density=has_density,
        has_rsample=deterministic or bool(getattr(fn, "has_rsample", False)),
        transform=transform,
        dependent_support=dependent,
        packed_dim=dim,
        dtype=value.dtype,
        support_values=_support_values(fn) if discrete else None,
        measured=measured,
    )


def _support_values(fn: Any) -> Tensor | None:
    base = base_distribution(fn)
    if not getattr(base, "has_enumerate_support", False) or base.event_shape:
        return None
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError:  # sizes that differ between elements
        return None
    return values.flatten() if values.numel() == values.shape[0] else None


def _leaks(dependence: _Dependence, targets: tuple[Site, ...], nuisance: list[str]) -> dict[str, str]:
    names = {site.name for site in targets}
    leaks: dict[str, str] = {}
    for parent in nuisance:
        for name in names & set(dependence.influenced([parent])):
            leaks.setdefault(name, parent)
    return leaks


def _check_supports(
    dependence: _Dependence, targets: tuple[Site, ...], nuisance: list[str], described: Mapping[str, Site]
) -> None:
    for site in targets:
        if not site.dependent_support:
            continue
        for parent in nuisance:
            if dependence.support_moves(site.name, [parent]):
                raise NotImplementedError(
                    f"the support of target '{site.name}' depends on '{parent}', which is not a target: its bounds "
                    f"would tell the posterior what was not observed. Add '{parent}' to the targets."
                )


def _redrawable(described: Mapping[str, Site], followers: set[str]) -> bool:
    """Whether outcomes can be drawn anew, given everything before them, without running the model again.

    Nothing that is learnt or observed may follow from an outcome, and a site that states no density hides from the
    intervention whether it does.
    """
    random = [site for site in described.values() if not site.is_deterministic and site.role != "history"]
    outcomes = [site for site in described.values() if site.role == "observation"]
    matter = {site.name for site in random} | {site.name for site in described.values() if site.role == "target"}
    return (
        all(not site.is_deterministic for site in outcomes)
        and all(site.has_density for site in random)
        and not matter & followers
    )


def _design_dependent(
    program: Program, shapes: Mapping[str, torch.Size], designs: tuple[DesignSite, ...], targets: tuple[Site, ...]
) -> tuple[str, ...]:
    if not designs:
        return ()
    size = PROBE_SIZES[0] if program.vectorised else 1
    stored = {site.name: site.value for site in designs}
    moved = {site.name: _moved(site) for site in designs}
    run = run_rows(program, size, shapes, designs=stored)
    nodes = sample_nodes(run.traces[0])
    values = {name: run.value(name) for name, node in nodes.items() if not is_deterministic(node)}
    again = run_rows(program, size, shapes, designs=moved, row_values=values)
    changed = []
    for site in targets:
        before, after = _statement(run, site.name, nodes[site.name]), _statement(again, site.name, nodes[site.name])
        if before is not None and after is not None and not _same(before, after).all():
            changed.append(site.name)
    return tuple(changed)


def _moved(site: DesignSite) -> Tensor:
    unconstrained = site.transform.inv(site.value)
    return site.transform(unconstrained + 0.1 + 0.1 * torch.rand_like(unconstrained))


def _warn_unreached(dependence: _Dependence, targets: tuple[Site, ...], observations: tuple[Site, ...]) -> None:
    for site in targets:
        others = [name for name in dependence.random if name != site.name]
        # A target drawn given others is informed through them even where it reaches nothing itself.
        if site.is_deterministic or (others and site.name in dependence.influenced(others)):
            continue
        unreached = _unreached_elements(dependence, site, [observation.name for observation in observations])
        if unreached:
            warn(
                f"target {', '.join(unreached)} never reaches the outcome: exchanging its value changes nothing that "
                "is observed, so the experiment tells nothing about it.",
            )


def _unreached_elements(dependence: _Dependence, site: Site, outcomes: list[str]) -> list[str]:
    """Elements of a target whose exchange leaves the outcomes alone, also by way of nuisance sites."""
    elementwise = site.transform is not None and not site.dependent_support and dependence.program.vectorised
    names = element_names(site.name, site.shape)
    if not elementwise or site.packed_dim != len(names) or len(names) > 64:
        return [] if _reached(dependence, site.name, dependence.exchange[site.name], outcomes) else [f"'{site.name}'"]
    old, new = dependence.values[site.name], dependence.exchange[site.name]
    unreached = []
    for index, name in enumerate(names):
        mixed = old.reshape(old.shape[0], -1).clone()
        mixed[:, index] = new.reshape(new.shape[0], -1)[:, index]
        if not _reached(dependence, site.name, mixed.reshape(old.shape), outcomes):
            unreached.append(name)
    return unreached


def _reached(dependence: _Dependence, name: str, exchanged: Tensor, outcomes: list[str]) -> bool:
    # Nuisance sites between target and outcome are drawn afresh with equal random numbers, outcomes with a density
    # are held, so that what changes at an outcome is its distribution.
    held = {other: dependence.values[other] for other in outcomes if other in dependence.random}
    targets = {name: dependence.values[name]}
    if torch.equal(dependence.values[name], exchanged):
        return True
    statements = []
    for target in (targets, {name: exchanged}):
        pyro.set_rng_seed(0)
        run = run_rows(dependence.program, dependence.size, dependence.shapes, row_values={**held, **target})
        statements.append([_statement(run, outcome, dependence.nodes[outcome]) for outcome in outcomes])
    for before, after in zip(*statements, strict=True):
        if before is None or after is None or not _same(before, after).all():
            return True
    return False

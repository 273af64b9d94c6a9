"""What must not change from one single run to the next: sites, shapes, masks, and what is said of the same values.

The last shows random numbers drawn outside sample sites: two runs with equal values at all sample sites then state
different log densities. Such a density is not that of what is simulated, so it is refused. A deterministic site may
hold noise of its own, as a simulator in NumPy does, where experiments run one by one; run together they could not be
checked against single runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_voed.experiment.parameters import naming_sites
from pyro_voed.experiment.programs import (
    Program,
    ProgramRun,
    is_deterministic,
    masks,
    run_rows,
    sample_nodes,
    sites_come_and_go,
    trace_program,
)
from pyro_voed.experiment.sites import Role
from pyro_voed.experiment.statements import changed

_MAKE_SITES = (
    "so it draws random numbers outside pyro.sample, for example by torch.randn or numpy.random. Make each draw a "
    "sample site, as in pyro.sample('noise', dist.Normal(0.0, 1.0))"
)


def check_static(
    program: Program,
    shapes: Mapping[str, torch.Size],
    roles: Mapping[str, Role],
    measured: Mapping[str, Tensor | None],
    *,
    vectorize: bool,
) -> bool:
    """Run the model alone a few times; return whether its deterministic sites hold noise of their own.

    `shapes`, `roles` and `measured` (`measured_elements`) are those of a run before.
    """
    for _ in range(2):
        trace = naming_sites(lambda: trace_program(program, {}, {}, None), may_fail=program.may_fail)
        program.meter.num_calls += 1
        _check_same_sites(sample_nodes(trace), shapes, roles, measured)
    first = ProgramRun((trace,), 1, shapes)
    nodes = sample_nodes(trace)
    values = {name: first.value(name) for name, node in nodes.items() if not is_deterministic(node)}
    again = run_rows(program, 1, shapes, row_values=values)
    moving = [name for name in nodes if changed(first, again, name)]
    for name in moving:
        what = f"site '{name}': run again with the same values at all sample sites, the model gives another "
        if not is_deterministic(nodes[name]):
            raise ValueError(
                f"{what}log density, {_MAKE_SITES}. (A simulator that makes its own noise may return it as a "
                "pyro.deterministic outcome, which states no density, with vectorize=False.)"
            )
        if vectorize:
            raise ValueError(f"{what}value, {_MAKE_SITES}, or let the simulator make its noise with vectorize=False.")
    return bool(moving)


def _check_same_sites(
    nodes: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    roles: Mapping[str, Role],
    measured: Mapping[str, Tensor | None],
) -> None:
    if set(nodes) != set(shapes):
        raise ValueError(sites_come_and_go(set(nodes) ^ set(shapes)))
    for name, node in nodes.items():
        if node["value"].shape != shapes[name]:
            raise ValueError(
                f"site '{name}' changes its shape from run to run: {tuple(shapes[name])}, then "
                f"{tuple(node['value'].shape)}. Pad it to a fixed shape."
            )
        before, now = measured[name], measured_elements(name, roles[name], node, shapes[name])
        if before is not None and now is not None and not torch.equal(before, now):
            raise ValueError(moving_mask(name))


def moving_mask(name: str) -> str:
    """Say that a mask changes."""
    return (
        f"the mask of outcome '{name}' changes from run to run at one design: what is measured must not depend on "
        "chance or on the outcome. Let it depend on designs alone, or make the missingness an outcome of its own."
    )


def measured_elements(name: str, role: Role, node: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Return which elements of an outcome its mask leaves in; None where there is no mask."""
    found = list(masks(node))
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

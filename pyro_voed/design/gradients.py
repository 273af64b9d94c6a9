"""Does the design reach the outcome by a gradient, and only by gradients?

A pathwise gradient sees what is reparametrised. A site that depends on a design and whose draws carry no gradient
would be dropped silently, and the search would climb something else; a design that reaches nothing would not move.
Both are found here, in one run with gradients on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_voed.programs import is_deterministic, run_rows, sample_nodes
from pyro_voed.sites import Sites

PROBE_ROWS = 5


def check_design_gradients(sites: Sites) -> None:
    """Raise where gradients do not tell how the terms depend on the designs.

    Raises:
        NotImplementedError: If a site that depends on a design has no `rsample`.
        ValueError: If a design moves neither outcome nor targets.
    """
    with torch.enable_grad():
        designs = {site.name: site.value.clone().requires_grad_() for site in sites.designs}
        run = run_rows(sites.program, PROBE_ROWS, sites.shapes, designs=designs)
        for name, node in sample_nodes(run.traces[0]).items():
            if is_deterministic(node) or getattr(node["fn"], "has_rsample", False):
                continue
            try:
                log_prob = run.log_prob(name)
            except NotImplementedError:
                log_prob = run.value(name)
            moving = _reached(log_prob, designs)
            if moving:
                raise NotImplementedError(
                    f"site '{name}' ({type(node['fn']).__name__}) depends on design {moving} and its draws carry no "
                    "gradient, so a pathwise gradient would be wrong. Search over candidate designs with "
                    "eig_flow(designs=...) instead."
                )
        values = [run.value(site.name) for site in (*sites.observations, *sites.targets)]
        reached = set().union(*(_reached(value, designs) for value in values))
    idle = [name for name in designs if name not in reached]
    if idle:
        raise ValueError(
            f"no gradient flows from design {idle} to the outcome: the model does not use it there, or uses it outside "
            "torch (NumPy, rounding, detach). Search over candidate designs with eig_flow(designs=...) instead."
        )


def _reached(value: Tensor, designs: dict[str, Tensor]) -> list[str]:
    """Designs to which gradients of `value` flow."""
    if not value.requires_grad:
        return []
    gradients = torch.autograd.grad(value.sum(), list(designs.values()), retain_graph=True, allow_unused=True)
    return [name for name, gradient in zip(designs, gradients, strict=True) if gradient is not None]

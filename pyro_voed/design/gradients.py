r"""Design gradients: pathwise where draws are reparametrised, score-function terms where they are not.

With outcomes (or latents) z that are drawn without `rsample`,

.. math::
    \nabla_\xi \mathbb{E}_{p(z \mid \xi)}[f(z, \xi)] = \mathbb{E}\big[\nabla_\xi f(z, \xi)
    + (f(z, \xi) - b)\, \nabla_\xi \log p(z \mid \xi)\big]

for any b that does not depend on the draw itself; here the mean of the other draws' terms. Without the second part
the gradient would be silently wrong, so one run with gradients on finds the sites that need it, and the designs that
reach nothing.

References:
    Williams (1992), "Simple statistical gradient-following algorithms for connectionist reinforcement learning";
    Kool, van Hoof and Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free!".
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.design.starts import elsewhere
from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import is_deterministic, run_rows, sample_nodes

PROBE_ROWS = 5
PLACES = 8
"""Designs at which a gradient is looked for before one is said to have none."""
NO_GRADIENT = "Search without gradients: search_spsa or, in few dimensions, search_grid, with any estimator of designs."


def score_terms(
    terms: Float[Tensor, "num_samples *batch"], score: Float[Tensor, "num_samples *batch"]
) -> Float[Tensor, "num_samples *batch"]:
    """Return terms of the same value whose gradient includes the score-function part.

    `score` is the log density of the draws, at least two and independent, that carry no gradient themselves.
    """
    fixed = terms.detach()
    baseline = (fixed.sum(0) - fixed) / (terms.shape[0] - 1)
    return terms + (fixed - baseline) * (score - score.detach())


def score_sites(experiment: Experiment) -> tuple[str, ...]:
    """Return the sites whose draws carry no gradient though their distribution depends on a design.

    A site that has no density either has no gradient, and is refused, as is a design that moves neither outcome nor
    targets.
    """
    scored: dict[str, None] = {}
    reached: set[str] = set()
    names = [site.name for site in experiment.designs]
    for attempt in range(PLACES):
        # Off the start, where a gradient that happens to vanish there does not; then anywhere.
        moved = _designs(experiment, moved=True) if attempt == 0 else elsewhere(experiment.designs)
        _probe(experiment, moved, scored, reached)
        if reached.issuperset(names):
            break
    idle = [name for name in names if name not in reached]
    if idle:
        raise ValueError(
            f"no gradient flows from design {idle} to the outcome: the model does not use it there, or uses it outside "
            f"torch (NumPy, rounding, detach). {NO_GRADIENT}"
        )
    return tuple(scored)


def _probe(experiment: Experiment, at: Mapping[str, Tensor], scored: dict[str, None], reached: set[str]) -> None:
    """Note the sites that need their score at some designs, and the designs that reach something there."""
    with torch.enable_grad():
        designs = {name: value.detach().requires_grad_() for name, value in at.items()}
        run = run_rows(experiment.program, PROBE_ROWS, experiment.shapes, designs=designs)
        for name, node in sample_nodes(run.traces[0]).items():
            if is_deterministic(node) or getattr(node["fn"], "has_rsample", False):
                continue
            try:
                moving = _reached(run.log_prob(name), designs)
            except NotImplementedError:
                _check_moves_alone(experiment, name, type(node["fn"]).__name__)
                continue
            reached |= set(moving)
            if moving:
                scored[name] = None
        for site in (*experiment.observations, *experiment.targets):
            reached |= set(_reached(run.value(site.name), designs))


def _check_moves_alone(experiment: Experiment, name: str, kind: str) -> None:
    """Refuse a site without rsample and density whose draws change with a design, random numbers being equal."""
    values = []
    seed = int(torch.randint(2**31 - 1, ()).item())
    with torch.no_grad(), pyro.validation_enabled(False):
        for moved in (False, True):
            with common_stream(seed):
                run = run_rows(experiment.program, PROBE_ROWS, experiment.shapes, designs=_designs(experiment, moved))
            values.append(run.value(name))
    if not torch.equal(*values):
        raise NotImplementedError(
            f"site '{name}' ({kind}) depends on a design, and has neither reparametrised draws nor a density, so no "
            f"gradient tells how. {NO_GRADIENT}"
        )


def _designs(experiment: Experiment, moved: bool) -> Mapping[str, Tensor]:
    return {site.name: site.transform(site.transform.inv(site.value) + 0.1 * moved) for site in experiment.designs}


def _reached(value: Tensor, designs: dict[str, Tensor]) -> list[str]:
    """Designs to which gradients of `value` flow; zeros, as of a rounded design, do not count."""
    if not value.requires_grad:
        return []
    # Random weights, so that gradients of different elements do not cancel.
    weighted = (torch.rand_like(value) * value).sum()
    gradients = torch.autograd.grad(weighted, list(designs.values()), retain_graph=True, allow_unused=True)
    return [
        name
        for name, gradient in zip(designs, gradients, strict=True)
        if gradient is not None and bool((gradient != 0).any())
    ]

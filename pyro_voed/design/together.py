"""Ascents from several starts at once: every start with designs and a density of its own, all stacked.

One run of the model serves all starts (their designs are a batch), and one pass through stacked weights trains all
densities (`StackedDensity`). Starts share the clock and nothing else: each climbs its own bound with its own clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.densities import StackedDensity
from pyro_voed.design.climb import RECORD_EVERY, RESCALE_EVERY, RESCALE_SIZE, Climb, Search, nudged
from pyro_voed.design.gradients import score_terms
from pyro_voed.estimators.ensemble import at_member
from pyro_voed.estimators.learning import check_pilot, explain_terms, weights_group
from pyro_voed.experiment.simulate import JointSample
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh, kept_on_error


def can_climb_together(search: Search) -> bool:
    """Whether designs can differ from row to row and the objective is of one outcome and one density alone."""
    program = search.experiment.program
    return program.vectorised and program.design_singletons is not None and search.objective.stackable


def climb_together(search: Search, starts: Sequence[Mapping[str, Tensor]]) -> list[Climb]:
    """Ascend from all starts; `can_climb_together` must hold."""
    experiment, objective, count = search.experiment, search.objective, len(starts)
    leaves = {
        site.name: torch.stack([nudged(site, start[site.name]) for start in starts]).requires_grad_()
        for site in experiment.designs
    }
    with torch.no_grad():
        _project(search, leaves)
        pilot = _draw(search, _designs(search, leaves), 2 * RESCALE_SIZE)
    check_pilot(experiment, pilot)
    density = StackedDensity(
        [
            objective.build(search.density, at_member(pilot, index, torch.Size([count])), experiment, search.summary)
            for index in range(count)
        ]
    )
    groups = [
        {"params": list(leaves.values()), "lr": search.design_learning_rate, "members": count},
        weights_group(density, search.learning_rate),
    ]
    path: dict[str, list[Tensor]] = {name: [] for name in leaves}
    path_steps: list[int] = []
    latest = torch.zeros(count, dtype=experiment.dtype, device=experiment.device)
    bounds: list[Tensor] = []
    cooling: list[bool] = []

    def terms(sample: JointSample) -> Tensor:
        plain = objective(sample, density)
        latest.copy_(plain.detach().mean(0))
        return plain if sample.score is None else score_terms(plain, sample.score)

    def record(step: int) -> None:
        path_steps.append(step)
        for name, value in _detached(search, leaves).items():
            path[name].append(value)

    @torch.no_grad()
    def after_step(step: int) -> None:
        bounds.append(latest.clone())
        _project(search, leaves)
        if (step + 1) % RECORD_EVERY == 0:
            record(step + 1)
        if not cooling and step % RESCALE_EVERY == 0:
            density.rescale_context_(_draw(search, _designs(search, leaves), RESCALE_SIZE).y)

    record(0)

    def learnt() -> dict[str, Any]:
        return {"density": density, "designs": _detached(search, leaves)}

    with kept_on_error(learnt), pyro.validation_enabled(False):
        history = fit_fresh(
            lambda: _draw(search, _designs(search, leaves), search.batch_size),
            terms,
            Ascent(groups),
            num_steps=search.num_steps,
            max_steps=search.max_steps,
            explain=explain_terms,
            after_step=after_step,
            before_cooldown=lambda: cooling.append(True),
            progress=search.progress,
            description="optimise_design",
        )
    if path_steps[-1] != history.num_steps:
        record(history.num_steps)
    ended = _detached(search, leaves)
    own_bounds = torch.stack(bounds).cpu()
    return [
        Climb(
            {name: value[index] for name, value in ended.items()},
            density.member(index).eval(),
            replace(history, bound=own_bounds[: history.num_steps, index]),
            {name: torch.stack(values)[:, index] for name, values in path.items()},
            torch.tensor(path_steps),
        )
        for index in range(count)
    ]


def _draw(search: Search, designs: Mapping[str, Tensor], num_samples: int) -> JointSample:
    sample = search.draw(designs, num_samples)
    # Each start's density is of its own design, so the design is no context.
    return replace(sample, designs=None)


def _designs(search: Search, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if search.projection is None:
        return {site.name: site.transform(leaves[site.name]) for site in search.experiment.designs}
    count = next(iter(leaves.values())).shape[0]
    single = [search.designs_of({name: leaf[index] for name, leaf in leaves.items()}) for index in range(count)]
    return {name: torch.stack([designs[name] for designs in single]) for name in leaves}


@torch.no_grad()
def _detached(search: Search, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _designs(search, leaves).items()}


def _project(search: Search, leaves: Mapping[str, Tensor]) -> None:
    if search.projection is None:
        return
    for index in range(next(iter(leaves.values())).shape[0]):
        search.project({name: leaf.detach()[index] for name, leaf in leaves.items()})

"""One ascent from one start: designs and density climb together, with everything that goes on around the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.checks import check_known, warn
from pyro_voed.design.gradients import score_terms
from pyro_voed.estimators.learning import (
    EVALUATION_CHUNK,
    check_pilot,
    evaluate_terms,
    explain_terms,
)
from pyro_voed.estimators.objective import Objective, batched_means
from pyro_voed.estimators.posterior_bound import stated_prior
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.scoring import log_joint
from pyro_voed.experiment.simulate import JointSample, draw_joint, sample_joint
from pyro_voed.experiment.sites import DesignSite, Experiment
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import FitHistory, element_names
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh, kept_on_error

RESCALE_EVERY = 50
RESCALE_SIZE = 500
RECORD_EVERY = 10
MAX_UNCONSTRAINED = 6.0
"""A design whose sigmoid-like map is this far out hardly moves any more: it is nudged back inside."""


@dataclass(frozen=True)
class Climb:
    """Where one start ended.

    Attributes:
        designs: The last designs.
        density: What was trained along with them; None for objectives that learn nothing.
        history: Training record.
        path: Designs on the way, `(num_records, *shape)` each.
        path_steps: The steps they are from.
    """

    designs: dict[str, Tensor]
    density: Any
    history: FitHistory
    path: dict[str, Tensor]
    path_steps: Tensor


@dataclass(frozen=True)
class Search:
    """One search's settings, shared by its starts; the fields are the arguments of `optimise_design`."""

    experiment: Experiment
    objective: Objective
    scored: tuple[str, ...]
    prior_entropy: float | None
    density: Any
    summary: Summary
    projection: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None
    num_steps: int | None
    max_steps: int
    batch_size: int
    learning_rate: float
    design_learning_rate: float
    progress: bool | None

    def climb(self, start: Mapping[str, Tensor]) -> Climb:
        """Ascend from one start."""
        experiment, objective = self.experiment, self.objective
        leaves = {site.name: nudged(site, start[site.name]).requires_grad_() for site in experiment.designs}
        with torch.no_grad():
            self.project(leaves)
            pilot = self.draw(self.designs_of(leaves), 2 * RESCALE_SIZE)
        check_pilot(experiment, pilot)
        density = objective.build(self.density, pilot, experiment, self.summary)
        ascent = Ascent(self._groups(density, leaves))
        path: dict[str, list[Tensor]] = {name: [] for name in leaves}
        path_steps: list[int] = []
        steps: list[int] = []
        cooling: list[bool] = []

        def draw() -> JointSample:
            # At a saddle point the design stands still while the density follows it.
            still = len(steps) % (objective.inner_steps + 1) != objective.inner_steps
            designs = self.designs_of(leaves)
            return self.draw({n: v.detach() for n, v in designs.items()} if still else designs, self.batch_size)

        def terms(sample: JointSample) -> Tensor:
            plain = objective(sample, density)
            return plain if sample.score is None else score_terms(plain, sample.score)

        def record(step: int) -> None:
            path_steps.append(step)
            for name, value in self._detached(leaves).items():
                path[name].append(value)

        @torch.no_grad()
        def after_step(step: int) -> None:
            steps.append(step)
            self.project(leaves)
            if (step + 1) % RECORD_EVERY == 0:
                record(step + 1)
            if not cooling and step % RESCALE_EVERY == 0:
                objective.rescale(density, sample_joint(experiment, RESCALE_SIZE, self.designs_of(leaves)))

        record(0)

        def learnt() -> dict[str, Any]:
            return {"density": density, "designs": self._detached(leaves)}

        with kept_on_error(learnt), pyro.validation_enabled(False):
            history = fit_fresh(
                draw,
                terms,
                ascent,
                num_steps=self.num_steps,
                max_steps=self.max_steps,
                explain=explain_terms,
                after_step=after_step,
                before_cooldown=lambda: cooling.append(True),
                progress=self.progress,
                description="optimise_design",
            )
        if path_steps[-1] != history.num_steps:
            record(history.num_steps)
        return Climb(
            self._detached(leaves),
            density if density is None else density.eval(),
            history,
            {name: torch.stack(values) for name, values in path.items()},
            torch.tensor(path_steps),
        )

    def score(self, climb: Climb, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return estimate, standard error and outcome range on fresh simulations."""
        size = self.objective.evaluation_size
        terms, outcome_range = evaluate_terms(
            self.experiment,
            lambda sample: self.objective(self._prepared(sample, climb.designs), climb.density),
            num_samples if size is None else max(2 * size, num_samples // size * size),
            climb.designs,
            likelihood=self.objective.needs_likelihood,
            estimator="optimise_design",
            chunk=EVALUATION_CHUNK if size is None else size,
        )
        return *mean_and_standard_error(terms if size is None else batched_means(terms, size)), outcome_range

    def draw(self, designs: Mapping[str, Tensor], num_samples: int) -> JointSample:
        """Simulate experiments with what the objective needs."""
        scored = self.scored if any(value.requires_grad for value in designs.values()) else ()
        sample = draw_joint(
            self.experiment, num_samples, designs, likelihood=self.objective.needs_likelihood, score=scored
        )
        return self._prepared(sample, designs)

    def _prepared(self, sample: JointSample, designs: Mapping[str, Tensor]) -> JointSample:
        sample = stated_prior(self.prior_entropy)(sample)
        if not self.objective.needs_log_joint:
            return sample

        def rescore(theta: Tensor) -> tuple[Tensor, Tensor]:
            num, inner = theta.shape[:2]
            repeated = {name: value.repeat_interleave(inner, 0) for name, value in sample.values.items()}
            log_prior, log_likelihood = log_joint(self.experiment, theta.flatten(0, 1), repeated, designs)
            return log_prior.reshape(num, inner), log_likelihood.reshape(num, inner)

        return replace(sample, log_joint=rescore)

    def _groups(self, density: Any, leaves: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        groups = [{"params": list(leaves.values()), "lr": self.design_learning_rate}]
        if density is not None:
            weights = [parameter for parameter in density.parameters() if parameter.requires_grad]
            groups.append({"params": weights, "lr": self.learning_rate})
        return groups

    def designs_of(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one start's designs from its unconstrained coordinates, through the projection."""
        values = {site.name: site.transform(leaves[site.name]) for site in self.experiment.designs}
        if self.projection is None or not torch.is_grad_enabled():
            return values
        # Through the projection, so that a step is not spent on a direction that projecting back would undo.
        projected = {**values, **self.projection(dict(values))}
        return {
            name: projected[name] if projected[name].requires_grad else value + (projected[name] - value).detach()
            for name, value in values.items()
        }

    @torch.no_grad()
    def _detached(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # A design on the real line is its leaf, which later steps would change, so it is copied.
        return {name: value.detach().clone() for name, value in self.designs_of(leaves).items()}

    def project(self, leaves: Mapping[str, Tensor]) -> None:
        """Move one start's coordinates to where the projection puts its designs."""
        if self.projection is None:
            return
        sites = {site.name: site for site in self.sites.designs}
        values = self.designs_of(leaves)  # as they are: gradients are off between steps
        projected = self.projection(dict(values))
        check_known(projected, sites, "projection", "design")
        for name, value in projected.items():
            if value.shape != values[name].shape:
                raise ValueError(
                    f"projection: expected '{name}' of shape {tuple(values[name].shape)}, got {tuple(value.shape)}."
                )
            leaves[name].copy_(sites[name].transform.inv(value))


def unconstrained(site: DesignSite, value: Tensor) -> Tensor:
    """Return a design's unconstrained coordinates, detached."""
    return site.transform.inv(value).detach().clone()


def nudged(site: DesignSite, value: Tensor) -> Tensor:
    """Return unconstrained coordinates, moved inside where the constraint's map is flat."""
    coordinates = unconstrained(site, value)
    probe = coordinates.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(site.transform(probe).sum(), probe)
    # Near a bound the map is flat (a sigmoid's slope is below 0.0025 beyond 6) and no gradient gets through; a real
    # line or a positive value has slopes of its own size, however far out.
    flat = (coordinates.abs() > MAX_UNCONSTRAINED) & (slope.abs() < 1e-3 * (1 + value.detach().abs().max()))
    if value.shape == coordinates.shape and flat.any():
        elements = zip(element_names(site.name, value.shape), flat.flatten().tolist(), strict=True)
        names = [name for name, is_flat in elements if is_flat]
        coordinates = torch.where(flat, coordinates.sign() * 4.0, coordinates)
        warn(
            f"design {', '.join(names[:8])} starts at a bound of {site.constraint}, where no gradient moves it: nudged "
            "inside. Start it further from the bound.",
        )
    return coordinates

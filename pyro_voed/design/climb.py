"""The ascent: designs and density climb together, from one start or from several side by side.

Starts that climb side by side are stacked: their designs are a batch, so one run of the model serves all, and their
densities are one `StackedDensity`. They share the clock and nothing else: each climbs its own bound with its own
clipping. One start is a stack of one, which needs no batch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.densities import StackedDensity
from pyro_voed.design.cost import Cost
from pyro_voed.design.gradients import score_terms
from pyro_voed.design.position import Position
from pyro_voed.design.projection import Projection
from pyro_voed.estimators.ensemble import at_member
from pyro_voed.estimators.fit import EVALUATION_CHUNK, MAX_STEPS, Evaluation, Fit, explain_terms, weights_group
from pyro_voed.estimators.objective import Objective, batched_means
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.pilot import check_pilot
from pyro_voed.experiment.sampling import draw_joint
from pyro_voed.experiment.scoring import log_joint
from pyro_voed.results import FitHistory
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh, keeping
from pyro_voed.training.settings import Fresh

RESCALE_EVERY = 50
RESCALE_SIZE = 500
RECORD_EVERY = 10
COOLDOWN_STEPS = 1_000


@dataclass(frozen=True)
class Climb:
    """Where one start ended: the last designs, what was trained with them (if anything), and designs on the way."""

    designs: dict[str, Tensor]
    density: Any
    history: FitHistory
    path: dict[str, Tensor]
    path_steps: Tensor


@dataclass(frozen=True)
class Climber:
    """What a search by gradient climbs, and how.

    `fit` is at the starting design; `scored` are the sites whose draws carry no gradient though they move with a
    design; `density`, `summary` and `cost` are as the user gave them.
    """

    fit: Fit
    objective: Objective
    scored: tuple[str, ...]
    density: Any
    summary: Summary
    projection: Projection | None
    design_rate: float
    cost: Cost | None = None

    def climb_all(self, starts: Sequence[Mapping[str, Tensor]]) -> list[Climb]:
        """Ascend from all starts: side by side where model and objective allow it, else one after the other."""
        if self.stacks:
            return self.climb(starts)
        climbs: list[Climb] = []
        for start in starts:
            climbs += self.climb([start])
            if climbs[-1].history.stop_reason == "interrupted":
                break
        return climbs

    @property
    def stacks(self) -> bool:
        """Whether starts can climb side by side: the model and the objective allow it, and torch can stack networks."""
        given = [*self.summary.values()] if isinstance(self.summary, Mapping) else [self.summary, self.density]
        parts = [part for own in given if isinstance(own, nn.Module) for part in own.modules()]
        recurrent = any(isinstance(part, nn.RNNBase) for part in parts)
        return self.fit.experiment.takes_design_rows and self.objective.attains and not recurrent

    def climb(self, starts: Sequence[Mapping[str, Tensor]], *, density: Any = None, cools: bool = True) -> list[Climb]:
        """Ascend from starts side by side, where `stacks` allows several.

        A single start may go on with the `density` of an earlier climb. Where nothing cools, all move to the end.
        """
        position = Position.at(self.fit.experiment.designs, starts, self.projection)
        position.project_()
        density = self._density_at(position) if density is None else density.train()
        trained = [] if density is None else [weights_group(density, self.fit.rates)]
        moved = {"params": list(position.leaves.values()), "lr": self.design_rate, "members": len(starts)}
        training = self.fit.training
        assert isinstance(training, Fresh)  # a search takes no other
        bounds: list[Tensor] = []
        cooling: list[bool] = []
        costs: list[Tensor] = []  # of the present designs

        def draw() -> JointSample:
            # At a saddle point the design stands still while the density follows it.
            inner = self.objective.inner_steps
            designs = position.designs()
            still = len(bounds) % (inner + 1) != inner
            designs = {n: v.detach() for n, v in designs.items()} if still else designs
            costs[:] = [] if self.cost is None else [self._costs(self.cost, designs, position.batch)]
            return self.draw(designs, self.fit.batch_size)

        def terms(sample: JointSample) -> Tensor:
            plain = self.objective(sample, density)
            climbed = plain if sample.score is None else score_terms(plain, sample.score)
            if self.cost is not None:
                climbed = self.cost.charged(climbed, costs[0])
            bounds.append(climbed.detach().mean(0))
            return climbed

        @torch.no_grad()
        def after_step(step: int) -> None:
            position.project_()
            if (step + 1) % RECORD_EVERY == 0:
                position.record(step + 1)
            if density is not None and not cooling and step % RESCALE_EVERY == 0:
                self.objective.rescale(density, self._plain(position.designs(), RESCALE_SIZE))

        position.record(0)
        learned = lambda: {"density": _settled(density), "designs": position.present()}  # noqa: E731
        with keeping(learned), pyro.validation_enabled(False):
            history = fit_fresh(
                draw,
                terms,
                Ascent([moved, *trained]),
                num_steps=training.num_steps,
                max_steps=training.max_steps or MAX_STEPS,
                cooldown_steps=COOLDOWN_STEPS if cools else 0,
                explain=partial(explain_terms, self.fit.experiment),
                after_step=after_step,
                before_cooldown=lambda: cooling.append(True),
                progress=self.fit.progress,
                description=self.fit.name,
            )
        position.record(history.num_steps)
        return [self._ended(position, density, history, bounds, index) for index in range(len(starts))]

    def worth(self, designs: Mapping[str, Tensor], eig: Tensor) -> Tensor:
        """Return what is maximised, from the information of a design: that, less its cost or divided by it."""
        return eig if self.cost is None else self.cost.worth(eig, self.cost.at(designs))

    def reached(self, climb: Climb, num_samples: int) -> Float[Tensor, ""]:
        """Return the worth of a climb's end on fresh simulations."""
        return self.worth(climb.designs, self.evaluate(climb.designs, climb.density, num_samples).terms.mean(0))

    def _costs(self, cost: Cost, designs: Mapping[str, Tensor], batch: torch.Size) -> Tensor:
        if not batch:
            return cost.at(designs)
        return cost.at_rows(designs, {site.name: site.value.shape for site in self.fit.experiment.designs}, batch[0])

    def stay(self, designs: Mapping[str, Tensor]) -> tuple[Any, FitHistory | None]:
        """Train a density at designs that do not move; it is None where the objective learns nothing."""
        fit = replace(self.fit, designs=designs, draw=partial(self.draw, designs))
        density = self.objective.build(self.density, fit.pilot(None), fit.experiment, self.summary)
        return density, None if density is None else fit.train(density, self.objective)

    def evaluate(self, designs: Mapping[str, Tensor], density: Any, num_samples: int) -> Evaluation:
        """Return independent terms at a design on fresh simulations."""
        size = self.objective.evaluation_size
        fit = replace(self.fit, designs=designs, prepare=partial(self._completed, designs=designs))
        found = fit.evaluate(
            lambda sample: self.objective(sample, density),
            num_samples if size is None else max(2 * size, num_samples // size * size),
            chunk=EVALUATION_CHUNK if size is None else size,
        )
        return found if size is None else found._replace(terms=batched_means(found.terms, size))

    def draw(self, designs: Mapping[str, Tensor], num_samples: int) -> JointSample:
        """Simulate experiments with what the objective needs; the gradient's needs too where designs have one."""
        scored = self.scored if any(value.requires_grad for value in designs.values()) else ()
        return self._completed(self._plain(designs, num_samples, scored), designs)

    def _plain(self, designs: Mapping[str, Tensor], num_samples: int, scored: tuple[str, ...] = ()) -> JointSample:
        fit = self.fit
        sample = draw_joint(
            fit.experiment, num_samples, designs, likelihood=fit.likelihood, pairs=fit.pairs, score=scored
        )
        # Each start's density is of its own design, so the design is no context.
        return replace(sample, designs=None)

    def _completed(self, sample: JointSample, designs: Mapping[str, Tensor]) -> JointSample:
        if not self.objective.log_joint:
            return sample

        def rescore(theta: Tensor) -> tuple[Tensor, Tensor]:
            num, inner = theta.shape[:2]
            repeated = {name: value.repeat_interleave(inner, 0) for name, value in sample.values.items()}
            log_prior, log_likelihood = log_joint(self.fit.experiment, theta.flatten(0, 1), repeated, designs)
            return log_prior.reshape(num, inner), log_likelihood.reshape(num, inner)

        return replace(sample, log_joint=rescore)

    @torch.no_grad()
    def _density_at(self, position: Position) -> Any:
        """Return what is learned, its scales taken from simulations at the starts: one density, or one a start."""
        experiment, batch = self.fit.experiment, position.batch
        pilot = self.draw(position.designs(), 2 * RESCALE_SIZE)
        check_pilot(experiment, pilot)
        parts = [at_member(pilot, index, batch) for index in range(batch.numel())] if batch else [pilot]
        built = [self.objective.build(self.density, part, experiment, self.summary) for part in parts]
        density = StackedDensity(built) if batch else built[0]
        return density if density is None else density.train()

    def _ended(
        self, position: Position, density: Any, history: FitHistory, bounds: Sequence[Tensor], index: int
    ) -> Climb:
        own: Any = index if position.batch else ...
        bound = torch.stack([bound[own] for bound in bounds]).cpu() if bounds else history.bound
        if position.batch:
            density = density.member(index)
        return Climb(
            designs={name: value[own] for name, value in position.present().items()},
            density=_settled(density),
            history=replace(history, bound=bound),
            path={name: torch.stack([record[own] for record in records]) for name, records in position.path.items()},
            path_steps=torch.tensor(position.path_steps),
        )


def _settled(density: Any) -> Any:
    """Return what was learned, training over; None where nothing was."""
    return density if density is None else density.eval()

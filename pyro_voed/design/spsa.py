r"""Design search without gradients: simultaneous perturbation stochastic approximation (SPSA).

A simulator with discrete events has no gradient. SPSA takes two estimates a step, for any number of design variables;
the method itself is in `perturbation`, and the coordinates that it moves in are those of `coordinates`.

*Noise.* With *common random numbers* both estimates of a difference are made from the same seed, so that errors they
share cancel: with correlation :math:`\rho` its variance falls by the factor :math:`1 - \rho`. Averaging `num_repeats`
directions in a step divides it further, at their cost; so does, for nothing, the average over the last fifth of the
steps, which is where a start ends up.

*Scale.* Unless given, a is set such that the first step is about `step_size` long in each coordinate, from a few
pilot differences at the start (Spall's semiautomatic gains). No step moves a coordinate by more than twice that, since
one wild difference would otherwise undo many steps.

Bounds on information have local optima: several starts climb side by side. Which of them wins is decided on other draws
than the ones reported, and the draws of the search are used for neither. Where each began is compared with where it
ended on equal random numbers, so that a search does not end below its start by more than noise.

References:
    Spall (1992, 1998). Kleinman, Spall and Naiman (1999), "Simulation-based optimization with stochastic approximation
    using common random numbers", Management Science 45. Huan and Marzouk (2013) and Ao and Li (2020) use SPSA for
    experimental design.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_count, check_positive
from pyro_voed.design.coordinates import from_coordinates, in_interval, scattered, to_coordinates
from pyro_voed.design.evaluator import Estimator, Evaluator, run_search
from pyro_voed.design.perturbation import Admissible, Evaluate, Gains, spsa_ascent, spsa_gradient
from pyro_voed.design.projection import Constraints, Projection
from pyro_voed.design.starts import given_starts
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import DesignResult, EIGResult, FitHistory, StopReason
from pyro_voed.training.loop import keeping

PILOT_DIRECTIONS = 5
AVERAGED_SHARE = 5
"""One in so many steps, the last ones, is averaged over."""


def search_spsa(
    estimator: Estimator,
    *,
    num_steps: int = 200,
    num_repeats: int = 1,
    starts: int | Mapping[str, Any] = 1,
    constraints: Constraints | None = None,
    cost: Any = None,
    step_size: float = 0.1,
    perturbation: float = 0.1,
    a: float | None = None,
    stability: float | None = None,
    alpha: float = 0.602,
    gamma: float = 0.101,
    common_random_numbers: bool = True,
    seed: int | None = None,
) -> DesignResult:
    """Find the design with the largest expected information gain from estimates alone.

    Afterwards the best design is in the parameter store under its own name; nothing else of the caller's has changed.

    Args:
        estimator: From designs to an `EIGResult`, such as
            ``lambda designs: eig_lbkld(model, "y", "theta", designs=designs)``, with `seed` left out; the contract is
            in `evaluator`. For a search it may be cruder than for a report, as long as it errs alike at all designs.
        num_steps: Steps of each start; a step costs ``2 * num_repeats`` estimates.
        num_repeats: Directions averaged in a step.
        starts: Number of starts. The first is the stored value, else the model's initial one; further ones are
            uniform in intervals, and add N(0, 1) in unconstrained coordinates elsewhere. Or the further starts
            themselves, `(num_further_starts, *shape)` for each design.
        constraints: What couples entries, such as `min_gap("xi", 0.1)` (see `design.constraints`), or a function from
            a dict of designs to one of the nearest admissible.
        cost: As in `search_grid`. Values in `history` and `start_eigs` are then what is maximised.
        step_size: Length of the first step in each coordinate, about; no step is longer than twice this. In intervals
            the unit is their length, elsewhere that of unconstrained coordinates.
        perturbation: The constant c: half the distance between the two estimates of a difference, in the same unit,
            below 1/2. Where estimates are noisy, large ones show slopes better.
        a: The constant a; None sets it from pilot differences at the first start, by `step_size`.
        stability: The constant A; None takes a tenth of `num_steps`.
        alpha: Rate at which steps shrink.
        gamma: Rate at which perturbations shrink.
        common_random_numbers: Make both estimates of a difference (at all starts) from the same seed, one call of the
            estimator for each. False makes all estimates of a step in one call, with draws of their own.

    Returns:
        The best design with a fresh estimate there: where the highest start ended, or where it began if that has more
        on equal random numbers. `path` has every step of the winning start, though its end is the average of the last
        fifth of them; `history.bound` the mean of each step's estimates, taken beside the
        path; `initial` the estimate at the first start; `density` what the final estimate trained, if anything. Ctrl-C
        gives the best of the complete estimates (`interrupted`), which may be beside the path.

    Raises:
        TypeError: As for `search_grid`, like ValueError and KeyboardInterrupt.
        TrainingStopped: If an error ends the climb, such as an estimate that is not finite (then it is an
            `ArithmeticError` too). It carries the designs as last reached by the starts (`error.designs`).

    Example:
        >>> import pyro
        >>> from pyro_voed.estimators import eig_lbkld
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> estimator = lambda designs: eig_lbkld(implicit_toy(), "y", "theta", designs=designs, num_samples=1000)
        >>> best = search_spsa(estimator, num_steps=15, seed=0)
        >>> bool(best.designs["xi"] > 1.5), bool(pyro.param("xi") > 1.5)  # the best is 2, an end of the interval
        (True, True)
    """
    for name, count in (("num_steps", num_steps), ("num_repeats", num_repeats)):
        check_count(count, name)
    if not isinstance(starts, Mapping):
        check_count(starts, "starts")
    for name, number in (("step_size", step_size), ("perturbation", perturbation), ("alpha", alpha), ("gamma", gamma)):
        check_positive(number, name)
    if a is not None:
        check_positive(a, "a")
    if stability is not None and not 0.0 <= stability < float("inf"):
        raise ValueError(f"stability: expected a finite number of at least 0, got {stability!r}.")
    if perturbation >= 0.5:
        raise ValueError(f"perturbation: expected less than 0.5, half of an interval, got {perturbation!r}.")
    gains = Gains(a or 1.0, perturbation, num_steps / 10 if stability is None else stability, alpha, gamma)
    climb = _Climb(
        num_steps, num_repeats, starts, constraints, step_size, gains, sets_gain=a is None, common=common_random_numbers
    )
    return run_search(climb, estimator, seed, cost)


@dataclass
class _Climb:
    """One search: its settings, and where its starts have been."""

    num_steps: int
    num_repeats: int
    starts: int | Mapping[str, Any]
    constraints: Constraints | None
    step_size: float
    gains: Gains
    sets_gain: bool
    common: bool
    initial: EIGResult | None = None
    path: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    selection: Tensor | None = None
    best: int | None = None
    seconds: float = 0.0

    def find(self, evaluator: Evaluator) -> dict[str, Tensor]:
        self.initial = evaluator.begin()
        sites, generator = evaluator.sites, evaluator.generator
        self.sites, bounded = sites, in_interval(sites)
        admissible = _admissible(Projection.of(self.constraints, sites), sites)
        values = _separately(evaluator) if self.common else _together(evaluator)
        evaluate = lambda points: values(admissible(points))  # noqa: E731
        points = admissible(self._starts(evaluator, to_coordinates(sites, self.initial.designs)))
        if self.sets_gain:
            pilot, _ = spsa_gradient(
                evaluate, points[:1], self.gains.c, bounded, num_repeats=PILOT_DIRECTIONS, generator=generator
            )
            self.gains = _with_step(self.gains, pilot, self.step_size)
        self.path.append(points)
        started = time.perf_counter()
        with keeping(lambda: {"designs": from_coordinates(sites, self.path[-1])}):
            for x, value in spsa_ascent(
                evaluate,
                points,
                bounded,
                self.gains,
                num_steps=self.num_steps,
                num_repeats=self.num_repeats,
                largest_step=2.0 * self.step_size,
                generator=generator,
                admissible=admissible,
            ):
                self.path.append(x)
                self.values.append(value)
                self.seconds = time.perf_counter() - started
        ends = admissible(torch.stack(self.path[-max(1, self.num_steps // AVERAGED_SHARE) :]).mean(0))
        both = torch.stack([ends, points])  # (2, num_starts, dim)
        reached = _separate_values(evaluator, both.flatten(0, 1), evaluator.draw_seed()).reshape(2, -1)
        self.selection, side = reached.max(0)
        self.best = int(self.selection.argmax())
        return from_coordinates(sites, both[side[self.best], self.best])

    def record(self, final: EIGResult) -> dict[str, Any]:
        if not self.path:
            return {"initial": self.initial}
        recent = torch.stack(self.values[-max(1, len(self.values) // AVERAGED_SHARE) :]) if self.values else None
        best = self.best
        if best is None:  # interrupted
            best = 0 if recent is None else int(recent.mean(0).argmax())
        values = torch.stack([value[best] for value in self.values]) if self.values else torch.zeros(0)
        rates = torch.tensor([self.gains.step(k) / self.gains.step(1) for k in range(1, len(values) + 1)])
        reason: StopReason = "interrupted" if self.best is None else _stop_reason(values)
        return {
            "path": from_coordinates(self.sites, torch.stack([x[best] for x in self.path])),
            "path_steps": torch.arange(len(self.path)),
            "history": FitHistory(values, rates, reason, self.seconds),
            "start_eigs": self.selection,
            "initial": self.initial,
        }

    def _starts(self, evaluator: Evaluator, first: Float[Tensor, " dim"]) -> Float[Tensor, "num_starts dim"]:
        if isinstance(self.starts, Mapping):
            others = to_coordinates(evaluator.sites, given_starts(evaluator.sites, self.starts))
        else:
            others = scattered(evaluator.sites, first, self.starts - 1, evaluator.generator)
        return torch.cat([first.unsqueeze(0), others])


def _with_step(gains: Gains, pilot: Tensor, step_size: float) -> Gains:
    """Return gains whose a_1 times the size of a coordinate's slope is `step_size`."""
    # The root of the mean square over directions and coordinates: a direction's slope is along all of them alike.
    slope = float(pilot.square().mean().sqrt())
    # Where nothing changes at all, steps are zero regardless of a.
    return replace(gains, a=step_size * (gains.stability + 1.0) ** gains.alpha / slope if slope > 0.0 else step_size)


def _stop_reason(values: Float[Tensor, " num_steps"]) -> StopReason:
    """Say whether the estimates still rose by more than their noise over the last steps."""
    share = max(2, len(values) // AVERAGED_SHARE)
    if len(values) < 2 * share:
        return "budget"
    (before, its_error), (now, own_error) = map(mean_and_standard_error, values[-2 * share :].split(share))
    return "budget" if bool(now - before > torch.hypot(its_error, own_error)) else "converged"


def _separately(evaluator: Evaluator) -> Evaluate:
    """Return an evaluation with a call for each point, both points of a difference (at all starts) on the same seed."""

    def evaluate(points: Tensor) -> Tensor:
        seeds = [evaluator.draw_seed() for _ in range(points.shape[1])]
        sides = [
            torch.stack([_separate_values(evaluator, x, seed) for x, seed in zip(side, seeds, strict=True)])
            for side in points
        ]
        return torch.stack(sides)

    return evaluate


def _together(evaluator: Evaluator) -> Evaluate:
    """Return an evaluation with one call for all points, with draws of their own."""

    def evaluate(points: Tensor) -> Tensor:
        rows = from_coordinates(evaluator.sites, points.flatten(0, -2))
        count = points.shape[:-1].numel()
        found = evaluator.in_one_call(rows, count, evaluator.draw_seed(), "common_random_numbers=True")
        return evaluator.worth(found).to(points).reshape(points.shape[:-1])

    return evaluate


def _separate_values(evaluator: Evaluator, x: Float[Tensor, "num dim"], seed: int) -> Float[Tensor, " num"]:
    """Return estimates at points, one call each, all from the same seed."""
    found = [evaluator(from_coordinates(evaluator.sites, row), seed) for row in x]
    return torch.stack([evaluator.worth(result) for result in found]).to(x)


def _admissible(projection: Projection | None, sites: Sequence[DesignSite]) -> Admissible:
    """Return the map from points to those of the nearest admissible designs."""
    if projection is None:
        return lambda points: points

    def admissible(points: Tensor) -> Tensor:
        rows = projection.of_rows(from_coordinates(sites, points.flatten(0, -2)))
        return to_coordinates(sites, rows).to(points).reshape(points.shape)

    return admissible

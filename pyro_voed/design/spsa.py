r"""Design search without gradients: simultaneous perturbation stochastic approximation (SPSA).

A simulator with discrete events has no gradient, and finite differences would take two estimates for each of d design
variables. SPSA takes two in all. With a random direction :math:`\Delta_k \in \{-1, 1\}^d`,

.. math::
    \hat g_k = \frac{\hat f(x_k + c_k \Delta_k) - \hat f(x_k - c_k \Delta_k)}{2 c_k}\, \Delta_k, \qquad
    x_{k+1} = x_k + a_k\, \hat g_k, \qquad
    a_k = \frac{a}{(A + k)^{\alpha}}, \quad c_k = \frac{c}{k^{\gamma}}, \quad k = 1, 2, \dots

Since the signs of different coordinates are independent, :math:`E[\hat g_k] = \nabla f + O(c_k^2)`: the error along the
other coordinates is noise that later steps average out. The exponents :math:`\alpha = 0.602` and :math:`\gamma = 0.101`
are about the smallest that theory allows, and Spall's advice for finite runs; 1 and 1/6 are asymptotically optimal.

*Coordinates.* x is the place of a design in its interval, from 0 to 1, or the unconstrained coordinate of its
constraint where that is no interval. A step that would leave [0, 1] is reflected at the end. The two evaluations stay
inside too: they are made about the point of :math:`[c_k, 1 - c_k]^d` nearest to :math:`x_k` (Sadegh), whose difference
still shows the slope at a bound; reflecting the two points would make them one.

*Noise.* With *common random numbers* both estimates of a difference are made from the same seed, so that errors they
share cancel: with correlation :math:`\rho` its variance falls by the factor :math:`1 - \rho`. Averaging `num_repeats`
directions in a step divides it further, at their cost; so does, for nothing, the average over the last fifth of the
steps, which is where a start ends up.

*Scale.* Unless given, a is set such that the first step is about `step_size` long in each coordinate, from a few
pilot differences at the start (Spall's semiautomatic gains). No step moves a coordinate by more than twice that, since
one wild difference would otherwise undo many steps.

Bounds on information have local optima: several starts climb side by side. Which of them wins is decided on other draws
than the ones reported, and the draws of the search are used for neither.

References:
    Spall (1992), "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", IEEE
    Transactions on Automatic Control 37; (1998), "Implementation of the simultaneous perturbation algorithm for
    stochastic optimization", IEEE Transactions on Aerospace and Electronic Systems 34. Sadegh (1997), "Constrained
    optimization via stochastic approximation with a simultaneous perturbation gradient approximation", Automatica 33.
    Kleinman, Spall and Naiman (1999), "Simulation-based optimization with stochastic approximation using common random
    numbers", Management Science 45. Huan and Marzouk (2013) and Ao and Li (2020) use SPSA for experimental design.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_voed.checks import check_callable, check_count, check_positive
from pyro_voed.design.evaluator import (
    Estimator,
    Evaluator,
    at_best,
    draw_seed,
    from_coordinates,
    in_interval,
    own_generator,
    scattered,
    store_best,
    to_coordinates,
)
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.sites import DesignSite, given_designs
from pyro_voed.results import DesignResult, FitHistory
from pyro_voed.training.loop import kept_on_error

PILOT_DIRECTIONS = 5
AVERAGED_SHARE = 5
"""One in so many steps, the last ones, is averaged over."""

Evaluate = Callable[[Tensor], Tensor]
"""From points `(2, num_repeats, num_starts, dim)` to values at them, `(2, num_repeats, num_starts)`."""


@dataclass(frozen=True)
class Gains:
    """Gain sequences of SPSA.

    Attributes:
        a: Size of the steps.
        c: Size of the perturbations.
        stability: The constant A, in steps, that keeps early steps small.
        alpha: Rate at which steps shrink.
        gamma: Rate at which perturbations shrink.
    """

    a: float
    c: float
    stability: float
    alpha: float = 0.602
    gamma: float = 0.101

    def step(self, k: int) -> float:
        """Return a_k, for k = 1, 2, ..."""
        return self.a / (self.stability + k) ** self.alpha

    def perturbation(self, k: int) -> float:
        """Return c_k, for k = 1, 2, ..."""
        return self.c / k**self.gamma


def spsa_gradient(
    evaluate: Evaluate,
    x: Float[Tensor, "num_starts dim"],
    perturbation: float,
    bounded: Bool[Tensor, " dim"],
    *,
    num_repeats: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "num_repeats num_starts dim"], Float[Tensor, " num_starts"]]:
    """Estimate gradients from pairs of values at simultaneously perturbed points.

    Args:
        evaluate: From points `(2, num_repeats, num_starts, dim)` to their values.
        x: Where the gradients are wanted.
        perturbation: How far each coordinate is moved to either side.
        bounded: Coordinates that stay in [0, 1].
        num_repeats: Independent directions.
        generator: Source of the directions.

    Returns:
        A gradient for each direction, and the mean of all values.

    References:
        Spall (1992), Eq. 2.2; Sadegh (1997) for the bounds.

    Example:
        >>> slope = torch.tensor([1.0, 2.0], dtype=torch.double)
        >>> x, free = torch.zeros(1, 2, dtype=torch.double), torch.tensor([False, False])
        >>> pairs = {"num_repeats": 2000, "generator": torch.Generator().manual_seed(0)}
        >>> gradients, _ = spsa_gradient(lambda points: points @ slope, x, 0.1, free, **pairs)
        >>> [round(value, 1) for value in gradients.mean((0, 1)).tolist()]
        [1.0, 2.0]
    """
    shape = (num_repeats, *x.shape)
    directions = 2.0 * torch.randint(2, shape, generator=generator).to(x) - 1.0
    centre = torch.where(bounded.to(x.device), x.clamp(perturbation, 1.0 - perturbation), x)
    points = torch.stack([centre + perturbation * directions, centre - perturbation * directions])
    values = evaluate(points)
    slopes = (values[0] - values[1]) / (2.0 * perturbation)  # (num_repeats, num_starts)
    return slopes.unsqueeze(-1) * directions, values.mean((0, 1))


def spsa_ascent(
    evaluate: Evaluate,
    starts: Float[Tensor, "num_starts dim"],
    bounded: Bool[Tensor, " dim"],
    gains: Gains,
    *,
    num_steps: int,
    num_repeats: int,
    largest_step: float,
    generator: torch.Generator,
    path: list[Tensor] | None = None,
) -> tuple[Float[Tensor, "num_records num_starts dim"], Float[Tensor, "num_steps num_starts"]]:
    """Climb from several starts side by side.

    Args:
        evaluate: From points `(2, num_repeats, num_starts, dim)` to their values, which may be noisy.
        starts: Where to start.
        bounded: Coordinates that stay in [0, 1].
        gains: Gain sequences.
        num_steps: Steps.
        num_repeats: Directions averaged in a step.
        largest_step: Most that a step moves a coordinate.
        generator: Source of the directions.
        path: A list to record in, for one who wants the points reached even if an evaluation fails.

    Returns:
        The points on the way, the starts included (`num_records` is one more than `num_steps`), and the mean value of
        each step's evaluations.

    Example:
        >>> top = torch.tensor([0.2, 0.9], dtype=torch.double)
        >>> quadratic = lambda points: -(points - top).square().sum(-1)
        >>> start, bounded = torch.full((1, 2), 0.5, dtype=torch.double), torch.tensor([True, True])
        >>> generator = torch.Generator().manual_seed(0)
        >>> settings = {"num_steps": 200, "num_repeats": 1, "largest_step": 0.2, "generator": generator}
        >>> path, _ = spsa_ascent(quadratic, start, bounded, Gains(1.0, 0.1, 20.0), **settings)
        >>> path[-1]
        tensor([[0.2000, 0.9000]], dtype=torch.float64)
    """
    path = [] if path is None else path
    path.append(starts)
    x, values = starts, []
    for k in range(1, num_steps + 1):
        gradients, value = spsa_gradient(
            evaluate, x, gains.perturbation(k), bounded, num_repeats=num_repeats, generator=generator
        )
        move = (gains.step(k) * gradients.mean(0)).clamp(-largest_step, largest_step)
        x = torch.where(bounded.to(x.device), reflected(x + move), x + move)
        path.append(x)
        values.append(value)
    return torch.stack(path), torch.stack(values)


def reflected(x: Tensor) -> Tensor:
    """Fold the real line onto [0, 1] by reflection at both ends.

    Example:
        >>> reflected(torch.tensor([-0.25, 0.5, 1.25]))
        tensor([0.2500, 0.5000, 0.7500])
    """
    return 1.0 - (x.remainder(2.0) - 1.0).abs()


def search_spsa(
    estimator: Estimator,
    *,
    num_steps: int = 200,
    num_repeats: int = 1,
    num_starts: int = 1,
    starts: Mapping[str, Any] | None = None,
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
    An error in the middle of a search carries the designs as last reached by the starts (`error.designs`).

    Args:
        estimator: From designs to an `EIGResult`, such as
            ``lambda designs: eig_lbkld(model, "y", "theta", designs=designs)``, with `seed` left out; the contract is
            in `evaluator`. For a search it may be cruder than for a report, as long as it errs alike at all designs.
        num_steps: Steps of each start; a step costs ``2 * num_repeats`` estimates.
        num_repeats: Directions averaged in a step.
        num_starts: Number of starts. The first is the stored value, else the model's initial one; further ones are
            uniform in intervals, and add N(0, 1) in unconstrained coordinates elsewhere.
        starts: Further starts of your own instead, `(num_further_starts, *shape)` for each design.
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
        seed: Seed; None draws one from the global generator.

    Returns:
        The best design with a fresh estimate there. `path` has every step of the winning start, though the design is
        the average of the last fifth of them; `history.bound` the mean of each step's estimates, taken beside the
        path; `initial` the estimate at the first start; `density` what the final estimate trained, if anything.

    Raises:
        TypeError: If the estimator returns no `EIGResult`.
        ValueError: If a size is out of range, a start is misshapen or outside its constraint, a design is discrete, or
            the estimator uses other designs than it is given, or the same random numbers in each call.
        ArithmeticError: If an estimate is not finite.

    References:
        Spall (1992, 1998); Kleinman, Spall and Naiman (1999); Ao and Li (2020).

    Example:
        >>> import pyro
        >>> from pyro_voed.estimators import eig_lbkld
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> def estimator(designs):
        ...     return eig_lbkld(implicit_toy(), "y", "theta", designs=designs, num_samples=1000)
        >>> best = search_spsa(estimator, num_steps=15, seed=0)
        >>> bool(best.designs["xi"] > 1.5), bool(pyro.param("xi") > 1.5)  # the best is 2, an end of the interval
        (True, True)
    """
    check_callable(estimator, "estimator")
    for name, count in (("num_steps", num_steps), ("num_repeats", num_repeats), ("num_starts", num_starts)):
        check_count(count, name)
    for name, number in (("step_size", step_size), ("perturbation", perturbation), ("alpha", alpha), ("gamma", gamma)):
        check_positive(number, name)
    if a is not None:
        check_positive(a, "a")
    if stability is not None and not 0.0 <= stability < float("inf"):
        raise ValueError(f"stability: expected a finite number of at least 0, got {stability!r}.")
    if perturbation >= 0.5:
        raise ValueError(f"perturbation: expected less than 0.5, half of an interval, got {perturbation!r}.")
    with isolated(seed) as used:
        started = time.perf_counter()
        generator = own_generator(used)
        evaluator = Evaluator(estimator)
        initial = evaluator.begin(draw_seed(generator))
        experiment = evaluator.experiment
        stored = to_coordinates(experiment, initial.designs)
        bounded = in_interval(experiment)
        from_points = _values_at(evaluator, common_random_numbers, generator)
        points = _starts(experiment, initial.designs, num_starts, starts, generator)
        shrinkage = stability if stability is not None else num_steps / 10
        if a is None:
            pilot, _ = spsa_gradient(
                from_points,
                stored.unsqueeze(0),
                perturbation,
                bounded,
                num_repeats=PILOT_DIRECTIONS,
                generator=generator,
            )
            a = _automatic_gain(pilot, step_size, shrinkage, alpha)
        gains = Gains(a, perturbation, shrinkage, alpha, gamma)
        reached: list[Tensor] = []
        climbing = time.perf_counter()
        with kept_on_error(lambda: {"designs": from_coordinates(experiment, reached[-1])}):
            path, values = spsa_ascent(
                from_points,
                points,
                bounded,
                gains,
                num_steps=num_steps,
                num_repeats=num_repeats,
                largest_step=2.0 * step_size,
                generator=generator,
                path=reached,
            )
        climbing = time.perf_counter() - climbing
        ends = path[-max(1, num_steps // AVERAGED_SHARE) :].mean(0)  # (num_starts, dim)
        best, selection = 0, None
        if len(ends) > 1:
            selection = _separate_values(evaluator, ends, draw_seed(generator))
            best = int(selection.argmax())
        designs = from_coordinates(experiment, ends[best])
        final = at_best(evaluator(designs, draw_seed(generator)), designs)
        rates = torch.tensor([gains.step(k) / gains.step(1) for k in range(1, num_steps + 1)])
        result = DesignResult(
            designs=designs,
            eig=final.eig,
            standard_error=final.standard_error,
            bound=final.bound,
            final=final,
            path=from_coordinates(experiment, path[:, best]),
            path_steps=torch.arange(num_steps + 1),
            history=FitHistory(values[:, best], rates, "budget", climbing),
            start_eigs=final.eig.reshape(1) if selection is None else selection,
            num_simulations=evaluator.num_simulations,
            seconds=time.perf_counter() - started,
            initial=initial,
        )
    store_best(result)
    return result


def _automatic_gain(pilot: Tensor, step_size: float, stability: float, alpha: float) -> float:
    """Return a such that a_1 times the size of a coordinate's slope is `step_size`."""
    # The root of the mean square over directions and coordinates: a direction's slope is along all of them alike.
    slope = float(pilot.square().mean().sqrt())
    # Where nothing changes at all, steps are zero whatever a is.
    return step_size * (stability + 1.0) ** alpha / slope if slope > 0.0 else step_size


def _values_at(evaluator: Evaluator, common_random_numbers: bool, generator: torch.Generator) -> Evaluate:
    def separately(points: Tensor) -> Tensor:
        seeds = [draw_seed(generator) for _ in range(points.shape[1])]
        sides = [
            torch.stack([_separate_values(evaluator, x, seed) for x, seed in zip(side, seeds, strict=True)])
            for side in points
        ]
        return torch.stack(sides)

    def together(points: Tensor) -> Tensor:
        rows = points.flatten(0, -2)
        eig = evaluator(from_coordinates(evaluator.experiment, rows), draw_seed(generator)).eig
        if eig.shape != rows.shape[:1]:
            raise ValueError(
                f"estimator: expected {len(rows)} estimates for {len(rows)} designs, got shape {tuple(eig.shape)}. "
                "Where it takes one design at a time, search with common_random_numbers=True."
            )
        return eig.to(points).reshape(points.shape[:-1])

    return separately if common_random_numbers else together


def _separate_values(evaluator: Evaluator, x: Tensor, seed: int) -> Tensor:
    """Return estimates at points `(num, dim)`, one call each, all from the same seed."""
    return torch.stack([evaluator(from_coordinates(evaluator.experiment, row), seed).eig for row in x]).to(x)


def _starts(
    experiment: tuple[DesignSite, ...],
    stored: Mapping[str, Tensor],
    num_starts: int,
    starts: Mapping[str, Any] | None,
    generator: torch.Generator,
) -> Float[Tensor, "num_starts dim"]:
    first = to_coordinates(experiment, stored)
    if starts is None:
        return torch.cat([first.unsqueeze(0), scattered(experiment, first, num_starts - 1, generator)])
    given = given_designs(experiment, starts)
    counts = {name: value.shape[0] if value.dim() else 0 for name, value in given.items()}
    short = [site.name for site in experiment if site.name in given and given[site.name].dim() != site.value.dim() + 1]
    if not given or short or len(set(counts.values())) != 1:
        raise ValueError(
            f"starts: expected shape (num_starts, *shape of the design) with equally many for each design, got "
            f"{ {name: tuple(value.shape) for name, value in given.items()} }."
        )
    count = next(iter(counts.values()))
    full = {site.name: given.get(site.name, stored[site.name].expand(count, *site.value.shape)) for site in experiment}
    return torch.cat([first.unsqueeze(0), to_coordinates(experiment, full)])

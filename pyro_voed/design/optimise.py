r"""Design search by gradient: climb a bound jointly in the design and in the density that makes it tight.

.. math::
    \xi^*, \phi^* = \arg\max_{\xi, \phi}\;
    \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q_\phi(\theta \mid y) - \log p(\theta)\big],

with one stochastic gradient a step for both: where the outcome is reparametrised the design's gradient flows through
it into the density, elsewhere score-function terms stand in (`gradients`). Designs move in unconstrained coordinates
(`pyro.param` constraints hold by construction, what couples entries by a projection after each step). Standardisation
follows the moving design, without gradient, and is frozen for the cool-down, in which both come to rest. The winning
start is chosen (`screening`, or at the end of all climbs), and the reported number made, on simulations that took no
part in the search. Where the start itself tells more than what was found, as far as prior contrastive estimation can
say (it needs the outcome's density, and neither nuisance nor discrete sites), it is returned.

References:
    Foster, Jankowiak, O'Meara, Teh and Rainforth (2020), "A unified stochastic gradient approach to designing
    Bayesian-optimal experiments"; Dong et al. (2025), section 3.4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_voed.checks import Labels, check_count
from pyro_voed.design.climb import Climb, Climber
from pyro_voed.design.cost import Cost, as_cost
from pyro_voed.design.gradients import score_sites
from pyro_voed.design.projection import Constraints, Projection
from pyro_voed.design.screening import candidates, not_below, screened
from pyro_voed.design.starts import given_starts, perturbed, store_designs
from pyro_voed.estimators.collapse import checked_for_collapse
from pyro_voed.estimators.fit import fit_of
from pyro_voed.estimators.objective import Objective, as_objective
from pyro_voed.estimators.posterior import RATE, barber_agakov
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment import needs
from pyro_voed.experiment.caller_state import common_stream, isolated
from pyro_voed.experiment.experiment import Experiment, as_experiment
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import DesignResult, EIGResult, FitHistory, Learned
from pyro_voed.training.loop import keeping
from pyro_voed.training.settings import Fresh, check_training

NAME = "optimise_design"
DESIGN_RATE = 3e-2
SELECTION_SIZE = 5_000


def optimise_design(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    objective: Any = barber_agakov,
    density: Any = None,
    summary: Summary = None,
    starts: int | Mapping[str, Any] | None = None,
    constraints: Constraints | None = None,
    cost: Any = None,
    initial_eig: bool = False,
    training: Fresh | None = None,
    num_samples: int = 20_000,
    seed: int | None = None,
    progress: bool | None = None,
) -> DesignResult:
    """Find the design with the largest expected information gain by stochastic gradients.

    Afterwards the best design is in the parameter store under its own name (in the module, for a PyroModule), as
    Pyro users expect; nothing else of the caller's has changed. Labels, `density`, `summary`, `num_samples`, `seed` and
    `progress` are those of `eig_flow`.

    Args:
        model: A Pyro program of one experiment with at least one design, or an `Experiment`, which takes what is rarer.
        objective: An `Objective`, or terms of a bound from a joint sample and a density with an attribute `bound`:
            `barber_agakov`, `prior_contrastive`, `adaptive_contrastive`, `critic_objective(info_nce)`. An upper bound
            is no objective to ascend, but `marginal_saddle()` searches its saddle point.
        starts: Number of starts that climb to the end. The first is the stored value, else the model's initial one;
            further ones add N(0, 1) in unconstrained coordinates. Or the further starts themselves,
            `(num_further_starts, *shape)` for each design. Default: one, the best of eight that take their first few
            hundred steps side by side, where model and objective allow that and `training` states no `num_steps`; most
            of these are drawn anywhere in their intervals, and three go through exchanges of entries first.
        constraints: What couples entries, one or several: `increasing`, `min_gap`, `fixed_sum`, `budget` (see
            `design.constraints`), which know the bounds of `pyro.param`; or functions from the designs (a dict, as in
            the model) to the nearest admissible ones, in torch, which must respect these bounds themselves. Designs
            are admissible at every step.
        cost: A cost in nats, from one design (a dict as in the model) to a number, in torch, to be subtracted from the
            information, or `per_cost(...)` to divide it. `worth` of the result is what was maximised, and values in
            `history` and `start_eigs` are of that.
        initial_eig: Also estimate the expected information gain at the stored or initial design by the same objective
            (field `initial`); what it learns is trained there for itself.
        training: `Fresh(...)`. Default: until the bound no longer rises by more than its noise, then cool down, 10,000
            steps at most for a start; 256 experiments a step; peak rates of 2e-3 for the density and 3e-2 for the
            designs, in unconstrained coordinates.

    Returns:
        The best design, its estimate on fresh simulations, the path there and the density trained along with it.

    Raises:
        ValueError: If the model has no design, a design does not reach the outcome by a gradient, labels, sizes or
            starts are wrong, constraints cannot be met or leave a design's bounds, or the objective is an upper bound.
        NotImplementedError: If the model lacks what the objective needs, or a site that depends on a design has neither
            reparametrised draws nor a density.
        TrainingStopped: If an error ends the run, such as a term that is not finite (then it is an `ArithmeticError`
            too). It carries the designs and the density as last trained (`error.designs`, with a row for each start
            that climbed, and `error.density`), with which the search can go on.

    Example:
        >>> import pyro, torch
        >>> from pyro import distributions as dist
        >>> from torch.distributions import constraints
        >>> from pyro_voed.training import Fresh
        >>> def model():
        ...     xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(xi * theta, 1.0), obs=torch.tensor(0.0))
        >>> best = optimise_design(model, training=Fresh(num_steps=300), seed=0)
        >>> bool(best.designs["xi"] > 1.5), bool(pyro.param("xi") == best.designs["xi"])
        (True, True)
    """
    check_training(training, kinds=(Fresh,), searches=True)
    if starts is not None and not isinstance(starts, Mapping):
        check_count(starts, "starts")
    check_count(num_samples, "num_samples", 2)
    objective, cost = as_objective(objective), as_cost(cost)
    with isolated(seed):
        started = time.perf_counter()
        spent = model.num_calls if isinstance(model, Experiment) else 0
        experiment, stored = as_experiment(model, observation_labels, target_labels)
        for need in (needs.designs, *objective.needs):
            need(experiment, NAME)
        projection = Projection.of(constraints, experiment.designs)
        experiment = experiment.surveyed(_wandering(experiment, projection), certain=False)
        needs.smooth_outcomes(experiment, NAME)
        screens = starts is None and (training is None or training.num_steps is None) and experiment.runs_together
        further = candidates(experiment.designs) if screens else _further_starts(experiment, starts)
        started_at = [stored, *further]
        if len(started_at) > 1 and objective.attains:
            experiment = experiment.laid_out({name: torch.stack([s[name] for s in started_at]) for name in stored})
        climber = _climber(experiment, objective, training or Fresh(), density, summary, projection, cost, progress)
        for start in started_at:
            moved = start if projection is None else {**start, **projection(start)}
            if cost is not None:
                cost.at(moved)
        selection: Tensor | None
        if screens and climber.stacks:
            best, selection = screened(climber, started_at)
            climbs = [best]
        else:
            climbs = climber.climb_all(started_at[:1] if screens else started_at)
            best, selection = _best(climber, climbs)
        interrupted = any(climb.history.stop_reason == "interrupted" for climb in climbs)
        best = best if interrupted else not_below(climber, stored, best)
        with keeping(lambda: {"designs": best.designs, "density": best.density}):
            final = _estimate(climber, best.designs, best.density, best.history, num_samples)
            final = _paid(final, experiment, spent, started)
            initial = _initial(climber, stored, num_samples) if initial_eig and not interrupted else None
        result = DesignResult(
            final=final,
            path=best.path,
            path_steps=best.path_steps,
            history=best.history,
            start_eigs=climber.worth(final.designs, final.eig).reshape(1) if selection is None else selection,
            num_simulations=experiment.num_calls - spent,
            seconds=time.perf_counter() - started,
            initial=initial,
            interrupted=interrupted,
            cost=None if cost is None else cost.at(final.designs),
            worth=None if cost is None else climber.worth(final.designs, final.eig),
        )
    store_designs(experiment, result.designs)
    return result


def _wandering(experiment: Experiment, projection: Projection | None) -> dict[str, Tensor]:
    """Draw designs that a climb may come to, the stored one first, `(num_designs, *shape)` each."""
    with common_stream(0):
        drawn = [experiment.design_values, *(one for _ in range(3) for one in candidates(experiment.designs))]
    if projection is not None:
        drawn = [{**one, **projection(one)} for one in drawn]
    return {name: torch.stack([one[name] for one in drawn]) for name in experiment.design_values}


def _further_starts(experiment: Experiment, starts: int | Mapping[str, Any] | None) -> list[dict[str, Tensor]]:
    if not isinstance(starts, Mapping):
        return [perturbed(experiment.designs) for _ in range((starts or 1) - 1)]
    given = given_starts(experiment.designs, starts)
    count = len(next(iter(given.values())))
    return [{name: value[row] for name, value in given.items()} for row in range(count)]


def _climber(
    experiment: Experiment,
    objective: Objective,
    training: Fresh,
    density: Any,
    summary: Summary,
    projection: Projection | None,
    cost: Cost | None,
    progress: bool | None,
) -> Climber:
    fit = fit_of(
        experiment,
        experiment.design_values,
        training,
        name=NAME,
        rate=RATE,
        likelihood=objective.likelihood,
        pairs=objective.pairs,
        progress=progress,
    )
    if len(fit.rates) > 1:
        raise ValueError(f"learning_rate: a search takes one for the density, got {fit.rates}.")
    return Climber(
        fit=fit,
        objective=objective,
        scored=score_sites(experiment),
        density=density,
        summary=summary,
        projection=projection,
        design_rate=training.design_learning_rate or DESIGN_RATE,
        cost=cost,
    )


def _best(climber: Climber, climbs: list[Climb]) -> tuple[Climb, Tensor | None]:
    """Return the climb that ended highest, and the estimates it was chosen by: other draws than the ones reported."""
    if len(climbs) == 1:
        return climbs[0], None
    selection = torch.stack([climber.reached(climb, SELECTION_SIZE) for climb in climbs])
    return climbs[int(selection.argmax())], selection


def _initial(climber: Climber, designs: Mapping[str, Tensor], num_samples: int) -> EIGResult | None:
    """Return the estimate at the start by the search's objective; None where its training was interrupted."""
    started, experiment, spent = time.perf_counter(), climber.fit.experiment, climber.fit.experiment.num_calls
    density, history = climber.stay(designs)
    if history is not None and history.stop_reason == "interrupted":
        return None
    return _paid(_estimate(climber, designs, density, history, num_samples), experiment, spent, started)


def _estimate(
    climber: Climber, designs: Mapping[str, Tensor], density: Any, history: FitHistory | None, num_samples: int
) -> EIGResult:
    """Estimate at a design by what was trained for it, on simulations that took no part in the search."""
    experiment, objective = climber.fit.experiment, climber.objective
    found = climber.evaluate(designs, density, num_samples)
    eig, standard_error = mean_and_standard_error(found.terms)
    learned = None
    if density is not None:
        learned = Learned(
            density,
            of_targets=objective.of_targets,
            attains=objective.attains,
            history=history,
            outcome_range=found.outcome_range,
            collapse=checked_for_collapse(experiment, density, found.sample) if objective.of_targets else None,
        )
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound=objective.bound,
        estimator=NAME,
        num_simulations=0,
        num_samples=found.terms.shape[0] * (objective.evaluation_size or 1),
        seconds=0.0,
        designs=designs,
        target_labels=experiment.target_labels,
        observation_labels=experiment.observation_labels,
        nuisance_labels=tuple(site.name for site in experiment.nuisance),
        experiment=experiment.at_designs(designs),
        learned=learned,
    )


def _paid(result: EIGResult, experiment: Experiment, spent: int, started: float) -> EIGResult:
    return replace(result, num_simulations=experiment.num_calls - spent, seconds=time.perf_counter() - started)

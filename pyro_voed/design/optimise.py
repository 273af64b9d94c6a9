r"""Design search by gradient: climb a bound jointly in the design and in the density that makes it tight.

.. math::
    \xi^*, \phi^* = \arg\max_{\xi, \phi}\;
    \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q_\phi(\theta \mid y) - \log p(\theta)\big],

with one stochastic gradient a step for both: where the outcome is reparametrised the design's gradient flows through
it into the density, elsewhere score-function terms stand in (`gradients`). Designs move in unconstrained coordinates
(`pyro.param` constraints hold by construction; anything else by a projection after each step). Standardisation follows
the moving design, without gradient, and is frozen for the cool-down, in which both come to rest. The winning start is
chosen, and the reported number made, on simulations that took no part in the search.

References:
    Foster, Jankowiak, O'Meara, Teh and Rainforth (2020), "A unified stochastic gradient approach to designing
    Bayesian-optimal experiments"; Dong et al. (2025), section 3.4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.checks import Labels, check_callable, check_count, check_known, check_positive
from pyro_voed.design.climb import Climb, Search, unconstrained
from pyro_voed.design.gradients import score_sites
from pyro_voed.design.together import can_climb_together, climb_together
from pyro_voed.estimators.collapse import checked_for_collapse
from pyro_voed.estimators.learning import Budget, check_sizes
from pyro_voed.estimators.nested import check_densities, check_no_nuisance
from pyro_voed.estimators.objective import Objective, as_objective
from pyro_voed.estimators.posterior_bound import barber_agakov, check_flow_targets, flow_bound
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.resolve import resolve
from pyro_voed.experiment.sites import Experiment
from pyro_voed.results import DesignResult, EIGResult

SELECTION_SIZE = 5_000


def optimise_design(
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    prior_entropy: float | None = None,
    objective: Any = barber_agakov,
    density: Any = None,
    summary: Summary = None,
    num_starts: int = 1,
    starts: Mapping[str, Any] | None = None,
    projection: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    initial_eig: bool = False,
    num_steps: int | None = None,
    max_steps: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    design_learning_rate: float = 3e-2,
    num_samples: int = 20_000,
    vectorize: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
) -> DesignResult:
    """Find the design with the largest expected information gain by stochastic gradients.

    Afterwards the best design is in the parameter store under its own name (in the module, for a PyroModule), as
    Pyro users expect; nothing else of the caller's has changed.

    Args:
        model: A Pyro program of one experiment with at least one design.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about; default: all other latent sites.
        design_labels: Designs to optimise; default: the explicit `pyro.param` / `PyroParam` sites.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        prior_entropy: Differential entropy of the targets in nats, where the model states no density of them.
        objective: An `Objective`, or terms of a bound from a joint sample and a density with an attribute `bound`:
            `barber_agakov`, `prior_contrastive`, `adaptive_contrastive`, `critic_objective(info_nce)`. An upper bound
            is no objective to ascend, but `marginal_saddle()` searches its saddle point.
        density: A factory `(theta_dim, context_dim) -> density`, a density, or that of an earlier result to go on
            from. Default: a spline coupling flow.
        summary: A module from standardised packed outcomes `(num, y_dim)` to learned statistics `(num, summary_dim)`,
            such as those of `pyro_voed.summaries`, or a mapping from outcome sites to such modules. Default: picked
            from the outcome's plates and shape, a set network for exchangeable rows; `torch.nn.Identity()` for none.
        num_starts: Number of starts. The first is the stored value, else the model's initial one; further ones add
            N(0, 1) in unconstrained coordinates.
        starts: Further starts of your own, `(num_further_starts, *shape)` for each design.
        projection: Maps the designs (a dict, as in the model) to the nearest admissible ones, in torch; designs stay
            admissible at every step, and where it is differentiable the gradient is taken through it.
        initial_eig: Also estimate the expected information gain at the start (field `initial`).
        num_steps: Take exactly this many steps. Default: until the bound no longer rises by more than its noise,
            then cool down.
        max_steps: Most steps for a start.
        batch_size: Experiments a step.
        learning_rate: Peak learning rate of the density.
        design_learning_rate: Peak learning rate of the designs, in unconstrained coordinates.
        num_samples: Fresh experiments behind the reported number.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The best design, its estimate on fresh simulations, the path there and the density trained along with it.

    Raises:
        ValueError: If the model has no design, a design does not reach the outcome by a gradient, labels or sizes are
            wrong, or the objective is an upper bound.
        NotImplementedError: If a site that depends on a design has neither reparametrised draws nor a density.
        ArithmeticError: If a term is not finite. This error, like any that ends a run, carries the designs and the
            density as last trained (`error.designs`, `error.density`), with which the search can go on.

    References:
        Foster et al. (2020); Dong et al. (2025), section 3.4.

    Example:
        >>> import pyro, torch
        >>> from pyro import distributions as dist
        >>> from torch.distributions import constraints
        >>> def model():
        ...     xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(xi * theta, 1.0), obs=torch.tensor(0.0))
        >>> best = optimise_design(model, num_steps=300, seed=0)
        >>> bool(best.designs["xi"] > 1.5), bool(pyro.param("xi") == best.designs["xi"])
        (True, True)
    """
    check_sizes(None, num_steps, max_steps, batch_size, learning_rate, num_samples)
    check_positive(design_learning_rate, "design_learning_rate")
    check_count(num_starts, "num_starts")
    objective = as_objective(objective)
    if projection is not None:
        check_callable(projection, "projection")
    with isolated(seed):
        started = time.perf_counter()
        resolved = partial(
            resolve,
            model,
            observation_labels,
            target_labels,
            design_labels=design_labels,
            model_args=model_args,
            model_kwargs=model_kwargs,
            prior=prior,
            vectorize=vectorize,
        )
        experiment = resolved()
        if not experiment.designs:
            raise ValueError("the model has no design: mark what the experimenter sets with pyro.param.")
        _check_needs(experiment, objective, prior_entropy)
        started_at = _starts(experiment, num_starts, starts)
        if len(started_at) > 1 and objective.stackable:
            # Again with several designs, so that their layout is probed.
            experiment = resolved(
                designs={name: torch.stack([s[name] for s in started_at]) for name in experiment.design_labels}
            )
        search = Search(
            experiment=experiment,
            objective=objective,
            scored=score_sites(experiment),
            prior_entropy=prior_entropy,
            density=density,
            summary=summary,
            projection=projection,
            num_steps=num_steps,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            design_learning_rate=design_learning_rate,
            progress=progress,
        )
        initial = None
        budget = Budget(None, num_steps, max_steps, batch_size, learning_rate, num_samples)
        if initial_eig:
            initial = flow_bound(
                experiment,
                experiment.design_values,
                budget,
                density,
                summary,
                prior_entropy,
                progress,
                time.perf_counter(),
            )
        if len(started_at) > 1 and can_climb_together(search):
            climbs = climb_together(search, started_at)
        else:
            climbs = [search.climb(start) for start in started_at]
        # Which start wins is decided on other draws than the ones reported.
        selection = None
        best = climbs[0]
        if len(climbs) > 1:
            selection = torch.stack([search.score(climb, SELECTION_SIZE)[0] for climb in climbs])
            best = climbs[int(selection.argmax())]
        result = _report(search, best, selection, num_samples, initial, started)
    store_designs(experiment, result.designs)
    return result


def _report(
    search: Search, best: Climb, selection: Tensor | None, num_samples: int, initial: EIGResult | None, started: float
) -> DesignResult:
    eig, standard_error, outcome_range = search.score(best, num_samples)
    experiment, seconds = search.experiment, time.perf_counter() - started
    final = EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound=search.objective.bound,
        estimator="optimise_design",
        num_simulations=experiment.program.num_calls,
        num_samples=num_samples,
        seconds=seconds,
        designs=best.designs,
        target_labels=experiment.target_labels,
        observation_labels=experiment.observation_labels,
        nuisance_labels=tuple(site.name for site in experiment.nuisance),
        history=best.history,
        density=best.density,
        experiment=replace(
            experiment, designs=tuple(replace(site, value=best.designs[site.name]) for site in experiment.designs)
        ),
        observation_range=outcome_range,
        collapse=checked_for_collapse(experiment, best.designs, best.density),
    )
    return DesignResult(
        designs=best.designs,
        eig=eig,
        standard_error=standard_error,
        bound=search.objective.bound,
        final=final,
        path=best.path,
        path_steps=best.path_steps,
        history=best.history,
        start_eigs=eig.reshape(1) if selection is None else selection,
        num_simulations=experiment.program.num_calls,
        seconds=seconds,
        initial=initial,
    )


def _starts(experiment: Experiment, num_starts: int, starts: Mapping[str, Any] | None) -> list[dict[str, Tensor]]:
    stored = experiment.design_values
    if starts is None:
        return [stored, *(_perturbed(experiment) for _ in range(num_starts - 1))]
    check_known(starts, stored, "starts", "design")
    given = {name: torch.as_tensor(value).to(stored[name]) for name, value in starts.items()}
    counts = {name: value.shape[0] if value.dim() else 0 for name, value in given.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"starts: expected equally many for each design, got {counts}.")
    for site in experiment.designs:
        value = given.get(site.name)
        if value is not None and (value.shape[1:] != site.value.shape or not site.constraint.check(value).all()):
            raise ValueError(
                f"starts['{site.name}']: expected shape (num_starts, {', '.join(map(str, site.value.shape))}) inside "
                f"{site.constraint}, got {tuple(value.shape)}."
            )
    count = next(iter(counts.values()))
    return [stored, *({**stored, **{name: value[row] for name, value in given.items()}} for row in range(count))]


def _perturbed(experiment: Experiment) -> dict[str, Tensor]:
    moved = {}
    for site in experiment.designs:
        coordinates = unconstrained(site, site.value)
        moved[site.name] = site.transform(coordinates + torch.randn_like(coordinates))
    return moved


def _check_needs(experiment: Experiment, objective: Objective, prior_entropy: float | None) -> None:
    if objective.needs_log_prior:
        check_flow_targets(experiment, prior_entropy)
    if objective.needs_likelihood or objective.needs_log_joint:
        check_densities(experiment, "this objective")
        check_no_nuisance(experiment, "this objective")


def store_designs(experiment: Experiment, designs: Mapping[str, Tensor]) -> None:
    """Leave the best design where Pyro users look for it: in the parameter store, or in the module that owns it."""
    store = pyro.get_param_store()
    with torch.no_grad():
        for site in experiment.designs:
            if site.leaf is not None:
                # In place, so that a module or an optimiser that holds the leaf sees the new value.
                site.leaf.copy_(site.transform.inv(designs[site.name]))
            if site.in_store and site.name not in store:
                store.setdefault(site.name, designs[site.name].clone(), site.constraint)

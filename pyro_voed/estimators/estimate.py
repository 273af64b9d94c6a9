"""The driver: from a model and terms to a result.

Every estimator hands its terms to `estimate`, which does what all of them share: an isolated random stream, the
experiment and its designs, needs checked before anything is paid for, a check that terms are finite, mean and standard
error, cost over the whole call, and the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import Labels, warn
from pyro_voed.doubts import above_entropy, heavy_tailed, indistinguishable
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.designs import at_each_design, design_batch_shape
from pyro_voed.experiment.entropies import target_entropies
from pyro_voed.experiment.experiment import Experiment, as_experiment
from pyro_voed.experiment.needs import Need
from pyro_voed.monte_carlo import difference_errors, mean_and_standard_error
from pyro_voed.results import Bound, EIGResult, Learned, WeightCheck


@dataclass(frozen=True)
class Terms:
    """What an estimator found at the designs of one call.

    Attributes:
        values: Independent terms whose mean is the estimate, nats.
        learned: What was learned on the way.
        weights: Whether exponential averages can be trusted.
        standard_error: Where it is not that of a mean of the terms, `(*design_batch)`.
        num_samples: Where more experiments than terms stand behind the estimate: their number at each design.
        bound: Where it is not the one that the estimator states.
        failed: Share of runs that failed, `(*design_batch)`, where they may. Where they are left out, the values are
            those of the others.
        doubts: What speaks against the estimate, each in one line with the remedy; empty ones are left out.
    """

    values: Float[Tensor, "num_samples *design_batch"]
    learned: Learned | None = None
    weights: WeightCheck | None = None
    standard_error: Float[Tensor, "*design_batch"] | None = None
    num_samples: int | None = None
    bound: Bound | None = None
    failed: Float[Tensor, "*design_batch"] | None = None
    doubts: tuple[str, ...] = ()


Question = tuple[Callable[..., object] | Experiment, Labels, Labels, Mapping[str, object] | None, int | None]
"""What every estimator is asked: model, outcome sites, targets, candidate designs, seed."""


def estimate(
    question: Question,
    terms: Callable[[Experiment, dict[str, Tensor]], Terms],
    *,
    name: str,
    bound: Bound,
    needs: Sequence[Need] = (),
    then: Callable[[EIGResult], EIGResult] = lambda result: result,
) -> EIGResult:
    """Estimate the expected information gain by the mean of an estimator's terms.

    Args:
        question: Model, observation labels, target labels, designs and seed, as the user gave them.
        terms: Gives the terms from the experiment and its designs, all of them.
        name: Name of the estimator.
        bound: Which way the mean of the terms errs.
        needs: What the call needs of the experiment, all its parts together.
        then: What is added to the result within the same call, and paid by it.

    Raises:
        ArithmeticError: If a term is not finite.
    """
    model, observation_labels, target_labels, designs, seed = question
    with isolated(seed):
        started = time.perf_counter()
        spent = model.num_calls if isinstance(model, Experiment) else 0
        experiment, candidates = as_experiment(model, observation_labels, target_labels, designs)
        for need in needs:
            need(experiment, name)
        found = terms(experiment, candidates)
        bad = int((~torch.isfinite(found.values)).sum())
        if bad:
            raise ArithmeticError(f"{name}: {bad} of {found.values.numel()} terms are not finite.")
        eig, standard_error = (
            mean_and_standard_error(found.values)
            if found.standard_error is None
            else (found.values.mean(0), found.standard_error)
        )
        own_error = found.standard_error is not None or experiment.failures == "ignore"
        if experiment.failures == "ignore":
            eig, standard_error = _of_all_runs(eig, standard_error, found)
        result = EIGResult(
            eig=eig,
            standard_error=standard_error,
            difference_error=None if own_error else difference_errors(found.values),
            bound=found.bound or bound,
            estimator=name,
            num_simulations=0,
            num_samples=found.num_samples or found.values.shape[0],
            seconds=0.0,
            designs=candidates,
            target_labels=experiment.target_labels,
            observation_labels=experiment.observation_labels,
            nuisance_labels=tuple(site.name for site in experiment.nuisance),
            experiment=experiment,
            learned=found.learned,
            weights=found.weights,
            failed_share=found.failed,
        )
        result = then(doubted(result, found))
        return replace(result, num_simulations=experiment.num_calls - spent, seconds=time.perf_counter() - started)


def _of_all_runs(eig: Tensor, standard_error: Tensor, found: Terms) -> tuple[Tensor, Tensor]:
    """Return information and error for all runs from those of the runs that did not fail: nothing comes of the rest."""
    assert found.failed is not None  # the needs let through only what counts failures
    valid = 1.0 - found.failed
    # Counted until there were enough valid runs, so the share has a relative error of its own.
    count = found.num_samples or found.values.shape[0]
    return eig * valid, valid * (standard_error**2 + eig**2 * found.failed / count).sqrt()


def doubted(result: EIGResult, found: Terms) -> EIGResult:
    """Return the result with what speaks against it, and warn of that."""
    lines = [*found.doubts, heavy_tailed(result.weights, len(found.values)), indistinguishable(result)]
    entropies = target_entropies(result.experiment, result.designs)
    if entropies is not None:
        lines.append(above_entropy(result.eig, result.standard_error, entropies))
    doubts = tuple(line for line in lines if line)
    for line in doubts:
        warn(f"{result.estimator}: {line}.")
    return replace(result, doubts=doubts)


def terms_at_each_design(
    experiment: Experiment, designs: Mapping[str, Tensor], terms: Callable[[dict[str, Tensor]], Tensor]
) -> Float[Tensor, "num_samples *design_batch"]:
    """Return the terms of every design, estimated one after the other on common random numbers."""
    batch = design_batch_shape(experiment, designs)
    return torch.stack(at_each_design(experiment, designs, terms), -1).unflatten(-1, batch or (1,)).reshape(-1, *batch)

"""An objective: the terms of a bound, and what a search over designs must know to ascend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_voed.densities import StandardisedDensity
from pyro_voed.estimators.building import build_density, discrete_values
from pyro_voed.estimators.summarising import Summary, outcome_summary
from pyro_voed.experiment.simulate import JointSample
from pyro_voed.experiment.sites import Experiment
from pyro_voed.results import Bound

Terms = Callable[[JointSample, Any], Tensor]


def build_posterior(
    given: Any, pilot: JointSample, experiment: Experiment, summary: Summary, *, started: bool = True
) -> StandardisedDensity:
    """Return a conditional density of the targets given outcomes (and, over several designs, the design).

    Args:
        given: None for the default, a factory, a density, or that of an earlier result.
        pilot: Simulations that scales are taken from.
        experiment: The experiment.
        summary: As the user gave it.
        started: Also start a flow at the pilot's linear-Gaussian posterior. Not for pools, whose density starts once
            the part that decides when training stops has been set aside (`start_posterior`).
    """
    # A density of an earlier result has its own.
    module = None if isinstance(given, StandardisedDensity) else outcome_summary(experiment, summary)
    theta, context = _rows(pilot)
    density = build_density(
        given,
        theta,
        context,
        num_designs=0 if pilot.designs is None else pilot.designs.shape[-1],
        summary=module,
        discrete=discrete_values(experiment),
    )
    if started and not isinstance(given, StandardisedDensity):
        density.start_(theta, context)
    return density


def start_posterior(density: StandardisedDensity, sample: JointSample) -> None:
    """Let a flow that has learnt nothing start at the linear-Gaussian posterior of a pool.

    Not behind a summary that has yet to learn: what its random features predict on a pool is in part that pool's
    chance, and training, which changes the features, does not get rid of it.
    """
    if not learns(density.summary):
        density.start_(*_rows(sample))


def learns(summary: nn.Module | None) -> bool:
    """Return whether a summary has weights to be trained."""
    return summary is not None and any(weight.requires_grad for weight in summary.parameters())


def _rows(sample: JointSample) -> tuple[Tensor, Tensor]:
    """Return targets and contexts of all designs as rows."""
    theta, context = (values.reshape(-1, values.shape[-1]) for values in (sample.theta, sample.context()))
    return theta, context


def build_nothing(given: Any, pilot: JointSample, experiment: Experiment, summary: Summary) -> None:
    """Return None, for objectives that learn nothing."""


def rescale_context(density: Any, sample: JointSample) -> None:
    """Standardise outcomes as they are at the present design."""
    density.rescale_context_(sample.y)


def rescale_nothing(density: Any, sample: JointSample) -> None:
    """Leave the density as it is."""


@dataclass(frozen=True)
class Objective:
    """Terms whose mean is a bound, with its side and its needs.

    Attributes:
        terms: Gives terms `(num_samples, *design_batch)` from a sample and a density.
        bound: Which way their mean errs.
        needs_likelihood: The sample must hold the outcomes' log likelihood.
        needs_log_joint: The sample must score other targets at its outcomes (`JointSample.log_joint`), so the outcome
            needs a density.
        needs_log_prior: The sample must hold the log prior of its targets.
        build: Makes what is learnt from what the user gave and a pilot.
        rescale: Refreshes its standardisation while designs move.
        evaluation_size: Where terms of one batch depend on each other: size of the independent batches whose means
            are averaged in the end.
        inner_steps: Steps that the density alone takes between two steps of the design (a saddle point), 0 where both
            climb together.
        stackable: Terms of one experiment depend on that experiment and a density of its targets alone, so that several
            starts can climb with stacked densities.

    Example:
        >>> import torch
        >>> objective = Objective(lambda sample, density: torch.zeros(3), bound="lower")
        >>> objective(None, None)
        tensor([0., 0., 0.])
    """

    terms: Terms
    bound: Bound
    needs_likelihood: bool = False
    needs_log_joint: bool = False
    needs_log_prior: bool = True
    build: Callable[[Any, JointSample, Experiment, Summary], Any] = build_posterior
    rescale: Callable[[Any, JointSample], None] = rescale_context
    evaluation_size: int | None = None
    inner_steps: int = 0
    stackable: bool = False

    def __call__(self, sample: Any, density: Any) -> Tensor:
        """Return the terms."""
        return self.terms(sample, density)


def as_objective(given: Any) -> Objective:
    """Return an objective; a plain function with an attribute `bound` is taken as terms of a learned posterior.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is an upper bound without inner steps, which is no objective to ascend.
    """
    bound = getattr(given, "bound", None)
    if not callable(given) or bound is None:
        raise TypeError(
            "objective: expected an Objective, or a callable (sample, density) -> terms with an attribute `bound`, "
            f"such as barber_agakov, got {given!r}."
        )
    objective = given if isinstance(given, Objective) else Objective(given, bound)
    if bound == "upper" and objective.inner_steps == 0:
        raise ValueError(
            "objective: an upper bound is no objective to ascend, since the density would be driven to loosen it. "
            "Ascend a lower bound such as barber_agakov, or search the saddle point with marginal_saddle."
        )
    return objective


def batched_means(values: Tensor, size: int) -> Tensor:
    """Return means of independent batches of `size` rows, leaving out the rest."""
    whole = values.shape[0] // size * size
    return values[:whole].reshape(-1, size, *values.shape[1:]).mean(1)


def detached_module(density: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the density's log_prob with its weights held fixed, gradients flowing to its arguments alone."""
    weights = {name: value.detach() for name, value in density.named_parameters()}

    def log_prob(theta: Tensor, context: Tensor) -> Tensor:
        return torch.func.functional_call(density, weights, (theta, context))

    return log_prob

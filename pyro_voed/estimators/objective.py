"""An objective: the terms of a bound, and what a search over designs must know to ascend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from pyro_voed.estimators.building import build_posterior
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.needs import Need
from pyro_voed.experiment.packing import JointSample
from pyro_voed.results import Bound

Terms = Callable[[JointSample, Any], Tensor]


def build_nothing(given: Any, pilot: JointSample, experiment: Experiment, summary: Summary) -> None:
    """Return None, for objectives that learn nothing."""


def refit_scales(density: Any, sample: JointSample) -> None:
    """Take scales from simulations at the present design; nothing to do where nothing is learned."""
    if density is not None:
        density.fit_scales_(sample.theta, sample.y)


@dataclass(frozen=True)
class Objective:
    """Terms whose mean is a bound, with its side and its needs.

    Attributes:
        terms: Gives terms `(num_samples, *design_batch)` from a sample and a density.
        bound: Which way their mean errs.
        needs: What the search needs of the experiment (`experiment.needs`).
        of_targets: What is learned is a density of the targets given the outcome.
        attains: The terms are those of that density's own Barber-Agakov bound, each of one experiment alone, so that
            several starts can climb with stacked densities.
        likelihood, log_joint, pairs: What the sample must offer beyond draws: the outcomes' log likelihood,
            `JointSample.log_joint` of other targets, `JointSample.pairs` of its outcomes and draws.
        build: Makes what is learned from what the user gave and a pilot.
        rescale: Refreshes its standardisation while designs move.
        evaluation_size: Where terms of one batch depend on each other: size of the independent batches whose means are
            averaged in the end.
        inner_steps: Steps that the density alone takes between two steps of the design (a saddle point), 0 where both
            climb together.

    Example:
        >>> import torch
        >>> objective = Objective(lambda sample, density: torch.zeros(3), bound="lower")
        >>> objective(None, None)
        tensor([0., 0., 0.])
    """

    terms: Terms
    bound: Bound
    needs: tuple[Need, ...] = ()
    of_targets: bool = False
    attains: bool = False
    likelihood: bool = False
    log_joint: bool = False
    pairs: bool = False
    build: Callable[[Any, JointSample, Experiment, Summary], Any] = build_posterior
    rescale: Callable[[Any, JointSample], None] = refit_scales
    evaluation_size: int | None = None
    inner_steps: int = 0

    def __call__(self, sample: Any, density: Any) -> Tensor:
        """Return the terms."""
        return self.terms(sample, density)


def as_objective(given: Any) -> Objective:
    """Return an objective; a plain function with an attribute `bound` is taken as terms of a learned posterior."""
    bound = getattr(given, "bound", None)
    if not callable(given) or bound is None:
        raise TypeError(
            "objective: expected an Objective, or a callable (sample, density) -> terms with an attribute `bound`, "
            f"such as barber_agakov, got {given!r}."
        )
    objective = given if isinstance(given, Objective) else Objective(given, bound, of_targets=True)
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
        return functional_call(density, weights, (theta, context))

    return log_prob

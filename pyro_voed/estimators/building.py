"""The density to train: the default for a model's dimensions and supports, or the caller's; scales from a pilot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_voed.densities import (
    Classifier,
    MixedDensity,
    SplineCouplingFlow,
    Standardise,
    StandardisedDensity,
    Whitening,
    as_density,
)
from pyro_voed.densities.whitening import context_layout
from pyro_voed.estimators.summarising import Summary, outcome_summary
from pyro_voed.experiment.atoms import check_targets
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample


def discrete_values(experiment: Experiment) -> list[Tensor | None]:
    """Return, for each packed target entry, the values it can take, None for continuous ones."""
    entries: list[Tensor | None] = []
    for site in experiment.targets:
        values = None if site.support_values is None else site.support_values.to(experiment.dtype)
        entries += [values] * site.packed_dim
    return entries


def make_mixed(discrete: list[Tensor | None], values: Tensor) -> Callable[[int, int], nn.Module]:
    """Return a factory of densities with discrete entries, whose classifiers start at the pilot's frequencies."""
    is_discrete = torch.tensor([entry is not None for entry in discrete], device=values.device)
    supports = [entry.to(values) for entry in discrete if entry is not None]
    columns = values[:, is_discrete].unbind(-1)
    # One more draw for each value keeps a frequency off zero where the pilot missed it.
    counts = [(column[:, None] == own).sum(0) + 1.0 for column, own in zip(columns, supports, strict=True)]
    frequencies = [count / count.sum() for count in counts]

    def make(dim: int, context_dim: int) -> nn.Module:
        classifier = Classifier(supports, context_dim, frequencies=frequencies)
        if is_discrete.all():
            return classifier
        given = context_dim + sum(classifier.sizes)
        return MixedDensity(classifier, make_flow(dim - len(supports), given), is_discrete)

    return make


def make_flow(dim: int, context_dim: int) -> nn.Module:
    """Return the default density: a spline coupling flow whose width follows the dimensions."""
    size = dim + context_dim
    hidden_dim = 64 if size <= 16 else 128
    return SplineCouplingFlow(dim, context_dim, num_transforms=3 if dim > 1 else 2, hidden_dim=hidden_dim)


def build_density(
    given: Any,
    values: Tensor,
    context: Tensor,
    *,
    num_designs: int,
    summary: nn.Module | None,
    discrete: list[Tensor | None] | None = None,
) -> StandardisedDensity:
    """Return the density to train of `values` given `context`, pilot draws that its scales are taken from.

    A `given` one from an earlier result goes on from where it was, as a copy. The last `num_designs` columns of the
    context bypass the summary. `discrete` lists, for each entry, the values it can take, None for continuous ones.
    """
    dim, context_dim = values.shape[-1], context.shape[-1]
    if isinstance(given, StandardisedDensity):
        if (given.theta_dim, given.context_dim) != (dim, context_dim):
            raise ValueError(
                f"density: expected one of {dim} dimensions given {context_dim}, got one of {given.theta_dim} given "
                f"{given.context_dim}. It was trained for another model or design batch."
            )
        return copy.deepcopy(given)
    labels = [entry is not None for entry in discrete or [None] * dim]
    # Discrete entries are labels, compared and not measured.
    groups = [-1 if label else entry for entry, label in enumerate(labels)]
    default = make_mixed(discrete, values) if discrete is not None and any(labels) else make_flow
    scaling = Whitening(context_dim, *context_layout(summary, context_dim, num_designs=num_designs)).to(values)
    summary = copy.deepcopy(summary)
    inner_dim = context_dim
    if summary is not None:
        inner_dim = _summary_dim(summary, context[:2, : context_dim - num_designs]) + num_designs
    is_density = not isinstance(given, type) and (hasattr(given, "condition") or isinstance(given, nn.Module))
    # What has its dimensions already cannot take the prediction in.
    sees_prediction = summary is not None and not is_density
    inner_dim += dim * sees_prediction
    made = copy.deepcopy(given) if is_density else (given or default)(dim, inner_dim)
    density = as_density(made, dim, inner_dim)
    if default is not make_flow and not isinstance(density, Classifier | MixedDensity):
        # A density on the real line could rise without limit at the atoms, and its "bound" with it.
        raise NotImplementedError(
            f"density: some targets are discrete, and {type(made).__name__} is a density of continuous ones. Leave it "
            "out, or give a Classifier or MixedDensity of pyro_voed.densities."
        )
    made = StandardisedDensity(
        density,
        Standardise(dim, groups).to(values),
        scaling,
        summary,
        num_bypass=num_designs,
        sees_prediction=sees_prediction,
    ).to(values)
    made.fit_scales_(values, context)
    return made


def _summary_dim(summary: nn.Module, context: Tensor) -> int:
    summary.to(context)
    with torch.no_grad():
        shape = summary(context).shape
    if len(shape) != 2 or shape[0] != context.shape[0]:
        raise ValueError(
            f"summary: expected a module from ({context.shape[0]}, {context.shape[1]}) to ({context.shape[0]}, "
            f"summary_dim), got {tuple(shape)}."
        )
    return shape[1]


def build_posterior(given: Any, pilot: JointSample, experiment: Experiment, summary: Summary) -> StandardisedDensity:
    """Return a conditional density of the targets given outcomes (and, over several designs, the design)."""
    check_targets(experiment, pilot)
    # A density of an earlier result has its own.
    module = None if isinstance(given, StandardisedDensity) else outcome_summary(experiment, summary)
    return build_density(
        given,
        *target_rows(pilot),
        num_designs=0 if pilot.designs is None else pilot.designs.shape[-1],
        summary=module,
        discrete=discrete_values(experiment),
    )


def target_rows(sample: JointSample) -> tuple[Tensor, Tensor]:
    """Return targets and contexts of all designs as rows."""
    theta, context = (values.reshape(-1, values.shape[-1]) for values in (sample.theta, sample.context()))
    return theta, context

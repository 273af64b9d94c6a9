"""Densities of the outcome: built, dequantised, and searched over designs as a saddle point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_voed.bounds.outcome_density import marginal_terms
from pyro_voed.checks import check_count
from pyro_voed.estimators.building import build_density
from pyro_voed.estimators.objective import Objective, detached_module
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment import needs
from pyro_voed.experiment.atoms import check_outcomes
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample


def build_outcome_density(given: Any, pilot: JointSample, experiment: Experiment, summary: Summary) -> Any:
    """Return a density of the packed outcome (given the design, over several)."""
    check_outcomes(experiment, pilot)
    y = pilot.y.reshape(-1, pilot.y.shape[-1])
    context = pilot.design_context().reshape(len(y), -1)
    return build_density(given, y, context, num_designs=context.shape[-1], summary=None)


def _saddle_terms(sample: JointSample, density: Any) -> Tensor:
    """Marginal terms, whose gradient raises them in the design and, its sign turned, lowers them in the density."""
    assert sample.log_likelihood is not None  # asked for by the objective
    context = sample.design_context()
    held = marginal_terms(sample.log_likelihood, detached_module(density)(sample.y, context))
    learnt = density.log_prob(sample.y.detach(), context)
    return held + (learnt - learnt.detach())


def _rescale_outcome(density: Any, sample: JointSample) -> None:
    density.fit_scales_(sample.y, sample.y[..., :0])


def marginal_saddle(inner_steps: int = 4) -> Objective:
    r"""Return the saddle-point objective of the marginal upper bound.

    .. math::  \max_\xi \min_\phi \mathbb{E}\big[\log p(y \mid \theta, \xi) - \log q_\phi(y)\big]

    An upper bound cannot be ascended in design and density together, since the density would be driven to loosen it. So
    the density descends for `inner_steps` steps between two steps of the design, whose gradient is that of the bound at
    the density as it stands.

    References:
        Dong et al. (2025), Eqs. 16, 17 and 31.

    Example:
        >>> marginal_saddle().bound
        'upper'
    """
    return Objective(
        _saddle_terms,
        bound="upper",
        needs=(needs.likelihood, needs.whole_outcomes),
        likelihood=True,
        build=build_outcome_density,
        rescale=_rescale_outcome,
        inner_steps=check_count(inner_steps, "inner_steps"),
    )


def dequantiser(experiment: Experiment) -> Callable[[JointSample], JointSample]:
    """Return a function that adds uniform noise on [0, 1) to the discrete outcomes of a sample."""
    discrete = torch.cat(
        [torch.full((site.packed_dim,), site.is_discrete, device=experiment.device) for site in experiment.observations]
    )

    def spread(sample: JointSample) -> JointSample:
        return replace(
            sample, y=sample.y + torch.where(discrete, torch.rand_like(sample.y), torch.zeros_like(sample.y))
        )

    return spread

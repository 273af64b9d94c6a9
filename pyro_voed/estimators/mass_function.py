"""The marginal bound of discrete outcomes, whose mass function is averaged over prior draws rather than learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.bounds.nested import log_average
from pyro_voed.bounds.outcome_density import marginal_terms
from pyro_voed.experiment.designs import at_each_design, design_batch_shape
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.failures import non_finite_sites
from pyro_voed.experiment.pairs import log_sums, pairwise_log_density
from pyro_voed.experiment.programs import run_rows
from pyro_voed.experiment.sampling import sample_joint

MASS_FUNCTION_DRAWS = 10_000
MASS_FUNCTION_OUTCOMES = 1_024


def mass_function_terms(
    experiment: Experiment, designs: Mapping[str, Tensor], num_samples: int
) -> Float[Tensor, "num_samples *design_batch"] | None:
    """Return terms with the averaged mass function, or None where there are too many distinct outcomes."""
    possible = None if experiment.linked_outcomes else enumerated_outcomes(experiment)

    def one(own: dict[str, Tensor]) -> Tensor | None:
        if possible is not None:
            return _enumerated_terms(experiment, own, possible, num_samples)
        return _seen_terms(experiment, own, num_samples)

    found = at_each_design(experiment, designs, one)
    if any(terms is None for terms in found):
        return None
    batch = design_batch_shape(experiment, designs)
    return torch.stack([terms for terms in found if terms is not None], -1).reshape(-1, *batch)


def enumerated_outcomes(experiment: Experiment) -> dict[str, Tensor] | None:
    """Return all outcomes, `(num_outcomes, *shape)` for each site, or None where they are not few and finitely many."""
    supports = []
    for site in experiment.observations:
        if site.support_values is None or site.measured is not None:
            return None
        supports += [site.support_values] * site.shape.numel()
    if math.prod(len(support) for support in supports) > MASS_FUNCTION_OUTCOMES:
        return None
    table = torch.cartesian_prod(*supports).reshape(-1, len(supports))
    pieces = table.split([site.shape.numel() for site in experiment.observations], -1)
    return {
        site.name: piece.reshape(-1, *site.shape).to(site.dtype)
        for site, piece in zip(experiment.observations, pieces, strict=True)
    }


def _enumerated_terms(
    experiment: Experiment, designs: Mapping[str, Tensor], outcomes: Mapping[str, Tensor], num_samples: int
) -> Tensor:
    """Terms with the outcome summed over (Rao-Blackwell), so that only the targets are drawn."""
    log_q = _log_mass(experiment, designs, outcomes, num_samples)
    outer = run_rows(experiment.program, num_samples, experiment.shapes, designs=designs)
    log_p = pairwise_log_density(experiment.observations, outcomes, outer)  # (num_outcomes, num_samples)
    # Outcomes that a draw makes impossible contribute nothing: p log p -> 0.
    weighted = log_p.exp() * marginal_terms(log_p, log_q.unsqueeze(-1).expand_as(log_p))
    return torch.where(log_p == -torch.inf, torch.zeros_like(weighted), weighted).sum(0)


def _seen_terms(experiment: Experiment, designs: Mapping[str, Tensor], num_samples: int) -> Tensor | None:
    """Terms with the mass function at the outcomes seen; None where they are many."""
    sample = sample_joint(experiment, num_samples, designs, likelihood=True)
    why = non_finite_sites(experiment, sample)
    if why:
        raise ArithmeticError(f"eig_marginal: {why}")
    distinct, index = torch.unique(sample.y, dim=0, return_inverse=True)
    if distinct.shape[0] > MASS_FUNCTION_OUTCOMES:
        return None
    first = torch.full((distinct.shape[0],), num_samples, device=index.device).scatter_reduce(
        0, index, torch.arange(num_samples, device=index.device), reduce="amin"
    )
    outcomes = {site.name: sample.values[site.name][first] for site in experiment.observations}
    log_q = _log_mass(experiment, designs, outcomes, num_samples)
    assert sample.log_likelihood is not None  # asked for above
    return marginal_terms(sample.log_likelihood, log_q[index])


def _log_mass(
    experiment: Experiment, designs: Mapping[str, Tensor], outcomes: Mapping[str, Tensor], num_samples: int
) -> Tensor:
    """Return the log of the mass function at outcomes, nats, averaged over prior draws."""
    draws = MASS_FUNCTION_DRAWS if experiment.runs_together else num_samples
    inner = run_rows(experiment.program, draws, experiment.shapes, designs=designs)
    return log_average(log_sums(experiment, designs, outcomes, inner), draws)

"""ACE and VNMC terms with a proposal as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_voed.bounds.importance import ace_terms, vnmc_terms
from pyro_voed.estimators.estimate import Terms, terms_at_each_design
from pyro_voed.estimators.proposals import as_proposal
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.weighting import Weights, weighted_terms
from pyro_voed.monte_carlo import HEAVY_TAIL, pareto_k
from pyro_voed.results import Learned, WeightCheck


def proposal_terms(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    proposal: Any,
    num_samples: int,
    num_inner: int,
    *,
    upper: bool,
) -> Terms:
    """Return VNMC terms (the upper side) or ACE terms at each design, and the tail index of each design's terms."""
    own = as_proposal(proposal, experiment, designs)

    def side(weights: Weights) -> tuple[Tensor]:
        if upper:
            return (vnmc_terms(weights.log_likelihood, weights.inner),)
        return (ace_terms(weights.log_likelihood, weights.own, weights.inner),)

    values = terms_at_each_design(
        experiment,
        designs,
        lambda design: weighted_terms(experiment, design, own, num_samples, num_inner, side)[0],
    )
    tail = pareto_k(values)
    check = WeightCheck(passed=bool((tail <= HEAVY_TAIL).all()), pareto_k=tail)
    return Terms(values, learned=Learned(density=own), weights=check)

"""Score given values: log densities of targets and outcomes that were put in rather than drawn.

Nested estimators need p(y | theta) where theta and y come from different draws. Two ways: all pairs of outcomes and
inner draws, without running the model again (`pairwise_log_likelihood`); or row by row at packed targets from anywhere,
such as a learned posterior (`log_joint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.programs import ProgramRun, log_prob_on_support
from pyro_voed.simulate import pack_outcomes, put_targets
from pyro_voed.sites import Site, Sites


def log_joint(
    sites: Sites,
    theta: Float[Tensor, "num_rows theta_dim"],
    outcomes: Mapping[str, Tensor],
    designs: Mapping[str, Tensor],
) -> tuple[Float[Tensor, " num_rows"], Float[Tensor, " num_rows"]]:
    """Return the log prior of packed targets and the log likelihood of outcomes, nats, in packed coordinates.

    The model is run once a row, with the targets put in; sites that are neither target nor outcome are drawn.

    Args:
        sites: A resolved explicit model.
        theta: Packed targets, one row each.
        outcomes: Outcome values, `(num_rows, *shape)` each.
        designs: The one design.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.resolve import resolve
        >>> from pyro_voed.simulate import sample_joint
        >>> sites = resolve(linear_gaussian(), "y")
        >>> sample = sample_joint(sites, 5, likelihood=True)
        >>> log_prior, log_likelihood = log_joint(sites, sample.theta, sample.values, sites.design_values)
        >>> bool(torch.allclose(log_likelihood, sample.log_likelihood))
        True
    """
    if sites.has_auxiliary_density:
        raise NotImplementedError(
            "the replaced prior states its density by auxiliary sites, so it cannot score targets that it did not "
            "draw. Use a prior guide that samples the model's sites from their own distributions."
        )
    own = {site.name: outcomes[site.name] for site in sites.observations}
    run = put_targets(sites, theta, designs, own)
    log_prior = torch.zeros((), dtype=theta.dtype, device=theta.device)
    for site in sites.targets:
        log_prior = log_prior + run.log_prob(site.name)
        if site.transform is not None:
            log_prior = log_prior + run.unconstrained(site.name)[1]
    return log_prior, outcome_log_likelihood(run, sites) + pack_outcomes(sites, run)[1]


def outcome_log_likelihood(run: ProgramRun, sites: Sites) -> Tensor:
    """Return the log density of the run's outcomes, nats, `(num_rows,)`, -inf where one lies outside its support."""
    return torch.stack([run.log_prob(site.name, on_support=True) for site in sites.observations]).sum(0)


def pairwise_log_likelihood(
    sites: Sites, outcomes: Mapping[str, Tensor], inner: ProgramRun
) -> Float[Tensor, "num_outer num_inner"]:
    """Return log p(outcome i given the latents of run j), nats, for all pairs.

    The distributions that the inner run stands at are scored at every outcome, so the model is not run again. Only
    for models whose outcome sites do not depend on each other's values (`Sites.linked_outcomes` is False).

    Args:
        sites: A resolved explicit model.
        outcomes: Outcome values, `(num_outer, *shape)` each.
        inner: The run whose latents are the inner draws.
    """
    scores = [
        torch.cat([_score_outcomes(trace, site, outcomes[site.name]) for trace in inner.traces], 1)
        for site in sites.observations
    ]
    return scores[0] if len(scores) == 1 else torch.stack(scores).sum(0)


def _score_outcomes(trace: Any, site: Site, outcomes: Tensor) -> Tensor:
    node = trace.nodes[site.name]
    # One run alone has no row dimension; the dimension put in front of its layout stands for it.
    own = node["value"].shape
    rows, layout = (1, own) if own == site.shape else (own[0], own[1:])
    log_prob = log_prob_on_support(node["fn"], outcomes.reshape(outcomes.shape[0], 1, *layout))
    if node["mask"] is not None:
        log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, torch.zeros_like(log_prob))
    return log_prob.reshape(outcomes.shape[0], rows, -1).sum(-1)

r"""Weights of a proposal's draws, and the terms of ACE and VNMC that are made of them.

With q the proposal, :math:`\alpha` the prior's share in it and :math:`q_\alpha = (1 - \alpha) q + \alpha p`, a draw has
the weight :math:`w = p(\theta)\, p(y \mid \theta) / q_\alpha(\theta \mid y)`; `importance` derives the terms and names
their sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.estimators.nested import PAIR_MEMORY
from pyro_voed.estimators.proposals import proposal_at
from pyro_voed.experiment.scoring import log_joint
from pyro_voed.experiment.simulate import JointSample, sample_joint
from pyro_voed.experiment.sites import Experiment

DEFENSIVE_SHARE = 0.1
"""Share of the prior in the proposal."""

HEAVY_TAIL = 0.7
"""Pareto k above which a mean of terms is not to be trusted."""


def ace_terms(
    log_likelihood: Float[Tensor, " num_outer"],
    own_weights: Float[Tensor, " num_outer"],
    inner_weights: Float[Tensor, "num_outer num_inner"],
) -> Float[Tensor, " num_outer"]:
    """Return adaptive contrastive estimation terms, nats, whose mean is a lower bound.

    Args:
        log_likelihood: log p(y given theta_0).
        own_weights: Log weight of theta_0, the draw that made y.
        inner_weights: Log weights of the proposal's draws.

    Example:
        >>> ace_terms(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([[-torch.inf]]))
        tensor([0.6931])
    """
    total = torch.cat([own_weights.unsqueeze(-1), inner_weights], -1).logsumexp(-1)
    return log_likelihood - total + math.log(inner_weights.shape[-1] + 1)


def vnmc_terms(
    log_likelihood: Float[Tensor, " num_outer"], inner_weights: Float[Tensor, "num_outer num_inner"]
) -> Float[Tensor, " num_outer"]:
    """Return variational nested Monte Carlo terms, nats, whose mean is an upper bound.

    Args:
        log_likelihood: log p(y given theta_0).
        inner_weights: Log weights of the proposal's draws.

    Example:
        >>> vnmc_terms(torch.tensor([0.0]), torch.tensor([[0.0, -torch.inf]]))
        tensor([0.6931])
    """
    return log_likelihood - inner_weights.logsumexp(-1) + math.log(inner_weights.shape[-1])


def importance_terms(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    density: Any,
    num_samples: int,
    num_inner: int,
    *,
    defensive: float = DEFENSIVE_SHARE,
    max_bytes: int = PAIR_MEMORY,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ACE, VNMC and Barber-Agakov terms at the same fresh outer draws, nats, `(num_samples,)` each.

    Args:
        experiment: The explicit experiment without nuisance sites.
        designs: The one design.
        density: The proposal: a conditional density of packed targets, or a `Proposal`.
        num_samples: Outer draws.
        num_inner: Proposal draws for each.
        defensive: Share of the prior in the proposal.
        max_bytes: Memory for one chunk of inner draws.

    Raises:
        ArithmeticError: If a term is not finite.
    """
    rows = max(1, max_bytes // (8 * max(1, experiment.bytes_per_row) * num_inner))
    lower, upper, flow = [], [], []
    with torch.no_grad(), pyro.validation_enabled(False):
        for start in range(0, num_samples, rows):
            sample = sample_joint(experiment, min(rows, num_samples - start), designs, likelihood=True)
            own, inner, log_q = _log_weights(experiment, designs, density, sample, num_inner, defensive)
            assert sample.log_likelihood is not None  # the model is explicit
            assert sample.log_prior is not None  # and has no nuisance
            lower.append(ace_terms(sample.log_likelihood, own, inner))
            upper.append(vnmc_terms(sample.log_likelihood, inner))
            flow.append(log_q - sample.log_prior)
    found = torch.cat(lower), torch.cat(upper), torch.cat(flow)
    bad = sum(int((~torch.isfinite(terms)).sum()) for terms in found)
    if bad:
        raise ArithmeticError(
            f"importance sampling: {bad} of {3 * num_samples} terms are not finite. Train the proposal longer, or "
            "raise num_inner_samples."
        )
    return found


def _log_weights(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    density: Any,
    sample: JointSample,
    num_inner: int,
    defensive: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights of the own draws `(n,)`, of the inner draws `(n, num_inner)`, and log q of the own draws."""
    posterior, num = proposal_at(density, experiment, designs, sample), sample.num_samples
    theta = posterior.sample((num_inner,)).transpose(0, 1)  # (num, num_inner, theta_dim)
    from_prior = torch.rand(num, num_inner, device=theta.device) < defensive
    count = int(from_prior.sum())
    if count:
        # Drawn one by one into random places, so that all inner draws are identically distributed.
        theta = theta.masked_scatter(from_prior.unsqueeze(-1), sample_joint(experiment, count, designs).theta)
    log_q = posterior.log_prob(theta.transpose(0, 1)).T
    own_log_q = posterior.log_prob(sample.theta)
    repeated = {name: value.repeat_interleave(num_inner, 0) for name, value in sample.values.items()}
    log_prior, log_likelihood = log_joint(experiment, theta.flatten(0, 1), repeated, designs)
    log_prior, log_likelihood = log_prior.reshape(num, num_inner), log_likelihood.reshape(num, num_inner)
    inner = log_prior + log_likelihood - _mixed(log_q, log_prior, defensive)
    assert sample.log_likelihood is not None  # the model is explicit
    assert sample.log_prior is not None  # and has no nuisance
    own = sample.log_prior + sample.log_likelihood - _mixed(own_log_q, sample.log_prior, defensive)
    return own, inner, own_log_q


def _mixed(log_q: Tensor, log_prior: Tensor, defensive: float) -> Tensor:
    if defensive == 0.0:
        return log_q
    return torch.logaddexp(log_q + math.log1p(-defensive), log_prior + math.log(defensive))

r"""Targets from a proposal, and their importance weights.

With q the proposal, :math:`\alpha` the prior's share in it and :math:`q_\alpha = (1 - \alpha) q + \alpha p`, a draw has
the weight :math:`w = p(\theta)\, p(y \mid \theta) / q_\alpha(\theta \mid y)`, which the mixture bounds by
:math:`p(y \mid \theta) / \alpha`.

References:
    Hesterberg (1995), "Weighted average importance sampling and defensive mixture distributions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.designs import pack_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.pairs import PAIR_MEMORY
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.experiment.scoring import log_joint

DEFENSIVE_SHARE = 0.1
"""Share of the prior in the proposal."""


class Weights(NamedTuple):
    """Outer draws and the weights of proposal draws at their outcomes, nats; `log_q` is under the proposal alone."""

    log_likelihood: Float[Tensor, " num_outer"]
    log_prior: Float[Tensor, " num_outer"]
    log_q: Float[Tensor, " num_outer"]
    own: Float[Tensor, " num_outer"]
    inner: Float[Tensor, "num_outer num_inner"]


@runtime_checkable
class AtOutcomes(Protocol):
    """A proposal at the outcomes of a sample."""

    def sample(self, sample_shape: Any) -> Tensor:
        """Return packed targets, `(*sample_shape, num_samples, theta_dim)`."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log densities, nats, of packed targets `(*batch, num_samples, theta_dim)`."""


@runtime_checkable
class Proposal(Protocol):
    """Something that proposes targets without being trained."""

    def at_outcomes(self, experiment: Experiment, designs: Mapping[str, Tensor], sample: JointSample) -> AtOutcomes:
        """Return the proposal at one design and the outcomes of a sample made there."""


@dataclass(frozen=True)
class DensityAtOutcomes:
    """A conditional density at given contexts, one for each outcome."""

    density: Any
    context: Float[Tensor, "num_samples context_dim"]

    def sample(self, sample_shape: Any) -> Tensor:
        """Return packed targets, `(*sample_shape, num_samples, theta_dim)`."""
        return self.density.condition(self.context).sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log densities, nats, of packed targets `(*batch, num_samples, theta_dim)`."""
        return self.density.log_prob(value, self.context)


def design_context(experiment: Experiment, designs: Mapping[str, Tensor], density: Any, y: Tensor) -> Tensor:
    """Return the context of outcomes at one design; a density trained over several takes the packed design too."""
    if density.context_dim == y.shape[-1]:
        return y
    return torch.cat([y, pack_designs(experiment, designs).expand(*y.shape[:-1], -1)], -1)


def weighted_terms(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    proposal: Any,
    num_samples: int,
    num_inner: int,
    terms: Callable[[Weights], tuple[Tensor, ...]],
    *,
    defensive: float = DEFENSIVE_SHARE,
    max_bytes: int = PAIR_MEMORY,
) -> tuple[Tensor, ...]:
    """Return terms of the weights at fresh outer draws of one design, nats, `(num_samples,)` each.

    `terms` are made of the weights of one chunk of outer draws; `defensive` is the prior's share in the proposal.
    """
    rows = max(1, max_bytes // (8 * max(1, experiment.bytes_per_row) * num_inner))
    parts = []
    for start in range(0, num_samples, rows):
        sample = sample_joint(experiment, min(rows, num_samples - start), designs, likelihood=True)
        parts.append(terms(_weigh(experiment, designs, proposal, sample, num_inner, defensive)))
    found = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    bad = sum(int((~torch.isfinite(column)).sum()) for column in found)
    if bad:
        raise ArithmeticError(
            f"importance sampling: {bad} of {len(found) * num_samples} terms are not finite. Train the proposal "
            "longer, or raise num_inner_samples."
        )
    return found


def _weigh(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    proposal: Any,
    sample: JointSample,
    num_inner: int,
    defensive: float,
) -> Weights:
    num = sample.num_samples
    posterior: AtOutcomes
    if isinstance(proposal, Proposal):
        posterior = proposal.at_outcomes(experiment, designs, sample)
    else:
        posterior = DensityAtOutcomes(proposal, design_context(experiment, designs, proposal, sample.y))
    theta = posterior.sample((num_inner,)).transpose(0, 1)  # (num, num_inner, theta_dim)
    from_prior = torch.rand(num, num_inner, device=theta.device) < defensive
    count = int(from_prior.sum())
    if count:
        # Drawn one by one into random places, so that all inner draws are identically distributed.
        theta = theta.masked_scatter(from_prior.unsqueeze(-1), sample_joint(experiment, count, designs).theta)
    log_q, own_log_q = posterior.log_prob(theta.transpose(0, 1)).T, posterior.log_prob(sample.theta)
    repeated = {name: value.repeat_interleave(num_inner, 0) for name, value in sample.values.items()}
    scores = log_joint(experiment, theta.flatten(0, 1), repeated, designs)
    log_prior, log_likelihood = (score.reshape(num, num_inner) for score in scores)
    assert sample.log_likelihood is not None  # the model is explicit
    assert sample.log_prior is not None  # and has no nuisance
    return Weights(
        log_likelihood=sample.log_likelihood,
        log_prior=sample.log_prior,
        log_q=own_log_q,
        own=sample.log_prior + sample.log_likelihood - _mixed(own_log_q, sample.log_prior, defensive),
        inner=log_prior + log_likelihood - _mixed(log_q, log_prior, defensive),
    )


def _mixed(log_q: Tensor, log_prior: Tensor, defensive: float) -> Tensor:
    if defensive == 0.0:
        return log_q
    return torch.logaddexp(log_q + math.log1p(-defensive), log_prior + math.log(defensive))

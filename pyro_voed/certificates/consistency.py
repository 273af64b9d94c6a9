r"""Whether the densities that a model states are those of its draws, without which no interval holds.

A distribution whose density is wrongly normalised, has another support than its draws, or mixes atoms with a density
gives weights that look well behaved and bounds that are off. Three identities, each of bounded terms, show it:

* with r any density, here the Gaussian that fits prior draws in packed coordinates,
  :math:`\mathbb{E}_{p}[r / (r + p)] = \mathbb{E}_{r}[p / (r + p)]` where draws of the prior follow the density p;
* with :math:`\theta_0` the targets that made y, :math:`\theta_1, ..., \theta_L` proposed for it and
  :math:`s_l = w_l / \sum_k w_k` the shares of their weights,
  :math:`\mathbb{E}[h_0] = \mathbb{E}[\sum_l s_l h_l]` for any function h, here the log weight, because :math:`s_l` is
  the probability that :math:`\theta_l` is the one that made y;
* the same with the likelihood for a weight, where all targets come from the prior.

The power is limited: what shifts a bound by a few hundredths of a nat may pass.

References:
    Meng and Wong (1996), "Simulating ratios of normalizing constants via a simple identity"; Bennett (1976).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import put_targets
from pyro_voed.experiment.pairs import log_likelihood_of_pairs
from pyro_voed.experiment.programs import ProgramRun, run_rows
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.monte_carlo import mean_and_standard_error

STANDARD_ERRORS = 5.0
UNSEEN = 15.0
"""Events of a chance up to this over the number of draws may all be missed, with probability 3e-7."""

MOST_PRIOR_DRAWS, FEWEST_PRIOR_DRAWS = 4_000, 100
NUM_GROUPS, GROUP_SIZE = 128, 32
SMALLEST_LOG_WEIGHT = -10.0
"""Log weights below the largest by more count as this, so that the terms are bounded."""


def share_terms(
    own: Float[Tensor, " num_outer"], inner: Float[Tensor, "num_outer num_inner"]
) -> Float[Tensor, " num_outer"]:
    """Return the own log weight less the mean one by shares, nats, of expectation zero.

    Example:
        >>> share_terms(torch.zeros(1), torch.zeros(1, 3))
        tensor([0.])
    """
    weights = torch.cat([own.unsqueeze(-1), inner], -1)
    log_weights = (weights - weights.amax(-1, keepdim=True)).clamp_min(SMALLEST_LOG_WEIGHT)
    return log_weights[:, 0] - (weights.softmax(-1) * log_weights).sum(-1)


def shares_disagree(terms: Float[Tensor, " num"]) -> str:
    """Say so where the mean of independent `share_terms`, or of means of them, is clearly not zero."""
    mean, error = (float(part) for part in mean_and_standard_error(terms))
    if abs(mean) <= STANDARD_ERRORS * error + UNSEEN / len(terms) * float(terms.abs().max()):
        return ""
    return (
        "draws do not follow the densities that the model states: the log weight of the targets that made an outcome "
        f"is {mean:+.3f} +- {error:.3f} nats off what the weights say"
    )


def prior_draws(max_simulations: int) -> int:
    """Return how many draws from the prior, and as many from a reference, a budget of simulations has room for."""
    return max(FEWEST_PRIOR_DRAWS, min(MOST_PRIOR_DRAWS, max_simulations // 100))


def prior_disagrees(experiment: Experiment, designs: Mapping[str, Tensor], num: int) -> str:
    """Say so where draws of continuous targets clearly do not follow the prior density that the model states."""
    if any(site.transform is None for site in experiment.targets):
        return ""
    sample = sample_joint(experiment, num, designs)
    theta, log_prior = sample.theta.double(), sample.log_prior
    assert log_prior is not None  # checked at the door
    # Fitted by medians: prior draws may have no variance. Any reference is right, one like the prior tells most.
    centre = theta.median(0).values
    scale = ((theta - centre).abs().median(0).values * 1.4826).clamp_min(torch.finfo(theta.dtype).tiny)
    reference = torch.distributions.Normal(centre, scale)
    drawn = reference.sample((num,)).to(sample.theta)
    at_drawn = _log_prior(experiment, put_targets(experiment, drawn, designs))
    log_reference = lambda at: reference.log_prob(at.double()).sum(-1)  # noqa: E731
    from_prior = torch.sigmoid(log_reference(theta) - log_prior)
    from_reference = torch.sigmoid(at_drawn - log_reference(drawn))
    (left, left_error), (right, right_error) = map(mean_and_standard_error, (from_prior, from_reference))
    difference, error = float(right - left), math.hypot(float(left_error), float(right_error))
    if abs(difference) <= STANDARD_ERRORS * error + UNSEEN / num:
        return ""
    return (
        "prior draws do not follow the density that the model states, which is "
        f"{'larger' if difference > 0 else 'smaller'} than theirs (two means that should agree are "
        f"{float(left):.3f} +- {float(left_error):.3f} and {float(right):.3f} +- {float(right_error):.3f})"
    )


def outcomes_disagree(experiment: Experiment, designs: Mapping[str, Tensor]) -> str:
    """Say so where outcomes of prior draws clearly do not follow the density that the model states."""
    groups = []
    for _ in range(NUM_GROUPS):
        run = run_rows(experiment.program, GROUP_SIZE, experiment.shapes, designs=designs)
        outcomes = {site.name: run.value(site.name) for site in experiment.observations}
        pairs = log_likelihood_of_pairs(experiment, designs, outcomes, run, GROUP_SIZE)
        own = torch.eye(GROUP_SIZE, dtype=torch.bool, device=pairs.device)
        groups.append(share_terms(pairs[own], pairs[~own].reshape(GROUP_SIZE, -1)).mean())
    return shares_disagree(torch.stack(groups))


def _log_prior(experiment: Experiment, run: ProgramRun) -> Tensor:
    parts = [run.log_prob(site.name) + run.unconstrained(site.name)[1] for site in experiment.targets]
    return torch.stack(parts).sum(0)

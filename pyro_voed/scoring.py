"""Score given values: log densities of targets and outcomes that were put in rather than drawn.

Nested estimators need p(y | theta) where theta and y come from different draws. Two ways: all pairs of outcomes and
inner draws, without running the model again (`pairwise_log_likelihood`); or row by row at packed targets from anywhere,
such as a learned posterior (`log_joint`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.programs import ProgramRun
from pyro_voed.simulate import pack_outcomes, put_targets
from pyro_voed.sites import Sites


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
        >>> sites = resolve(linear_gaussian())
        >>> sample = sample_joint(sites, 5, likelihood=True)
        >>> log_prior, log_likelihood = log_joint(sites, sample.theta, sample.values, sites.design_values)
        >>> bool(torch.allclose(log_likelihood, sample.log_likelihood))
        True
    """
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

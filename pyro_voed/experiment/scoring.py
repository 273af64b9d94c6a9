"""Score given values: log densities of targets and outcomes that were put in rather than drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import check_measured, pack_outcomes, put_targets
from pyro_voed.experiment.programs import ProgramRun


def log_joint(
    experiment: Experiment,
    theta: Float[Tensor, "num_rows theta_dim"],
    outcomes: Mapping[str, Tensor],
    designs: Mapping[str, Tensor],
) -> tuple[Float[Tensor, " num_rows"], Float[Tensor, " num_rows"]]:
    """Return the log prior of packed targets and the log likelihood of outcomes, nats, in packed coordinates.

    The model is run once a row, with the targets put in; sites that are neither target nor outcome are drawn.
    """
    if experiment.has_auxiliary_density:
        raise NotImplementedError(
            "the replaced prior states its density by auxiliary sites, so it cannot score targets that it did not "
            "draw. Use a prior guide that samples the model's sites from their own distributions."
        )
    own = {site.name: outcomes[site.name] for site in experiment.observations}
    run = put_targets(experiment, theta, designs, own)
    log_prior = torch.zeros((), dtype=theta.dtype, device=theta.device)
    for site in experiment.targets:
        log_prior = log_prior + run.log_prob(site.name)
        if site.transform is not None:
            log_prior = log_prior + run.unconstrained(site.name)[1]
    return log_prior, outcome_log_likelihood(run, experiment) + pack_outcomes(experiment, run)[1]


def outcome_log_likelihood(run: ProgramRun, experiment: Experiment) -> Tensor:
    """Return the log density of the run's outcomes, nats, `(num_rows,)`, -inf where one lies outside its support."""
    check_measured(experiment, run)
    return torch.stack([run.log_prob(site.name, on_support=True) for site in experiment.observations]).sum(0)

"""An experiment whose nuisance sites are targets too, for densities of all latents together."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment


class Whole(NamedTuple):
    """The experiment with all latents as targets, and where own targets and nuisance stand in its packed ones."""

    experiment: Experiment
    targets: Int[Tensor, " theta_dim"]
    nuisance: Int[Tensor, " nuisance_dim"]


def with_nuisance(experiment: Experiment) -> Whole:
    """Return the experiment with its nuisance sites among the targets; it is run by the same program."""
    labels = (*experiment.target_labels, *(site.name for site in experiment.nuisance))
    with warnings.catch_warnings():
        # They have been given for the experiment itself.
        warnings.simplefilter("ignore")
        read = Experiment(
            experiment.model,
            experiment.observation_labels,
            labels,
            design_labels=experiment.design_labels or None,
            model_args=experiment.model_args,
            model_kwargs=experiment.model_kwargs,
            prior=experiment.prior,
            vectorize=experiment.runs_together,
            seed=int(torch.randint(2**31 - 1, ()).item()),
        )
    whole = read.run_by(experiment)
    own = [torch.full((site.packed_dim,), site.name in experiment.target_labels) for site in whole.targets]
    is_target = torch.cat(own).to(experiment.device)
    return Whole(whole, is_target.nonzero().flatten(), (~is_target).nonzero().flatten())

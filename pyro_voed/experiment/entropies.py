"""The entropy of discrete targets, the most that can be learned about them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.designs import flat_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import run_rows

NUM_DRAWS = 64


def target_entropies(experiment: Experiment, designs: Mapping[str, Tensor]) -> Float[Tensor, " num_draws"] | None:
    """Return draws, nats, whose mean is the entropy of the targets; None unless all have finitely many values.

    By the chain rule it is the sum of the entropies of the sites, each given its parents, on average over these. The
    draws are all equal where no target is drawn given another.
    """
    if not experiment.has_log_prior or any(site.support_values is None for site in experiment.targets):
        return None
    own = {name: value[0] for name, value in flat_designs(experiment, designs).items()}
    with torch.no_grad():
        run = run_rows(experiment.program, NUM_DRAWS, experiment.shapes, designs=own)
        total = torch.zeros(NUM_DRAWS, dtype=experiment.dtype, device=experiment.device)
        for site in experiment.targets:
            control = run.control(site.name)
            if control is None:
                return None
            total = total + control - run.log_prob(site.name)
    return total

r"""A density of the nuisance sites given outcome and targets, :math:`r(\eta \mid \theta, y)`.

It proposes for :math:`p(y \mid \theta)`, an average over :math:`\eta` (`certificates.nuisance_levels`), and is learned
from the same kind of simulations as the posterior of the targets, which it makes one of all latents together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_voed.estimators.building import build_density, discrete_values
from pyro_voed.estimators.fit import Fit
from pyro_voed.estimators.summarising import Summary, outcome_summary
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.whole import with_nuisance


def fit_nuisance(fit: Fit, summary: Summary) -> Any:
    """Fit a density of the packed nuisance sites given outcome, designs where there are several, and targets."""
    whole, targets, nuisance = with_nuisance(fit.experiment)
    fit = replace(fit, experiment=whole, name="nuisance density", rates=fit.rates[:1], draw=None)
    pool = fit.pool()
    pilot = fit.pilot(pool)

    def rows(sample: JointSample) -> tuple[Tensor, Tensor]:
        context = torch.cat([sample.context(), sample.theta[..., targets]], -1)
        return sample.theta[..., nuisance].flatten(0, -2), context.flatten(0, -2)

    entries = discrete_values(whole)
    density = build_density(
        None,
        *rows(pilot),
        num_designs=len(targets) + (0 if pilot.designs is None else pilot.designs.shape[-1]),
        summary=outcome_summary(fit.experiment, summary),
        discrete=[entries[index] for index in nuisance.tolist()],
    )
    fit.train(
        density,
        lambda sample, learned: learned.log_prob(*rows(sample)),
        pool,
        begin=lambda part: density.fit_scales_(*rows(part)),
    )
    return density

r"""A learned prior density: what stands for p(theta) where the model does not state it.

Targets that are computed, or drawn given nuisance sites, have a density that no site states. With a density r of the
targets learned from their draws,

.. math::
    \mathbb{E}\big[\log q(\theta \mid y, \xi) - \log r(\theta)\big]
    = \mathrm{EIG}(\xi) - \mathbb{E}_y\, \mathrm{KL}\big(p(\theta \mid y) \,\|\, q(\theta \mid y)\big)
    + \mathrm{KL}\big(p(\theta) \,\|\, r(\theta)\big) .

One divergence pulls down, the other up, so no side is guaranteed: the result is `bound="neither"`, and its error at
most the larger of the two. A prior is as a rule the easier to learn, having no context, but in a trial it was learned
so badly that 0.82 nats came out for an information of 0. A known entropy, `prior_entropy=`, keeps the lower bound.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.estimators.building import build_density, discrete_values
from pyro_voed.estimators.fit import Fit
from pyro_voed.experiment.packing import JointSample


def with_learned_prior(fit: Fit, pool: JointSample | None = None) -> Fit:
    """Return a fit whose simulations hold a learned density of the targets (given the design) as their prior's."""
    density = learn_prior_density(fit, pool)

    def prepare(sample: JointSample) -> JointSample:
        with torch.no_grad():
            return replace(sample, log_prior=prior_terms(sample, density))

    return replace(fit, prepare=prepare)


def learn_prior_density(fit: Fit, pool: JointSample | None = None) -> Any:
    """Fit a density of the packed targets to their draws by maximum likelihood."""
    fit = replace(fit, name="prior density", rates=fit.rates[:1])
    # Kept to the one set of draws: new outcomes of a pool say nothing about the targets.
    pool = None if pool is None else replace(pool, redraw=None)
    pilot = fit.pilot(pool)
    theta, context = pilot.theta.flatten(0, -2), pilot.design_context()
    density = build_density(
        None,
        theta,
        context.reshape(len(theta), -1),
        num_designs=context.shape[-1],
        summary=None,
        discrete=discrete_values(fit.experiment),
    )
    fit.train(density, prior_terms, pool)
    return density


def prior_terms(sample: JointSample, density: Any) -> Float[Tensor, "num_samples *design_batch"]:
    """Return log densities, nats, of the packed targets, whose mean is to be ascended."""
    return density.log_prob(sample.theta, sample.design_context())

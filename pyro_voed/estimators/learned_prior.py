r"""A learned prior density: what stands for p(theta) where the model does not state it.

Targets that are computed, or drawn given nuisance sites, have a density that no site states. With a density r of the
targets learned from their draws,

.. math::
    \mathbb{E}\big[\log q(\theta \mid y, \xi) - \log r(\theta)\big]
    = \mathrm{EIG}(\xi) - \mathbb{E}_y\, \mathrm{KL}\big(p(\theta \mid y) \,\|\, q(\theta \mid y)\big)
    + \mathrm{KL}\big(p(\theta) \,\|\, r(\theta)\big) .

The first divergence pulls down and the second up, so no side is guaranteed: the result is `bound="neither"`, and its
error at most the larger of the two. A prior is as a rule the easier to learn, having no context, but in a trial it was
learned so badly that 0.82 nats came out for an information of 0. Where the entropy of the targets is known,
`prior_entropy=` keeps the lower bound.

References:
    Foster, Jankowiak, Bingham, Horsfall, Teh, Rainforth and Goodman (2019), "Variational Bayesian optimal experimental
    design", section 3, whose "marginal + likelihood" errs in both directions alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.estimators.building import build_density, discrete_values
from pyro_voed.estimators.learning import Budget, draw_training, train_density
from pyro_voed.experiment.simulate import JointSample
from pyro_voed.experiment.sites import Experiment

PILOT_SIZE = 1_000


def learn_prior_density(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    budget: Budget,
    *,
    pool: JointSample | None = None,
    progress: bool | None = False,
) -> Any:
    """Fit a density of the packed targets to their draws by maximum likelihood.

    Over a batch of designs it is conditional on the design, on which a prior may depend.

    Args:
        experiment: The experiment.
        designs: The designs to be estimated.
        budget: Sizes of the training.
        pool: Simulations to train on; None for fresh ones every step.
        progress: Show a progress bar.
    """
    with torch.no_grad():
        size = PILOT_SIZE if experiment.program.vectorised else 200
        pilot = draw_training(experiment, size, designs, likelihood=False) if pool is None else pool
    theta, context = pilot.theta.flatten(0, -2), _context(pilot)
    density = build_density(
        None,
        theta,
        context.reshape(len(theta), -1),
        num_designs=context.shape[-1],
        summary=None,
        discrete=discrete_values(experiment),
    )
    train_density(
        experiment,
        density,
        prior_terms,
        budget,
        designs,
        likelihood=False,
        # Kept to the one set of draws: new outcomes of a pool say nothing about the targets.
        pool=None if pool is None else replace(pool, redraw=None),
        progress=progress,
        description="prior density",
    )
    return density


def prior_terms(sample: JointSample, density: Any) -> Float[Tensor, "num_samples *design_batch"]:
    """Return log densities, nats, of the packed targets, whose mean is to be ascended."""
    return density.log_prob(sample.theta, _context(sample))


def with_prior_density(density: Any) -> Callable[[JointSample], JointSample]:
    """Return a function that puts a learned density where the model states none."""

    def prepare(sample: JointSample) -> JointSample:
        with torch.no_grad():
            return replace(sample, log_prior=prior_terms(sample, density))

    return prepare


def _context(sample: JointSample) -> Tensor:
    return sample.y[..., :0] if sample.designs is None else sample.designs.expand(*sample.y.shape[:-1], -1)

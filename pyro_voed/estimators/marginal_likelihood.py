r"""Two learned outcome densities: expected information gain from simulations, on no particular side.

With q(y given theta) and q(y) both learned,

.. math::
    \mathrm{EIG}(\xi) \approx \mathbb{E}_{p(\theta, y \mid \xi)}
    \Big[\log \frac{q(y \mid \theta, \xi)}{q(y \mid \xi)}\Big]
    = \mathrm{EIG}(\xi) - \mathbb{E}_\theta\, \mathrm{KL}\big(p(y \mid \theta) \,\|\, q(y \mid \theta)\big)
    + \mathrm{KL}\big(p(y) \,\|\, q(y)\big) .

One divergence pulls down, the other up, so no side is guaranteed; the error is at most the larger of the two. Neither a
density of the outcome nor one of the targets is needed: implicit models, nuisance sites, discrete targets and targets
whose prior the model does not state are all allowed. Where the outcome has a density, `eig_marginal` is a bound.

Both densities are maximum-likelihood fits, so they are trained together, by ascending the sum of their mean log
densities. *Discrete outcomes* are made continuous by uniform noise on [0, 1), the same for both densities: the noise
tells nothing about the targets and the outcome can be read off the sum, so the information is unchanged.

References:
    Foster et al. (2019), as in `marginal`, section 3 ("Marginal + likelihood") and Eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_voed.bounds.outcome_density import marginal_likelihood_terms
from pyro_voed.checks import Labels, check_count
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.estimators.building import build_density
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.fit import fit_of
from pyro_voed.estimators.outcome_density import dequantiser
from pyro_voed.experiment import needs
from pyro_voed.experiment.atoms import check_outcomes
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.results import EIGResult, Learned
from pyro_voed.training.settings import Training, check_training

RATE = 2e-3


@rebuildable
class OutcomeDensities(nn.Module):
    """The outcome's density given the targets, and without them; a batch's packed design is in the context of both."""

    given_targets: Any
    marginal: Any

    def __init__(self, given_targets: nn.Module, marginal: nn.Module) -> None:
        super().__init__()
        self.given_targets = given_targets
        self.marginal = marginal

    def log_probs(self, sample: JointSample) -> tuple[Tensor, Tensor]:
        """Return both log densities of the packed outcomes, nats, `(num_samples, *design_batch)`."""
        given, alone = _contexts(sample)
        return self.given_targets.log_prob(sample.y, given), self.marginal.log_prob(sample.y, alone)


def eig_marginal_likelihood(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    likelihood_density: Any = None,
    marginal_density: Any = None,
    training: Training | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain with two learned outcome densities, from simulations alone.

    Args:
        model: A Pyro program of one experiment; implicit models, nuisance sites and discrete targets are allowed.
        likelihood_density: Density of the outcome given the targets: a factory `(y_dim, context_dim) -> density`, a
            density, or `density.given_targets` of an earlier result. Default: a spline coupling flow.
        marginal_density: Density of the outcome, likewise (`density.marginal` of an earlier result). Its context is the
            design where there are several, else empty.
        observation_labels, target_labels, designs, training, num_samples, seed, progress: As in `eig_flow`.

    Returns:
        An estimate in nats that may err to either side, with its standard error. The history holds what was
        ascended, the sum of both mean log densities, not the estimate.

    Example:
        >>> from pyro_voed.training import Fresh
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> result = eig_marginal_likelihood(implicit_toy(), "y", "theta", training=Fresh(num_steps=150), seed=0)
        >>> result.bound, bool(0.5 < result.eig < 1.1)  # exact: 0.805
        ('neither', True)
    """
    check_training(training)
    if num_samples is not None:
        check_count(num_samples, "num_samples", 2)

    def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        fit = fit_of(experiment, candidates, training, name="eig_marginal_likelihood", rate=RATE, progress=progress)
        fit = replace(fit, prepare=dequantiser(experiment))
        pool = fit.pool()
        pilot = fit.pilot(pool)
        check_outcomes(experiment, pilot)
        build = lambda: _build(pilot, likelihood_density, marginal_density)  # noqa: E731
        densities, history, rate = fit.train_best(build, _objective, pool)
        found = fit.evaluate(lambda sample: marginal_likelihood_terms(*densities.log_probs(sample)), num_samples)
        learned = Learned(densities, history=history, outcome_range=found.outcome_range, learning_rate=rate)
        return Terms(found.terms, learned)

    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_marginal_likelihood", bound="neither", needs=[needs.whole_outcomes])


def _objective(sample: JointSample, densities: OutcomeDensities) -> Tensor:
    """Terms to ascend: each density's own log-likelihood. They share no weights, so the sum fits both."""
    given, alone = densities.log_probs(sample)
    return given + alone


def _build(pilot: JointSample, likelihood_density: Any, marginal_density: Any) -> OutcomeDensities:
    y = pilot.y.reshape(-1, pilot.y.shape[-1])
    parts = [
        build_density(
            given,
            y,
            context.reshape(len(y), -1),
            num_designs=0 if pilot.designs is None else pilot.designs.shape[-1],
            summary=None,
        )
        for given, context in zip((likelihood_density, marginal_density), _contexts(pilot), strict=True)
    ]
    return OutcomeDensities(*parts)


def _contexts(sample: JointSample) -> tuple[Tensor, Tensor]:
    """Return what each density is conditioned on: targets and design, design alone."""
    alone = sample.design_context()
    return torch.cat([sample.theta, alone], -1), alone

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
    Foster, Jankowiak, Bingham, Horsfall, Teh, Rainforth and Goodman (2019), "Variational Bayesian optimal experimental
    design", section 3 ("Marginal + likelihood").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import Labels
from pyro_voed.estimators.building import build_density
from pyro_voed.estimators.learning import (
    Budget,
    check_sizes,
    default_budget,
    draw_pool,
    draw_training,
    evaluate_terms,
    train_density,
)
from pyro_voed.estimators.marginal import dequantiser
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.resolve import resolve
from pyro_voed.experiment.simulate import JointSample, candidate_designs, design_batch_shape
from pyro_voed.experiment.sites import Experiment
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import EIGResult
from pyro_voed.training.loop import kept_on_error


def marginal_likelihood_terms(
    log_q_given_targets: Float[Tensor, "*batch"], log_q: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Return terms, nats, whose mean approximates the expected information gain.

    Args:
        log_q_given_targets: Log density of an outcome under the density learnt given the targets that made it.
        log_q: Its log density under the one learnt without them, in the same coordinates.

    Example:
        >>> marginal_likelihood_terms(torch.tensor([-0.5]), torch.tensor([-1.5]))
        tensor([1.])
    """
    return log_q_given_targets - log_q


class OutcomeDensities(nn.Module):
    """The outcome's density given the targets, and without them.

    Args:
        given_targets: Density of y whose context is the packed targets, then the packed design of a batch.
        marginal: Density of y whose context is the packed design of a batch, else empty.
    """

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
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    designs: Mapping[str, Any] | None = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    likelihood_density: Any = None,
    marginal_density: Any = None,
    num_simulations: int | None = None,
    num_steps: int | None = None,
    max_steps: int = 10_000,
    batch_size: int | None = None,
    learning_rate: float = 2e-3,
    num_samples: int | None = None,
    vectorize: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain with two learned outcome densities, from simulations alone.

    Args:
        model: A Pyro program of one experiment; implicit models and nuisance sites are allowed.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about, discrete ones included; default: all other latent sites.
        design_labels: Design sites.
        designs: Candidate designs, `(*design_batch, *shape)` each, evaluated with densities given the design.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        likelihood_density: Density of the outcome given the targets: a factory `(y_dim, context_dim) -> density`, a
            density, or `density.given_targets` of an earlier result. Default: a spline coupling flow.
        marginal_density: Density of the outcome, likewise (`density.marginal` of an earlier result). Its context is the
            design where there are several, else empty.
        num_simulations: Train on a fixed pool of this many simulations, part of it kept for validation.
        num_steps: Train for exactly this many steps. Default: until the fit no longer improves by more than its noise.
        max_steps: Most steps on fresh simulations.
        batch_size: Experiments a step.
        learning_rate: Peak learning rate.
        num_samples: Fresh experiments at each design behind the reported number.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        An estimate in nats that may err to either side, with its standard error. The history holds what was
        ascended, the sum of both mean log densities, not the estimate.

    Raises:
        ValueError: If labels, designs or sizes are wrong.
        ArithmeticError: If a term is not finite. It carries the densities as last trained (`error.density`).

    References:
        Foster et al. (2019), section 3.

    Example:
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> result = eig_marginal_likelihood(implicit_toy(), "y", "theta", num_steps=150, seed=0)
        >>> result.bound, bool(0.5 < result.eig < 1.1)  # exact: 0.805
        ('neither', True)
    """
    check_sizes(num_simulations, num_steps, max_steps, batch_size, learning_rate, num_samples)
    with isolated(seed):
        started = time.perf_counter()
        experiment = resolve(
            model,
            observation_labels,
            target_labels,
            design_labels=design_labels,
            designs=designs,
            model_args=model_args,
            model_kwargs=model_kwargs,
            prior=prior,
            vectorize=vectorize,
        )
        candidates = candidate_designs(experiment, designs)
        budget = default_budget(
            experiment,
            design_batch_shape(experiment, candidates),
            num_simulations=num_simulations,
            num_steps=num_steps,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            num_samples=num_samples,
        )
        given = (likelihood_density, marginal_density)
        return _estimate(experiment, candidates, budget, given, progress, started)


def _objective(sample: JointSample, densities: OutcomeDensities) -> Tensor:
    """Terms to ascend: each density's own log-likelihood. They share no weights, so the sum fits both."""
    given, alone = densities.log_probs(sample)
    return given + alone


def _estimate(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    budget: Budget,
    given: tuple[Any, Any],
    progress: bool | None,
    started: float,
) -> EIGResult:
    """Train and evaluate on a resolved model, inside `isolated`."""
    noise = dequantiser(experiment)
    with torch.no_grad():
        pool = draw_pool(experiment, budget, designs, likelihood=False, prepare=noise)
        size = 1_000 if experiment.program.vectorised else 200
        pilot = pool if pool is not None else noise(draw_training(experiment, size, designs, likelihood=False))
    densities = _build(pilot, *given)
    history = None
    with kept_on_error(lambda: {"density": densities}):
        if budget.num_steps != 0:
            history = train_density(
                experiment,
                densities,
                _objective,
                budget,
                designs,
                likelihood=False,
                prepare=noise,
                pool=pool,
                progress=progress,
                description="eig_marginal_likelihood",
            )
        terms, outcome_range = evaluate_terms(
            experiment,
            lambda sample: marginal_likelihood_terms(*densities.log_probs(noise(sample))),
            budget.num_samples,
            designs,
            likelihood=False,
            estimator="eig_marginal_likelihood",
        )
    eig, standard_error = mean_and_standard_error(terms)
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound="neither",
        estimator="eig_marginal_likelihood",
        num_simulations=experiment.program.num_calls,
        num_samples=budget.num_samples,
        seconds=time.perf_counter() - started,
        designs=designs,
        target_labels=experiment.target_labels,
        observation_labels=experiment.observation_labels,
        nuisance_labels=tuple(site.name for site in experiment.nuisance),
        history=history,
        density=densities,
        experiment=experiment,
        observation_range=outcome_range,
    )


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
    alone = sample.y[..., :0] if sample.designs is None else sample.designs.expand(*sample.y.shape[:-1], -1)
    return torch.cat([sample.theta, alone], -1), alone

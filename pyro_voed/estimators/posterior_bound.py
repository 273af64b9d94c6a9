r"""The Barber-Agakov bound: terms, objective, and the density that makes it tight.

For any conditional density q,

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}_{p(\theta, y \mid \xi)}\Big[\log \frac{p(\theta \mid y, \xi)}{p(\theta)}\Big]
    \;\ge\; \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q(\theta \mid y, \xi) - \log p(\theta)\big],

off by the expected Kullback-Leibler divergence from the posterior to q. So of two densities the one with the larger
bound is nearer to the posterior by just the difference of the bounds (Dong et al. 2025, proposition 1).

References:
    Barber and Agakov (2003), "The IM algorithm: a variational approach to information maximization".
    Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational Bayesian optimal experimental design
    with normalizing flows".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.densities import StackedDensity, StandardisedDensity
from pyro_voed.estimators.collapse import checked_for_collapse
from pyro_voed.estimators.ensemble import Ensemble
from pyro_voed.estimators.learned_prior import learn_prior_density, with_prior_density
from pyro_voed.estimators.learning import (
    Budget,
    Terms,
    check_pilot,
    draw_pool,
    draw_training,
    evaluate_terms,
    train_density,
)
from pyro_voed.estimators.objective import Objective, build_posterior, start_posterior
from pyro_voed.estimators.summarising import Summary, outcome_summary
from pyro_voed.experiment.simulate import JointSample, design_batch_shape, draw_joint, sample_joint
from pyro_voed.experiment.sites import Experiment
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import EIGResult, FitHistory
from pyro_voed.training.loop import kept_on_error

PILOT_SIZE = 1_000
SELECTION_SIZE = 10_000


def ba_terms(log_q: Float[Tensor, "*batch"], log_prior: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return Barber-Agakov terms, nats, whose mean is a lower bound on the expected information gain.

    Args:
        log_q: Log density of the targets that made an outcome, under the learned posterior given that outcome.
        log_prior: Their log prior density, in the same coordinates.

    Example:
        >>> ba_terms(torch.tensor([-0.5]), torch.tensor([-1.5]))
        tensor([1.])
    """
    return log_q - log_prior


def _terms(sample: JointSample, density: Any) -> Float[Tensor, "num_samples *design_batch"]:
    if sample.log_prior is None:
        raise ValueError("the sample has no log prior: the model does not state the density of its targets.")
    return ba_terms(density.log_prob(sample.theta, sample.context()), sample.log_prior)


barber_agakov = Objective(_terms, bound="lower", stackable=True)
"""The Barber-Agakov objective: terms from a joint sample and a conditional density of the targets."""


def flow_bound(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    budget: Budget,
    density: Any,
    summary: Summary,
    prior_entropy: float | None,
    progress: bool | None,
    started: float,
    *,
    learn_prior: bool = False,
    ensemble: bool = False,
) -> EIGResult:
    """Train and evaluate the flow bound on a resolved model, inside `isolated`."""
    learn_prior = learn_prior and not experiment.has_log_prior
    check_flow_targets(experiment, prior_entropy, learn_prior=learn_prior)
    prepare = stated_prior(prior_entropy)
    pool = draw_pool(experiment, budget, designs, likelihood=False)
    if learn_prior:
        prepare = with_prior_density(learn_prior_density(experiment, designs, budget, pool=pool, progress=progress))
    with torch.no_grad():
        pool = None if pool is None else prepare(pool)
        pilot = pool if pool is not None else prepare(_pilot(experiment, designs, ensemble=ensemble))
    check_pilot(experiment, pilot)
    if not isinstance(density, StandardisedDensity | StackedDensity):
        summary = outcome_summary(experiment, summary)
    rates = budget.learning_rate if isinstance(budget.learning_rate, tuple) else (budget.learning_rate,)
    batch = design_batch_shape(experiment, designs) if ensemble else torch.Size()
    stack = Ensemble(len(rates), batch) if batch or len(rates) > 1 else None
    build = build_posterior if stack is None else stack.build
    trained: Any = build(density, pilot, experiment, summary, started=pool is None)
    history = chosen = None
    histories: list[FitHistory] = []
    trained.eval()
    train = partial(
        train_density,
        experiment,
        designs=designs,
        likelihood=False,
        prepare=prepare,
        pool=pool,
        draw=partial(draw_joint, experiment, max(2, budget.batch_size // batch.numel()), designs) if batch else None,
        progress=progress,
        description="eig_flow",
    )
    with kept_on_error(lambda: {"density": trained}):
        if budget.num_steps != 0 and pool is not None and len(rates) > 1:
            alone = Ensemble(1, batch)
            parts = [alone.build(density, pilot, experiment, summary, started=False) for _ in rates]
            # Each rate on its own: which pass over the pool was the best differs from one to the next.
            histories = [
                train(part, alone.terms, replace(budget, learning_rate=rate), begin=partial(alone.start, part))
                for part, rate in zip(parts, rates, strict=True)
            ]
            trained = StackedDensity([part.member(index) for part in parts for index in range(part.num_members)])
            history = histories[0]
        elif budget.num_steps != 0:
            begin = partial(start_posterior if stack is None else stack.start, trained)
            history = train(trained, barber_agakov if stack is None else stack.terms, budget, begin=begin)
        if stack is not None and len(rates) > 1:
            trained, winner = stack.best(trained, _scores(experiment, designs, stack, trained, prepare))
            chosen = torch.tensor(rates)[winner.cpu()]
            if len(histories) > 1 and not batch:
                history = histories[int(winner)]
        objective: Terms = Ensemble(1, batch).single if batch else barber_agakov
        terms, outcome_range = evaluate_terms(
            experiment,
            lambda sample: objective(prepare(sample), trained),
            budget.num_samples,
            designs,
            likelihood=False,
            estimator="eig_flow",
        )
        collapse = None if history is None else checked_for_collapse(experiment, designs, trained, pool)
    eig, standard_error = mean_and_standard_error(terms)
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound="neither" if learn_prior else "lower",
        estimator="eig_flow",
        num_simulations=experiment.program.num_calls,
        num_samples=budget.num_samples,
        seconds=time.perf_counter() - started,
        designs=designs,
        target_labels=experiment.target_labels,
        observation_labels=experiment.observation_labels,
        nuisance_labels=tuple(site.name for site in experiment.nuisance),
        history=history,
        density=trained,
        experiment=experiment,
        observation_range=outcome_range,
        learning_rate=chosen,
        collapse=collapse,
    )


def _scores(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    stack: Ensemble,
    density: Any,
    prepare: Callable[[JointSample], JointSample],
) -> Float[Tensor, "num_rates *design_batch"]:
    """Return the bound of every candidate on simulations that take no other part."""
    size = max(500, SELECTION_SIZE // design_batch_shape(experiment, designs).numel())
    with torch.no_grad(), pyro.validation_enabled(False):
        return stack.terms(prepare(sample_joint(experiment, size, designs)), density).mean(0)


def check_flow_targets(experiment: Experiment, prior_entropy: float | None, *, learn_prior: bool = False) -> None:
    """Raise NotImplementedError where a flow over the targets gives no bound."""
    endless = [site.name for site in experiment.targets if site.is_discrete and site.support_values is None]
    if endless:
        raise NotImplementedError(
            f"targets {endless} are discrete without finitely many values of their own, so no classifier can stand for "
            "their posterior. Use eig_nmc or eig_marginal, which only need the outcome's density, or other targets."
        )
    if experiment.has_log_prior or prior_entropy is not None or learn_prior:
        return
    leaking = ", ".join(f"'{name}' is drawn given '{parent}'" for name, parent in experiment.leaking_nuisance.items())
    unstated = [site.name for site in experiment.targets if not site.has_density]
    jointly = "the prior guide states the density of all latent sites together, not of the targets alone"
    why = leaking or (f"{unstated} have no log density" if unstated else jointly)
    raise NotImplementedError(
        f"the model does not state the prior density of the targets: {why}. Make what they are drawn given a target "
        "too, give the targets' entropy in nats as prior_entropy=, or let eig_flow learn their density "
        "(learn_prior=True), which gives up the side of the bound."
    )


def stated_prior(prior_entropy: float | None) -> Callable[[JointSample], JointSample]:
    """Return a function that puts a given prior entropy where the model states no density."""
    if prior_entropy is None:
        return lambda sample: sample
    entropy = prior_entropy

    def prepare(sample: JointSample) -> JointSample:
        # E[log q(theta)] + H[theta], the density of q taken in the targets' own coordinates.
        return replace(sample, log_prior=sample.log_det - entropy)

    return prepare


def _pilot(experiment: Experiment, designs: Mapping[str, Tensor], *, ensemble: bool) -> JointSample:
    """Simulate what scales are taken from; for an ensemble at every design, as each member has scales of its own."""
    size = PILOT_SIZE if experiment.program.vectorised else 200
    if ensemble:
        return sample_joint(experiment, size // 4, designs)
    return draw_training(experiment, size, designs, likelihood=False)

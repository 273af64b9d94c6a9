"""A learned posterior: one density, one for each design, or one for each learning rate, and the best of them.

All are candidates of one fit. Over a batch of designs one density takes the design as context, or (an *ensemble*) each
design has a density of its own. Several learning rates are trained side by side on the same fresh simulations, or one
after the other on the same pool; the best is chosen on draws of its own (the protocol of Dong et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.bounds.barber_agakov import ba_terms
from pyro_voed.densities import StackedDensity, StandardisedDensity
from pyro_voed.estimators.building import build_posterior, target_rows
from pyro_voed.estimators.collapse import checked_for_collapse
from pyro_voed.estimators.ensemble import Ensemble
from pyro_voed.estimators.fit import SMALL_PILOT_SIZE, Evaluation, Fit
from pyro_voed.estimators.objective import Objective
from pyro_voed.estimators.summarising import Summary, outcome_summary
from pyro_voed.experiment import needs
from pyro_voed.experiment.designs import design_batch_shape
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.sampling import draw_joint, sample_joint
from pyro_voed.results import FitHistory, Learned
from pyro_voed.training.settings import Pool

RATE = 2e-3


def posterior_terms(sample: JointSample, density: Any) -> Tensor:
    """Return Barber-Agakov terms of a conditional density, `(num_samples, *design_batch)`."""
    if sample.log_prior is None:
        raise ValueError("the sample has no log prior: the model does not state the density of its targets.")
    return ba_terms(density.log_prob(sample.theta, sample.context()), sample.log_prior)


barber_agakov = Objective(
    posterior_terms, bound="lower", needs=(needs.learnable_targets, needs.stated_prior), of_targets=True, attains=True
)
"""The Barber-Agakov objective: terms from a joint sample and a conditional density of the targets."""


@dataclass(frozen=True)
class Posterior:
    """A fitted posterior, or one for each design stacked; `history` is None where it was used as it was."""

    fit: Fit
    density: Any
    terms: Callable[[JointSample, Any], Tensor]
    history: FitHistory | None
    learning_rate: Tensor | None

    def evaluate(self, num_samples: int | None) -> Evaluation:
        """Return its Barber-Agakov terms on fresh simulations."""
        return self.fit.evaluate(lambda sample: self.terms(sample, self.density), num_samples)

    def learned(self, evaluation: Evaluation | None = None) -> Learned:
        """Return the record of what was learned, checked on the simulations of its evaluation where there is one."""
        found, collapse = evaluation, None
        if found is not None and self.history is not None:
            collapse = checked_for_collapse(self.fit.experiment, self.density, found.sample)
        return Learned(
            density=self.density,
            of_targets=True,
            attains=found is not None,
            history=self.history,
            outcome_range=None if found is None else found.outcome_range,
            learning_rate=self.learning_rate,
            collapse=collapse,
        )


def fit_posterior(
    fit: Fit, density: Any, summary: Summary, *, ensemble: bool = False, pool: JointSample | None = None
) -> Posterior:
    """Fit a conditional density of the targets, or one for each design, on `pool` or on simulations of its own."""
    batch = design_batch_shape(fit.experiment, fit.designs) if ensemble else torch.Size()
    if batch and not isinstance(fit.training, Pool):
        fit = replace(fit, draw=lambda size: draw_joint(fit.experiment, max(2, size // batch.numel()), fit.designs))
    pool = fit.pool() if pool is None else pool
    # Each member of an ensemble has scales of its own.
    at_all = lambda size: sample_joint(fit.experiment, max(SMALL_PILOT_SIZE // 4, size // 4), fit.designs)  # noqa: E731
    pilot = fit.pilot(pool, draw=at_all if batch else None)
    is_new = not isinstance(density, StandardisedDensity | StackedDensity)
    if is_new:
        summary = outcome_summary(fit.experiment, summary)

    def begin(built: Any, part: JointSample, rows: Callable[[JointSample], Any] = target_rows) -> None:
        """Take scales anew from the part of a pool that is learned from."""
        if is_new:
            built.fit_scales_(*rows(part))

    if not batch and len(fit.rates) == 1:
        build = partial(build_posterior, density, pilot, fit.experiment, summary)
        trained, history, _ = fit.train_best(build, posterior_terms, pool, begin=begin)
        return Posterior(fit, trained, posterior_terms, history, None)
    terms = Ensemble(1, batch).single if batch else posterior_terms
    trained, history, rate = _best_of_stack(fit, density, summary, batch, pilot, pool, begin)
    return Posterior(fit, trained, terms, history, rate)


def _best_of_stack(
    fit: Fit,
    density: Any,
    summary: Any,
    batch: torch.Size,
    pilot: JointSample,
    pool: JointSample | None,
    begin: Callable[..., None],
) -> tuple[Any, FitHistory | None, Tensor | None]:
    """Train one member for each rate and each design that has a density of its own; return the best at each."""
    stack, experiment = Ensemble(len(fit.rates), batch), fit.experiment
    if pool is not None and len(fit.rates) > 1 and fit.trains:
        # Each rate on its own: which pass over the pool was the best differs from one to the next.
        alone = Ensemble(1, batch)
        parts, histories = [], []
        for rate in fit.rates:
            part = alone.build(density, pilot, experiment, summary)
            start = partial(begin, part, rows=alone.of_members)
            histories.append(replace(fit, rates=(rate,)).train(part, alone.terms, pool, begin=start))
            parts.append(part)
        trained = StackedDensity([part.member(index) for part in parts for index in range(part.num_members)])
    else:
        trained = stack.build(density, pilot, experiment, summary)
        histories = [fit.train(trained, stack.terms, pool, begin=partial(begin, trained, rows=stack.of_members))]
    if len(fit.rates) == 1:
        return trained, histories[0], None
    with torch.no_grad(), pyro.validation_enabled(False):
        best, winner = stack.best(trained, stack.terms(fit.selection_sample(), trained).mean(0))
    history = histories[int(winner)] if len(histories) > 1 and not batch else histories[0]
    return best, history, torch.tensor(fit.rates)[winner.cpu()]

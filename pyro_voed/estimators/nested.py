r"""Inner averages: densities that are integrals over what a site does not show.

With nuisance sites :math:`\eta` the information about the targets is

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}\big[\log p(y, \theta) - \log p(\theta) - \log p(y)\big],

and each density is an average over runs of the model in which its sites are held (likelihood weighting): the runs draw
everything else, and are weighted by the densities of the sites held. A logarithm of an average of M independent runs
errs downwards (Jensen); with the run that made the sites counted among M + 1 it errs upwards, because that run is a
draw from the posterior (Foster et al. 2020, theorem 1). So

* for an upper side the generating run is counted in :math:`p(y, \theta)` and left out of the densities subtracted;
* for a lower side the reverse.

Without nuisance sites :math:`p(y, \theta) / p(\theta)` is the model's own p(y | theta), and only p(y) is an average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_voed.bounds.nested import log_average, nmc_terms, pce_terms
from pyro_voed.checks import check_count
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import run_controls
from pyro_voed.experiment.pairs import PAIR_MEMORY, log_sums
from pyro_voed.experiment.programs import ProgramRun, run_rows
from pyro_voed.experiment.scoring import outcome_log_likelihood
from pyro_voed.monte_carlo import controlled_terms


@dataclass(frozen=True)
class InnerDraws:
    """Inner runs behind p(y), None to re-use the outer draws, and behind densities of targets given nuisance."""

    num_inner: int | None
    num_nuisance: int
    max_bytes: int = PAIR_MEMORY


def checked_sizes(num_outer: int, num_inner: int | None, num_nuisance: int, max_bytes: int) -> InnerDraws:
    """Return the sizes of the inner averages."""
    check_count(num_outer, "num_outer_samples", 2)
    if num_inner is not None:
        check_count(num_inner, "num_inner_samples")
    check_count(num_nuisance, "num_nuisance_samples")
    return InnerDraws(num_inner, num_nuisance, max_bytes)


def nested_terms(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    num_outer: int,
    inner: InnerDraws,
    *,
    upper: bool,
    estimator: str,
) -> Tensor:
    """Return nested terms of one side at one design, nats, `(num_outer,)`, on outer draws of their own.

    Where sites state their entropy, what their log densities explain of the terms is taken off (`controlled_terms`).
    """
    outer = run_rows(experiment.program, num_outer, experiment.shapes, designs=designs)
    outcomes = {site.name: outer.value(site.name) for site in experiment.observations}
    likelihood = outcome_log_likelihood(outer, experiment)
    numerator = likelihood
    if experiment.nuisance:
        numerator = _given_targets(experiment, designs, outer, outcomes, likelihood, inner, upper=upper)
    if inner.num_inner is None:
        # The other outer draws are independent of the own one, which is left out or counted by the terms.
        sums = log_sums(experiment, designs, outcomes, outer, inner.max_bytes, omit_own=True)
        num_inner = num_outer - 1
    else:
        num_inner = inner.num_inner
        sums = _held_sums(experiment, designs, outcomes, experiment.observation_labels, num_inner, inner.max_bytes)
    terms = nmc_terms(numerator, sums, num_inner) if upper else pce_terms(numerator, sums, num_inner, likelihood)
    _check_finite(terms, estimator)
    return controlled_terms(terms, run_controls(experiment, outer))


def _given_targets(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    outer: ProgramRun,
    outcomes: Mapping[str, Tensor],
    likelihood: Tensor,
    inner: InnerDraws,
    *,
    upper: bool,
) -> Tensor:
    """Give log p(y, theta) - log p(theta), with the nuisance sites averaged over."""
    targets = {site.name: outer.value(site.name) for site in experiment.targets}

    def average(held: Mapping[str, Tensor], scored: tuple[str, ...], own: Tensor | None) -> Tensor:
        sums = _held_sums(experiment, designs, held, scored, inner.num_nuisance, inner.max_bytes)
        return log_average(sums, inner.num_nuisance, own)

    if not experiment.leaking_nuisance:
        # p(theta) is the model's own and cancels, so only the outcomes are weighted.
        return average({**targets, **outcomes}, experiment.observation_labels, likelihood if upper else None)
    prior = torch.stack([outer.log_prob(name) for name in experiment.target_labels]).sum(0)
    both = (*experiment.target_labels, *experiment.observation_labels)
    joint = average({**targets, **outcomes}, both, prior + likelihood if upper else None)
    return joint - average(targets, experiment.target_labels, None if upper else prior)


def _held_sums(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    scored: tuple[str, ...],
    num_inner: int,
    max_bytes: int,
) -> Tensor:
    """Log of the sum of the `scored` sites' density over runs with `held` values put in, for each outer draw."""
    rows = max(1, max_bytes // (8 * max(1, experiment.bytes_per_row)))
    parts = []
    step = max(1, rows // num_inner)
    for pieces in zip(*(value.split(step) for value in held.values()), strict=True):
        chunk, count = dict(zip(held, pieces, strict=True)), len(pieces[0])
        sums = torch.full((count,), -torch.inf, dtype=experiment.dtype, device=experiment.device)
        # Where even one outer draw's inner runs exceed the memory, its sum is streamed.
        most = max(1, rows // count)
        for start in range(0, num_inner, most):
            size = min(most, num_inner - start)
            repeated = {name: value.repeat_interleave(size, 0) for name, value in chunk.items()}
            run = run_rows(experiment.program, count * size, experiment.shapes, designs=designs, row_values=repeated)
            weights = torch.stack([run.log_prob(name, on_support=True) for name in scored]).sum(0)
            sums = torch.logaddexp(sums, weights.reshape(count, size).logsumexp(-1))
        parts.append(sums)
    return torch.cat(parts)


def _check_finite(terms: Tensor, estimator: str) -> None:
    undefined = int(torch.isnan(terms).sum())
    if undefined:
        raise ArithmeticError(
            f"{estimator}: {undefined} of {terms.numel()} terms are not a number. Look for 0 / 0 or log of negative "
            "numbers in the model's parameters."
        )
    infinite = int(torch.isinf(terms).sum())
    if infinite:
        raise ArithmeticError(
            f"{estimator}: for {infinite} of {terms.numel()} outer draws no inner draw gives the outcome any density, "
            "so the estimate is infinite. Use more inner draws, or a bound with a learned density."
        )

r"""Inner averages: densities that are integrals over what a site does not show.

With nuisance sites :math:`\eta` the information about the targets is

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}\big[\log p(y, \theta) - \log p(\theta) - \log p(y)\big],

and each density is an average over runs of the model in which its sites are held (likelihood weighting): the runs draw
everything else, and are weighted by the densities of the sites held. A logarithm of an average of M independent runs
errs downwards (Jensen); with the run that made the sites counted among M + 1 it errs upwards, because that run is a
draw from the posterior (Foster et al. 2020, theorem 1). So for an upper side the generating run is counted in
:math:`p(y, \theta)` and left out of the densities subtracted. How far this can be off is seen from the same draws
with the roles exchanged, a lower bound: the nats between the two are left *open* by the inner draws. The lower side
itself is closer by a contrastive bound, with the average for p(y | theta) as critic (`bounds.nested.contrast_terms`).

Without nuisance sites :math:`p(y, \theta) / p(\theta)` is the model's own p(y | theta), and only p(y) is an average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.bounds.nested import contrast_terms, log_average, nmc_terms, pce_terms
from pyro_voed.checks import check_count
from pyro_voed.estimators.estimate import Terms, terms_at_each_design
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.failures import failed_runs
from pyro_voed.experiment.held import averaged_log_prior, held_log_sums
from pyro_voed.experiment.packing import run_controls
from pyro_voed.experiment.pairs import PAIR_MEMORY, log_likelihood_of_pairs, log_sums
from pyro_voed.experiment.programs import ProgramRun, run_rows
from pyro_voed.experiment.scoring import outcome_log_likelihood
from pyro_voed.monte_carlo import controlled_terms, mean_and_standard_error
from pyro_voed.results import WeightCheck

OPEN_NATS, OPEN_SHARE = 0.1, 0.05
"""What inner draws may leave open without a warning: nats, and share of the estimate."""

MOST_PAIRS = 3 * 10**7
"""Outcomes times inner runs that a contrastive bound scores where contrasts are not counted by the caller."""


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


def nested_estimate(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    num_outer: int,
    inner: InnerDraws,
    *,
    upper: bool,
    estimator: str,
) -> Terms:
    """Return nested terms of one side at each design, nats, with what their inner draws leave open.

    Where sites state their entropy, what their log densities explain of the terms is taken off (`controlled_terms`).
    """
    if experiment.nuisance and not upper:
        contrasts = lambda own: _contrasted(experiment, own, num_outer, inner)  # noqa: E731
        return Terms(terms_at_each_design(experiment, designs, contrasts))
    gaps = []

    def terms(own: dict[str, Tensor]) -> Tensor:
        outer = run_rows(experiment.program, num_outer, experiment.shapes, designs=own)
        above, below = _both_sides(experiment, own, outer, inner)
        chosen = above if upper else below
        if not torch.isfinite(chosen).all():
            sites = (*experiment.targets, *experiment.observations)
            why = failed_runs(experiment, {site.name: outer.value(site.name) for site in sites})
            if why:
                raise ArithmeticError(f"{estimator}: {why}")
        _check_finite(chosen, estimator)
        gaps.append((above - below).mean())
        return controlled_terms(chosen, run_controls(experiment, outer))

    values = terms_at_each_design(experiment, designs, terms)
    gap = torch.stack(gaps).reshape(values.shape[1:])
    mean, error = mean_and_standard_error(values)
    allowed = (OPEN_SHARE * mean.abs()).clamp_min(OPEN_NATS) + 3.0 * error
    passed = bool((gap <= allowed).all())
    doubt = ""
    if not passed:
        least = "num_inner_samples" + (" and num_nuisance_samples" if experiment.nuisance else "")
        doubt = (
            f"its inner draws leave {float(gap.max()):.2g} nats open: by so much the other side of the "
            f"same draws lies off, because few of them explain an outcome. Raise {least}, or use eig_flow, with "
            "certify=True for an interval"
        )
    return Terms(values, weights=WeightCheck(passed, open_nats=gap), doubts=(doubt,))


def _both_sides(
    experiment: Experiment, designs: Mapping[str, Tensor], outer: ProgramRun, inner: InnerDraws
) -> tuple[Tensor, Tensor]:
    """Return upper and lower terms on the same draws."""
    outcomes = {site.name: outer.value(site.name) for site in experiment.observations}
    likelihood = outcome_log_likelihood(outer, experiment)
    given = [likelihood, likelihood]
    if experiment.nuisance:
        given = _given_targets(experiment, designs, outer, outcomes, likelihood, inner)
    if inner.num_inner is None:
        # The other outer draws are independent of the own one, which is left out or counted by the terms.
        sums = log_sums(experiment, designs, outcomes, outer, inner.max_bytes, omit_own=True)
        count = len(likelihood) - 1
    else:
        count = inner.num_inner
        sums = held_log_sums(experiment, designs, outcomes, experiment.observation_labels, count, inner.max_bytes)
    return nmc_terms(given[0], sums, count), pce_terms(given[1], sums, count, likelihood)


def _given_targets(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    outer: ProgramRun,
    outcomes: Mapping[str, Tensor],
    likelihood: Tensor,
    inner: InnerDraws,
) -> list[Tensor]:
    """Give log p(y, theta) - log p(theta) from above and from below, with the nuisance sites averaged over."""
    held = {**{site.name: outer.value(site.name) for site in experiment.targets}, **outcomes}
    draws, scored = inner.num_nuisance, experiment.observation_labels
    if not experiment.leaking_nuisance:
        # p(theta) is the model's own and cancels, so only the outcomes are weighted.
        sums = held_log_sums(experiment, designs, held, scored, draws, inner.max_bytes)
        return [log_average(sums, draws, own) for own in (likelihood, None)]
    prior = torch.stack([outer.log_prob(name) for name in experiment.target_labels]).sum(0)
    sums = held_log_sums(experiment, designs, held, (*experiment.target_labels, *scored), draws, inner.max_bytes)
    log_priors = [averaged_log_prior(experiment, outer, designs, below=below) for below in (True, False)]
    joints = [log_average(sums, draws, own) for own in (prior + likelihood, None)]
    return [joint - log_prior for joint, log_prior in zip(joints, log_priors, strict=True)]


def _contrasted(experiment: Experiment, designs: Mapping[str, Tensor], num_outer: int, inner: InnerDraws) -> Tensor:
    """Return terms of the contrastive bound, the other outer draws of a block the contrasts."""
    size = min(num_outer // 2, max(2, MOST_PAIRS // (num_outer * inner.num_nuisance)))
    size = size if inner.num_inner is None else min(num_outer // 2, inner.num_inner + 1)
    total = num_outer // size * size
    outer = run_rows(experiment.program, total, experiment.shapes, designs=designs)
    outcomes = {site.name: outer.value(site.name).split(size) for site in experiment.observations}
    targets = {site.name: outer.value(site.name).split(size) for site in experiment.targets}
    blocks = [
        _critics(
            experiment,
            designs,
            {name: parts[block] for name, parts in outcomes.items()},
            {name: parts[block] for name, parts in targets.items()},
            inner,
        )
        for block in range(total // size)
    ]
    return controlled_terms(contrast_terms(torch.stack(blocks)), run_controls(experiment, outer))


def _critics(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    inner: InnerDraws,
) -> Float[Tensor, "num_outcomes num_targets"]:
    """Estimate log p(outcome i given targets j) of all pairs, nats, from fresh nuisance draws given each target."""
    draws, size = inner.num_nuisance, len(next(iter(targets.values())))
    common: dict[str, Tensor] = {}
    if not experiment.nuisance_follows_targets:
        # The same nuisance draws for all targets: what they err by is in all critics alike.
        drawn = run_rows(experiment.program, draws, experiment.shapes, designs=designs)
        common = {site.name: drawn.value(site.name) for site in experiment.nuisance}
    together = max(1, inner.max_bytes // (8 * max(1, experiment.bytes_per_row) * draws))
    elements = sum(site.shape.numel() for site in experiment.observations)
    columns = []
    for start in range(0, size, together):
        held = {name: value[start : start + together].repeat_interleave(draws, 0) for name, value in targets.items()}
        count = len(next(iter(held.values())))
        held |= {name: value.repeat(count // draws, *(1,) * (value.dim() - 1)) for name, value in common.items()}
        run = run_rows(experiment.program, count, experiment.shapes, designs=designs, row_values=held)
        log_weights = torch.zeros(count // draws, draws, dtype=experiment.dtype, device=experiment.device)
        if experiment.leaking_nuisance:
            # Nuisance sites before the targets are drawn without these, and weighted by them.
            prior = torch.stack([run.log_prob(name, on_support=True) for name in targets]).sum(0)
            log_weights = prior.reshape(log_weights.shape).clamp_min(torch.finfo(prior.dtype).min)
        log_weights = log_weights.log_softmax(-1)
        step = max(1, inner.max_bytes // (6 * 8 * count * elements))
        rows = []
        for first in range(0, len(next(iter(outcomes.values()))), step):
            part = {name: value[first : first + step] for name, value in outcomes.items()}
            pairs = log_likelihood_of_pairs(experiment, designs, part, run, count)
            rows.append((pairs.unflatten(-1, log_weights.shape) + log_weights).logsumexp(-1))
        columns.append(torch.cat(rows))
    log_ratios = torch.cat(columns, -1)
    if all(site.is_discrete for site in experiment.targets):
        labels = torch.cat([value.reshape(size, -1) for value in targets.values()], -1)
        for label in labels.unique(dim=0):
            # Equal targets have one density, which all their draws tell of.
            same = (labels == label).all(-1)
            average = log_ratios[:, same].logsumexp(-1, keepdim=True) - math.log(int(same.sum()))
            log_ratios[:, same] = average.expand(-1, int(same.sum()))
    return log_ratios


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

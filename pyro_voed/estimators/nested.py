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

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyro
import torch
from torch import Tensor

from pyro_voed.experiment.programs import ProgramRun, run_rows
from pyro_voed.experiment.scoring import NormalPairs, normal_pairs, outcome_log_likelihood, pairwise_log_likelihood
from pyro_voed.experiment.simulate import design_batch_shape, flat_designs, run_controls
from pyro_voed.experiment.sites import Experiment
from pyro_voed.monte_carlo import controlled_terms, mean_and_standard_error
from pyro_voed.results import EIGResult

PAIR_MEMORY = 2**25
"""Bytes of one chunk of pairs. Temporaries of some megabytes stay in the allocator's reach; at ten times the size the
same pairs took four times as long."""

NORMAL_PAIRS = (128, 1_024)
"""Outcomes and inner draws in one block of normal pairs, 1 MB, which stays in the processor's cache."""


@dataclass(frozen=True)
class InnerDraws:
    """Sizes of the inner averages.

    Attributes:
        num_inner: Independent inner runs behind p(y) for each outer draw; None re-uses the outer draws.
        num_nuisance: Independent inner runs behind the densities of the targets, where there are nuisance sites.
        max_bytes: Memory for one chunk.
    """

    num_inner: int | None
    num_nuisance: int
    max_bytes: int = PAIR_MEMORY


def nested_estimate(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    num_outer: int,
    inner: InnerDraws,
    *,
    estimator: str,
    bound: Literal["lower", "upper"],
) -> EIGResult:
    """Average nested terms at each design, inside `isolated`.

    Raises:
        NotImplementedError: If the outcome has no density, or a target is deterministic.
        ArithmeticError: If a term is infinite.
    """
    started, calls = time.perf_counter(), experiment.program.num_calls
    check_densities(experiment, estimator)
    members = flat_designs(experiment, designs)
    terms = []
    # Common random numbers: what differs between designs is then the designs' doing rather than the draws'.
    seed = int(torch.randint(2**31 - 1, ()).item())
    with torch.no_grad(), pyro.validation_enabled(False):
        for member in range(design_batch_shape(experiment, designs).numel()):
            own = {name: value[member] for name, value in members.items()}
            pyro.set_rng_seed(seed)
            terms.append(nested_terms(experiment, own, num_outer, inner, upper=bound == "upper"))
            _check_finite(terms[-1], estimator)
    eig, standard_error = mean_and_standard_error(
        torch.stack(terms, -1).reshape(-1, *design_batch_shape(experiment, designs))
    )
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound=bound,
        estimator=estimator,
        num_simulations=experiment.program.num_calls - calls,
        num_samples=num_outer,
        seconds=time.perf_counter() - started,
        designs=designs,
        target_labels=experiment.target_labels,
        observation_labels=experiment.observation_labels,
        nuisance_labels=tuple(site.name for site in experiment.nuisance),
        experiment=experiment,
    )


def check_densities(experiment: Experiment, estimator: str) -> None:
    """Raise NotImplementedError where the outcome has no density, or a target cannot be held."""
    implicit = [site.name for site in experiment.observations if not site.has_density]
    if implicit:
        raise NotImplementedError(
            f"{estimator} needs the density of the outcome, and {implicit} have none (deterministic, or a distribution "
            "that only samples). Use eig_flow, which needs simulations alone."
        )
    computed = [site.name for site in experiment.targets if not site.has_density]
    if computed:
        raise NotImplementedError(
            f"{estimator} holds the targets while it draws the rest, and {computed} cannot be held: they are computed. "
            "Use eig_flow with prior_entropy=, or name the sites they are computed from."
        )


def check_no_nuisance(experiment: Experiment, estimator: str) -> None:
    """Raise NotImplementedError where p(y given the targets) is an integral over nuisance sites."""
    if experiment.nuisance:
        raise NotImplementedError(
            f"{estimator} needs the density of the outcome given the targets, but {[s.name for s in experiment.nuisance]} "
            "are drawn too and are not targets. Make them targets, or use eig_flow, which needs simulations alone, or "
            "eig_nmc and eig_pce, which average over them."
        )


def check_scores_targets(experiment: Experiment, estimator: str) -> None:
    """Raise NotImplementedError where a replaced prior cannot score targets that it did not draw."""
    if experiment.has_auxiliary_density:
        raise NotImplementedError(
            f"{estimator} scores targets that the prior did not draw, and the prior guide states its density by "
            "auxiliary sites. Use a guide that samples the model's sites from their own distributions, or eig_flow."
        )


def nested_terms(
    experiment: Experiment, designs: Mapping[str, Tensor], num_outer: int, inner: InnerDraws, *, upper: bool
) -> Tensor:
    """Return nested terms of one side, nats, `(num_outer,)`, on outer draws of their own.

    Where sites state their entropy, what their log densities explain of the terms is taken off (`controlled_terms`).

    Args:
        experiment: The explicit experiment.
        designs: The one design.
        num_outer: Outer draws.
        inner: Sizes of the inner averages.
        upper: Which side the generating runs are counted on.
    """
    outer = run_rows(experiment.program, num_outer, experiment.shapes, designs=designs)
    outcomes = {site.name: outer.value(site.name) for site in experiment.observations}
    likelihood = outcome_log_likelihood(outer, experiment)
    numerator = likelihood
    if experiment.nuisance:
        numerator = _given_targets(experiment, designs, outer, outcomes, likelihood, inner, upper=upper)
    if inner.num_inner is None:
        marginal = log_marginal(
            experiment, designs, outcomes, outer, inner.max_bytes, own="omitted" if upper else "counted"
        )
    else:
        own = None if upper else likelihood
        marginal = _held_average(
            experiment, designs, outcomes, experiment.observation_labels, inner.num_inner, own, inner
        )
    return controlled_terms(numerator - marginal, run_controls(experiment, outer))


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
    if not experiment.leaking_nuisance:
        # p(theta) is the model's own and cancels, so only the outcomes are weighted.
        own = likelihood if upper else None
        held = {**targets, **outcomes}
        return _held_average(experiment, designs, held, experiment.observation_labels, inner.num_nuisance, own, inner)
    prior = torch.stack([outer.log_prob(name) for name in experiment.target_labels]).sum(0)
    both = (*experiment.target_labels, *experiment.observation_labels)
    joint = _held_average(
        experiment,
        designs,
        {**targets, **outcomes},
        both,
        inner.num_nuisance,
        prior + likelihood if upper else None,
        inner,
    )
    alone = _held_average(
        experiment, designs, targets, experiment.target_labels, inner.num_nuisance, None if upper else prior, inner
    )
    return joint - alone


def _held_average(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    scored: tuple[str, ...],
    num_inner: int,
    own: Tensor | None,
    inner: InnerDraws,
) -> Tensor:
    """Log of the average density of the `scored` sites over runs with `held` values put in, for each outer draw.

    With `own`, the generating run's log density, that run is counted too.
    """
    rows = max(1, inner.max_bytes // (8 * max(1, experiment.bytes_per_row)))
    parts = []
    for chunk in split_rows(held, max(1, rows // num_inner)):
        count = next(iter(chunk.values())).shape[0]
        sums = torch.full((count,), -torch.inf, dtype=experiment.dtype, device=experiment.device)
        # Where even one outer draw's inner runs exceed the memory, its sum is streamed.
        for size in _sizes(num_inner, max(1, rows // count)):
            repeated = {name: value.repeat_interleave(size, 0) for name, value in chunk.items()}
            run = run_rows(experiment.program, count * size, experiment.shapes, designs=designs, row_values=repeated)
            weights = torch.stack([run.log_prob(name, on_support=True) for name in scored]).sum(0)
            sums = torch.logaddexp(sums, weights.reshape(count, size).logsumexp(-1))
        parts.append(sums)
    total = torch.cat(parts)
    if own is None:
        return total - math.log(num_inner)
    return torch.logaddexp(total, own) - math.log(num_inner + 1)


def log_marginal(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor],
    inner: ProgramRun,
    max_bytes: int = PAIR_MEMORY,
    *,
    own: Literal["omitted", "counted", "foreign"] = "foreign",
) -> Tensor:
    """Return the log of the average of p(y_i given the latents of inner run j) over j, nats, for each outcome i.

    Args:
        experiment: The explicit experiment.
        designs: The one design.
        outcomes: Outcome values, `(num_outer, *shape)` each.
        inner: The run whose latents are the inner draws.
        max_bytes: Memory for one chunk of pairs.
        own: "omitted" or "counted" where inner run i made outcome i; "foreign" where the runs are others.
    """
    num_inner = len(inner.traces) * inner.rows_per_trace
    normal = normal_pairs(experiment, inner)
    if normal is not None:
        values = [outcomes[site.name] for site in experiment.observations]
        flat = torch.cat([value.reshape(value.shape[0], -1) for value in values], -1)
        sums = _normal_log_sums(normal, flat, max_bytes, omitted=own == "omitted").to(experiment.dtype)
        return sums - math.log(num_inner - (own == "omitted"))
    elements = sum(site.shape.numel() for site in experiment.observations)
    # A log density makes about six temporaries of the size of its pairs.
    chunk = max(1, max_bytes // (6 * 8 * num_inner * elements))
    total = next(iter(outcomes.values())).shape[0]
    # Written into one tensor: small results kept between large temporaries would pin the heap and let it grow.
    sums = torch.empty(total, dtype=experiment.dtype, device=experiment.device)
    for start in range(0, total, chunk):
        rows = {name: value[start : start + chunk] for name, value in outcomes.items()}
        pairs = log_likelihood_of_pairs(experiment, designs, rows, inner, num_inner)
        if own == "omitted":
            index = torch.arange(pairs.shape[0], device=pairs.device)
            pairs[index, start + index] = -torch.inf
        sums[start : start + chunk] = pairs.logsumexp(-1)
    return sums - math.log(num_inner - (own == "omitted"))


def _normal_log_sums(normal: NormalPairs, outcomes: Tensor, max_bytes: int, *, omitted: bool) -> Tensor:
    """Sum the densities of each outcome given every inner draw, in blocks; nats, `(num_outer,)`, double."""
    num_inner = normal.offset.shape[0]
    rows, columns = NORMAL_PAIRS
    if outcomes.is_cuda:
        # Few large blocks suit a GPU: a double, a single and the workings of both for each pair.
        rows, columns = max(1, max_bytes // (24 * num_inner)), num_inner
    # Written into one tensor, as in `log_marginal`.
    sums = torch.empty(outcomes.shape[0], dtype=torch.double, device=outcomes.device)
    for start in range(0, outcomes.shape[0], rows):
        features, common = normal.features(outcomes[start : start + rows])
        total = torch.full_like(common, -torch.inf)
        for left in range(0, num_inner, columns):
            part = slice(left, left + columns)
            block = torch.addmm(normal.offset[part], features, normal.coefficients[:, part])
            if omitted:
                block.diagonal(start - left).fill_(-torch.inf)
            # A block whose only entry is left out has no finite maximum.
            largest = block.amax(-1, keepdim=True).clamp_min(torch.finfo(block.dtype).min)
            # Differences from the maximum need no more than single precision, whose exponential is much the cheaper.
            shares = block.sub_(largest).float().exp_().sum(-1)
            total = torch.logaddexp(total, shares.double().log() + largest.squeeze(-1))
        sums[start : start + rows] = total + common
    return sums


def log_likelihood_of_pairs(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor],
    inner: ProgramRun,
    num_inner: int,
) -> Tensor:
    """Return log p(y_i given the latents of inner run j), nats, `(num_outer, num_inner)`, of any explicit model."""
    if not experiment.linked_outcomes:
        return pairwise_log_likelihood(experiment, outcomes, inner)
    # An outcome's distribution depends on another's value, so the model is run again at every pair.
    count = next(iter(outcomes.values())).shape[0]
    latents = [site.name for site in (*experiment.targets, *experiment.others) if not site.is_deterministic]
    values = {name: inner.value(name).repeat(count, *(1,) * len(experiment.shapes[name])) for name in latents}
    values |= {name: value.repeat_interleave(num_inner, 0) for name, value in outcomes.items()}
    run = run_rows(experiment.program, count * num_inner, experiment.shapes, designs=designs, row_values=values)
    return outcome_log_likelihood(run, experiment).reshape(count, num_inner)


def split_rows(values: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Cut rows into pieces of at most `size`."""
    total = next(iter(values.values())).shape[0]
    return [{name: value[start : start + size] for name, value in values.items()} for start in range(0, total, size)]


def _sizes(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


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

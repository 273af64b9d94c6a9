r"""Nested Monte Carlo: an upper-biased, consistent estimate from the outcome's density.

With outer draws :math:`(\theta_i, y_i)` and inner draws :math:`\theta_{ij}` from the prior,

.. math::
    \mathrm{EIG}(\xi) \approx \frac1N \sum_i \Big[\log p(y_i \mid \theta_i, \xi)
    - \log \frac1M \sum_j p(y_i \mid \theta_{ij}, \xi)\Big].

By Jensen's inequality its expectation lies above the truth at any finite M, whether the inner draws are

* *independent*: M new ones for each outer draw, `N (M + 1)` simulations; or
* *re-used*: the other outer draws, the own one left out, M = N - 1 and only `N` simulations. Terms then share
  their inner draws; to first order these fluctuations cancel (the mean of p(y | theta') / p(y) over y is 1 for
  every theta'), so the standard error of independent terms holds.

References:
    Ryan (2003), "Estimating expected information gains for experimental designs with application to the random
    fatigue-limit model"; Huan and Marzouk (2013), "Simulation-based optimal Bayesian experimental design for nonlinear
    systems".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.caller_state import isolated
from pyro_voed.checks import Labels, check_count
from pyro_voed.monte_carlo import log_mean_exp, mean_and_standard_error
from pyro_voed.programs import ProgramRun, run_rows
from pyro_voed.resolve import resolve
from pyro_voed.results import EIGResult
from pyro_voed.simulate import (
    candidate_designs,
    design_batch_shape,
    flat_designs,
    outcome_log_likelihood,
    pairwise_log_likelihood,
)
from pyro_voed.sites import Sites

PAIR_MEMORY = 2**25
"""Bytes of one chunk of pairs. Temporaries of some megabytes stay in the allocator's reach; at ten times the size the
same pairs took four times as long."""


def nmc_terms(log_likelihood: Tensor, inner_log_likelihood: Tensor) -> Tensor:
    """Return nested Monte Carlo terms, nats.

    Args:
        log_likelihood: log p(y_i given theta_i), `(num_outer,)`.
        inner_log_likelihood: log p(y_i given theta_ij), `(num_outer, num_inner)`.

    Example:
        >>> nmc_terms(torch.tensor([0.0]), torch.tensor([[0.0, -torch.inf]]))
        tensor([0.6931])
    """
    return log_likelihood - log_mean_exp(inner_log_likelihood, dim=-1)


def eig_nmc(
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    designs: Mapping[str, Any] | None = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    num_outer_samples: int = 2_000,
    num_inner_samples: int | None = None,
    max_bytes: int = PAIR_MEMORY,
    vectorize: bool = True,
    seed: int | None = None,
) -> EIGResult:
    """Estimate the expected information gain by nested Monte Carlo.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities; targets must be all its latents.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about, discrete ones included; default: all other latent sites.
        design_labels: Design sites.
        designs: Candidate designs, `(*design_batch, *shape)` each, estimated one after the other.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        num_outer_samples: Outer draws N.
        num_inner_samples: Independent inner draws M for each outer draw, `N (M + 1)` simulations in all; None re-uses
            the outer draws, leaving the own one out, for `N` simulations.
        max_bytes: Memory for one chunk of pairs.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.

    Returns:
        An estimate in nats whose expectation lies above the truth, with its standard error.

    Raises:
        NotImplementedError: If the outcome has no density, or there are nuisance sites.
        ArithmeticError: If no inner draw gives an outcome any density, so that a term is infinite.

    References:
        Ryan (2003); Huan and Marzouk (2013).

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_nmc(linear_gaussian(), "y", "theta", num_outer_samples=1000, seed=0)
        >>> result.bound, bool(1.0 < result.eig < 1.4)  # exact: 1.199
        ('upper', True)
    """
    check_count(num_outer_samples, "num_outer_samples", 2)
    if num_inner_samples is not None:
        check_count(num_inner_samples, "num_inner_samples")
    with isolated(seed):
        sites = resolve(
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
        return nmc_estimate(
            sites,
            candidate_designs(sites, designs),
            num_outer_samples=num_outer_samples,
            num_inner_samples=num_inner_samples,
            max_bytes=max_bytes,
        )


def nmc_estimate(
    sites: Sites,
    designs: Mapping[str, Tensor],
    *,
    num_outer_samples: int = 2_000,
    num_inner_samples: int | None = None,
    max_bytes: int = PAIR_MEMORY,
) -> EIGResult:
    """Estimate on a resolved model, inside `isolated`."""
    started, calls = time.perf_counter(), sites.program.num_calls
    check_explicit(sites, "eig_nmc")
    batch = design_batch_shape(sites, designs)
    flat = flat_designs(sites, designs)
    terms = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for member in range(batch.numel()):
            own = {name: value[member] for name, value in flat.items()}
            if num_inner_samples is None:
                terms.append(_reused_terms(sites, own, num_outer_samples, max_bytes))
            else:
                terms.append(_independent_terms(sites, own, num_outer_samples, num_inner_samples, max_bytes))
            _check_terms(terms[-1])
    eig, standard_error = mean_and_standard_error(torch.stack(terms, -1).reshape(-1, *batch))
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound="upper",
        estimator="eig_nmc",
        num_simulations=sites.program.num_calls - calls,
        num_samples=num_outer_samples,
        seconds=time.perf_counter() - started,
        designs=designs,
        target_labels=sites.target_labels,
        observation_labels=sites.observation_labels,
        sites=sites,
    )


def check_explicit(sites: Sites, estimator: str) -> None:
    """Raise NotImplementedError where the outcome has no density given the targets."""
    implicit = [site.name for site in sites.observations if not site.has_density]
    if implicit:
        raise NotImplementedError(
            f"{estimator} needs the density of the outcome, and {implicit} have none (deterministic, or a distribution "
            "that only samples). Use eig_flow, which needs simulations alone."
        )
    if sites.nuisance:
        raise NotImplementedError(
            f"{estimator} needs the density of the outcome given the targets, but {[s.name for s in sites.nuisance]} "
            "are drawn too and are not targets. Make them targets, or use eig_flow, which needs simulations alone."
        )


def _check_terms(terms: Tensor) -> None:
    infinite = int((~torch.isfinite(terms)).sum())
    if infinite:
        raise ArithmeticError(
            f"eig_nmc: for {infinite} of {terms.numel()} outer draws no inner draw gives the outcome any density, so "
            "the estimate is infinite. Use more inner draws, or a bound with a learned density."
        )


def _independent_terms(
    sites: Sites, designs: Mapping[str, Tensor], num_outer: int, num_inner: int, max_bytes: int
) -> Tensor:
    outer = run_rows(sites.program, num_outer, sites.shapes, designs=designs)
    outcomes = {site.name: outer.value(site.name) for site in sites.observations}
    log_likelihood = outcome_log_likelihood(outer, sites)
    rows = max(1, max_bytes // (8 * max(1, sites.bytes_per_row)))
    marginals = []
    for own in _split_rows(outcomes, max(1, rows // num_inner)):
        count = next(iter(own.values())).shape[0]
        sums = torch.full((count,), -torch.inf, dtype=log_likelihood.dtype, device=log_likelihood.device)
        # Where even one outer draw's inner draws exceed the memory, its sum is streamed.
        for inner in _sizes(num_inner, max(1, rows // count)):
            repeated = {name: value.repeat_interleave(inner, 0) for name, value in own.items()}
            run = run_rows(sites.program, count * inner, sites.shapes, designs=designs, row_values=repeated)
            sums = torch.logaddexp(sums, outcome_log_likelihood(run, sites).reshape(count, inner).logsumexp(-1))
        marginals.append(sums - math.log(num_inner))
    return log_likelihood - torch.cat(marginals)


def _reused_terms(sites: Sites, designs: Mapping[str, Tensor], num_outer: int, max_bytes: int) -> Tensor:
    run = run_rows(sites.program, num_outer, sites.shapes, designs=designs)
    outcomes = {site.name: run.value(site.name) for site in sites.observations}
    log_likelihood = outcome_log_likelihood(run, sites)
    marginal = log_marginal(sites, designs, outcomes, run, max_bytes, leave_own_out=True)
    return log_likelihood - marginal


def log_marginal(
    sites: Sites,
    designs: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor],
    inner: ProgramRun,
    max_bytes: int,
    *,
    leave_own_out: bool = False,
) -> Tensor:
    """Return the log of the inner average of p(y_i given theta_j), nats, in chunks of outer draws.

    Args:
        sites: A resolved explicit model.
        designs: The one design.
        outcomes: Outcome values, `(num_outer, *shape)` each.
        inner: The run whose latents are the inner draws.
        max_bytes: Memory for one chunk of pairs.
        leave_own_out: Leave draw i out for outcome i.
    """
    num_inner = len(inner.traces) * inner.rows_per_trace
    elements = sum(site.shape.numel() for site in sites.observations)
    # A log density makes about six temporaries of the size of its pairs.
    chunk = max(1, max_bytes // (6 * 8 * num_inner * elements))
    parts, start = [], 0
    for own in _split_rows(outcomes, chunk):
        count = next(iter(own.values())).shape[0]
        pairs = _pairs(sites, designs, own, inner, num_inner)
        if leave_own_out:
            pairs[torch.arange(count), torch.arange(start, start + count)] = -torch.inf
        parts.append(pairs.logsumexp(-1))
        start += count
    return torch.cat(parts) - math.log(num_inner - leave_own_out)


def _pairs(
    sites: Sites, designs: Mapping[str, Tensor], outcomes: Mapping[str, Tensor], inner: ProgramRun, num_inner: int
) -> Tensor:
    if not sites.linked_outcomes:
        return pairwise_log_likelihood(sites, outcomes, inner)
    # An outcome's distribution depends on another's value, so the model is run again at every pair.
    count = next(iter(outcomes.values())).shape[0]
    latents = (site.name for site in (*sites.targets, *sites.others) if not site.is_deterministic)
    values = {name: inner.value(name).repeat(count, *(1,) * len(sites.shapes[name])) for name in latents}
    values |= {name: value.repeat_interleave(num_inner, 0) for name, value in outcomes.items()}
    run = run_rows(sites.program, count * num_inner, sites.shapes, designs=designs, row_values=values)
    return outcome_log_likelihood(run, sites).reshape(count, num_inner)


def _split_rows(values: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    total = next(iter(values.values())).shape[0]
    return [{name: value[start : start + size] for name, value in values.items()} for start in range(0, total, size)]


def _sizes(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]

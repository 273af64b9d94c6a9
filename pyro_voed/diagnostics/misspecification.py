r"""Could the model have simulated this outcome?

A learned posterior has only seen simulated outcomes; where the model is wrong, the outcome in hand may be unlike all of
them, and the posterior extrapolates without saying so. Outcomes are compared by what the density sees of them: with
:math:`s(y)` the learned summary of the density's context, or the standardised outcome where there is none, whitened by
the covariance of simulated summaries, the statistic of observed outcomes :math:`y_1, \dots, y_M` is the squared maximum
mean discrepancy from simulated ones :math:`\tilde y_1, \dots, \tilde y_N`,

.. math::
    t = \frac{1}{M^2} \sum_{i, i'} k(s_i, s_{i'}) - \frac{2}{M N} \sum_{i, j} k(s_i, \tilde s_j)
    + \frac{1}{N^2} \sum_{j, j'} k(\tilde s_j, \tilde s_{j'}) ,

whose kernel is the mean of Gaussian kernels of half, one and two median distances. For one outcome (:math:`M = 1`)
only the middle term varies, and :math:`t` falls as the kernel density estimate of simulated summaries at the outcome
rises. The p-value is the rank of :math:`t` among the same statistic of fresh sets of :math:`M` simulated outcomes
against the same :math:`N`: exact where the model is right, regardless of what the density has learned. A difference
that the summary does not carry goes unseen, but does not reach the posterior either.

References:
    M. Schmitt, P.-C. Bürkner, U. Köthe and S. T. Radev (2022), Detecting model misspecification in amortized Bayesian
    inference with neural networks. German Conference on Pattern Recognition 2023, sections 3.2 and 3.3.
    A. Gretton, K. Borgwardt, M. Rasch, B. Schölkopf and A. Smola (2012), A kernel two-sample test. JMLR 13.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_count
from pyro_voed.densities import StandardisedDensity
from pyro_voed.densities.contract import evaluating
from pyro_voed.diagnostics.mmd_terms import gaussian_kernel, median_distance, squared_distances
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.inference.flow import DesignIndex, TrainedDensity, trained_density
from pyro_voed.inference.outcomes import check_outcome, pack_outcome, packed_names
from pyro_voed.results import DesignResult, EIGResult

Outcome = Tensor | Mapping[str, Any]

BANDWIDTH_FACTORS = (0.5, 1.0, 2.0)

SMALLEST_VARIANCE = 1e-8
"""Directions of less variance, as a share of the largest, are constant up to rounding and left out."""

MEDIAN_DRAWS = 1_000
"""Simulated summaries whose distances give the bandwidth: more would take memory and change nothing."""

TIE = 1e-6
"""Statistics as near as this are equal: those of equal discrete outcomes differ by the rounding of a summary."""

CHUNK_PAIRS = 2**22


@dataclass(frozen=True)
class MisspecificationResult:
    """How unlike the simulated outcomes the observed ones are.

    Attributes:
        statistic: Squared maximum mean discrepancy between observed and simulated summaries, with each outcome paired
            with itself too: above 0 by construction, to be read beside `null`.
        null: The statistic of fresh simulated outcomes.
        p_value: Share of the null (the statistic in hand counted in) that is at least the statistic.
        outside: Names of the outcome coordinates in which an observed outcome lies outside the range of all those
            simulated here. Each is there by chance with a probability of about `2 / num_simulations`.
        num_outcomes: Observed outcomes.
        summary_dim: Dimension in which they were compared.
        num_simulations: Outcomes simulated, those behind the null included.
    """

    statistic: float
    null: Float[Tensor, " num_null"] = field(repr=False)
    p_value: float
    outside: tuple[str, ...]
    num_outcomes: int
    summary_dim: int
    num_simulations: int
    seconds: float

    def __str__(self) -> str:
        low, high = self.null.quantile(self.null.new_tensor([0.05, 0.95])).tolist()
        several = "outcome" if self.num_outcomes == 1 else f"{self.num_outcomes:,} outcomes"
        lines = [
            f"{several} against simulated: MMD^2 {self.statistic:.4f} (simulated: {low:.4f} to {high:.4f} in nine of "
            f"ten), p = {self.p_value:.3g}",
            f"outside the simulated range: {', '.join(self.outside) if self.outside else 'nothing'}",
            f"{self.num_simulations:,} simulated experiments, {self.summary_dim} summary dimensions",
        ]
        return "\n".join(lines)


def misspecification(
    result: EIGResult | DesignResult,
    observations: Outcome | Sequence[Outcome],
    num_simulations: int = 1_000,
    *,
    num_null: int = 500,
    design_index: DesignIndex = None,
    seed: int | None = None,
) -> MisspecificationResult:
    """Test whether outcomes are like those that the model simulates, as the trained density sees them.

    A small p-value says that the posterior extrapolates, and that the model is wrong or this outcome rare. A large
    one does not say that the model is right: one outcome can be likely under many wrong models. A summary that is not
    finite is an ArithmeticError.

    Args:
        observations: One outcome, as for `flow_posterior`, or a list of several independent ones at one design.
        num_simulations: Simulated outcomes to compare with, at least 100.
        num_null: Fresh sets of simulated outcomes, of as many as were observed; the smallest p-value is `1 / (num_null
            + 1)`. They cost `num_null` simulations for each outcome.

    Example:
        >>> from pyro_voed import Fresh, eig_flow
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
        >>> found = misspecification(result, torch.tensor([1.0, 2.0, 30.0]), 200, num_null=99, seed=0)
        >>> found.p_value, found.outside
        (0.01, ('y[2]',))
    """
    check_count(num_simulations, "num_simulations", minimum=100)
    check_count(num_null, "num_null")
    outcomes: list[Any] = list(observations) if isinstance(observations, (list, tuple)) else [observations]
    if not outcomes:
        raise ValueError("observations is empty: pass at least one outcome.")
    with isolated(seed), torch.no_grad():
        started = time.perf_counter()
        trained = trained_density(result, design_index)
        experiment, designs = trained.experiment, trained.designs
        observed = torch.stack(
            [pack_outcome(experiment, check_outcome(experiment, outcome), designs) for outcome in outcomes]
        )
        with pyro.validation_enabled(False):
            simulated = sample_joint(experiment, num_simulations + num_null * len(outcomes), designs).y
        names = packed_names(experiment)
        summaries = [summarise(trained, y) for y in (observed, simulated)]
        for what, summary in zip(("observed", "simulated"), summaries, strict=True):
            if bad := int((~torch.isfinite(summary)).any(1).sum()):
                raise ArithmeticError(f"summaries of {bad} of {len(summary)} {what} outcomes are not finite.")
        # Taken from the reference alone, so that observed and fresh sets are exchangeable where the model is right.
        whiten = whitening(summaries[1][:num_simulations])
        reference, fresh = whiten(summaries[1]).split([num_simulations, num_null * len(outcomes)])
        statistic, null = outlyingness(whiten(summaries[0]), reference, fresh.unflatten(0, (num_null, len(outcomes))))
        return MisspecificationResult(
            statistic=statistic.item(),
            null=null,
            p_value=(1 + int((null >= statistic - TIE).sum())) / (1 + num_null),
            outside=_outside(observed, simulated, names),
            num_outcomes=len(outcomes),
            summary_dim=reference.shape[1],
            num_simulations=len(simulated),
            seconds=time.perf_counter() - started,
        )


def summarise(trained: TrainedDensity, y: Float[Tensor, "num y_dim"]) -> Float[Tensor, "num summary_dim"]:
    """Return what the density sees of packed outcomes; the outcomes themselves where it has no summary.

    The design, where the density sees it, is the same for all outcomes and drops out of every distance.
    """
    if not isinstance(trained.density, StandardisedDensity):
        return y
    with evaluating(trained.density):
        return trained.density.encode(trained.context(y))


def outlyingness(
    observed: Float[Tensor, "num_outcomes dim"],
    reference: Float[Tensor, "num_simulations dim"],
    fresh: Float[Tensor, "num_null num_outcomes dim"],
) -> tuple[Float[Tensor, ""], Float[Tensor, " num_null"]]:
    """Return the statistic of the observed set and of each fresh set, against the same reference.

    All are whitened summaries. The bandwidth too is taken from the reference alone.
    """
    bandwidths = [factor * median_distance(reference[:MEDIAN_DRAWS]) for factor in BANDWIDTH_FACTORS]
    sets = torch.cat([observed.unsqueeze(0), fresh])
    within = gaussian_kernel(squared_distances(sets, sets), bandwidths).mean((1, 2))
    rows = torch.cat([reference, sets.flatten(0, 1)])
    parts = rows.split(max(1, CHUNK_PAIRS // len(reference)))
    kernels = torch.cat([gaussian_kernel(squared_distances(part, reference), bandwidths).mean(1) for part in parts])
    among, across = kernels.split([len(reference), len(rows) - len(reference)])
    statistics = within - 2 * across.unflatten(0, sets.shape[:2]).mean(1) + among.mean()
    return statistics[0], statistics[1:]


def whitening(reference: Float[Tensor, "num_simulations dim"]) -> Callable[[Tensor], Tensor]:
    """Return the map to coordinates in which the reference has unit covariance, constant directions left out."""
    wide = reference.double()
    mean, scale = wide.mean(0), wide.std(0)
    varies = scale > 8.0 * torch.finfo(reference.dtype).eps * mean.abs()
    if not varies.any():
        raise ValueError("simulated summaries are all equal: nothing can be unlike them.")
    mean, scale = mean[varies], scale[varies]
    standard = (wide[:, varies] - mean) / scale
    variances, directions = torch.linalg.eigh(standard.mT @ standard / (len(standard) - 1))
    kept = variances > SMALLEST_VARIANCE * variances[-1]
    rotation = directions[:, kept] / variances[kept].sqrt()
    return lambda values: (values.double()[..., varies] - mean) / scale @ rotation


def _outside(
    observed: Float[Tensor, "num_outcomes y_dim"], simulated: Float[Tensor, "num y_dim"], names: Sequence[str]
) -> tuple[str, ...]:
    beyond = ((observed < simulated.amin(0)) | (observed > simulated.amax(0))).any(0).tolist()
    return tuple(dict.fromkeys(name for name, flag in zip(names, beyond, strict=True) if flag))

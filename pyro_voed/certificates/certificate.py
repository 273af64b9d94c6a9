r"""A two-sided certificate: one interval that holds the expected information gain with a stated confidence.

ACE below and VNMC above, both with the trained flow as proposal, on the same outer draws. What makes the interval tight
is a two-level estimate: the flow's own Barber-Agakov terms cost one simulation each and carry nearly all the variance;
what ACE and VNMC add to them is small where the flow is good, and hardly varies:

.. math::
    \mathrm{EIG} \ge \underbrace{\mathbb{E}[\mathrm{BA}]}_{N_1 \text{ cheap draws}}
    + \underbrace{\mathbb{E}[\mathrm{ACE} - \mathrm{BA}]}_{N_2 \text{ draws, } L \text{ inner}}, \qquad
    \mathrm{EIG} \le \mathbb{E}[\mathrm{BA}] + \mathbb{E}[\mathrm{VNMC} - \mathrm{BA}].

The first level is freed of what the draws' own place explains of it by controls of expectation zero: those of stated
entropies, and the prior's score (`score_controls`). A pilot chooses N_1, N_2 and L for the width asked for, within a
budget of simulations; the interval :math:`[\mathrm{lower} - z\,\mathrm{se},\ \mathrm{upper} + z\,\mathrm{se}]` is then
made from fresh draws. Each side misses with half the probability left over by the confidence; over several designs
that is shared among them (Bonferroni), so the intervals hold simultaneously, and with them the decision: whatever
design is chosen,

.. math::  \text{regret} \le \max_{\xi} \mathrm{upper}(\xi) - \mathrm{lower}(\xi_{\text{chosen}}).

A standard error is trusted where the tails of the terms allow it: with a Pareto k above 0.7 the interval is made anew
from more draws, as far as the budget goes, and where these are as heavy it is returned "uncertified". An interval much
wider than asked for, which one rare draw can make, is made anew likewise. The choice looks at the first draws and the
new interval at its own, so what it adds to the chance of a miss is at most that chance times the share made anew.

With nuisance sites :math:`\eta` both :math:`p(y)` and :math:`p(y \mid \theta)` are averages. A second density,
:math:`r(\eta \mid \theta, y)`, proposes for the latter, and :math:`q(\theta \mid y)\, r(\eta \mid \theta, y)` for the
former; each side counts the draw that made the outcome where that errs outwards (`nuisance_levels`).

Bounds hold for the densities that the model states. Where its draws clearly do not follow these the interval is
returned "uncertified" too, with the reason (`consistency`).

References:
    Foster et al. (2019, 2020) as in `importance`; Giles (2015), "Multilevel Monte Carlo methods"; Vehtari et al.
    (2024), "Pareto smoothed importance sampling".
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_voed.certificates.levels import FEWEST_SIMULATIONS, Levels
from pyro_voed.certificates.nested_certificate import nested_sides
from pyro_voed.certificates.nuisance_levels import NuisanceLevels
from pyro_voed.certificates.score_controls import score_controls
from pyro_voed.certificates.sides import Request, Sides
from pyro_voed.checks import check_count, check_positive, warn
from pyro_voed.densities.stacked import member_density
from pyro_voed.experiment import needs
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.designs import at_each_design, design_batch_shape
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.monte_carlo import HEAVY_TAIL
from pyro_voed.results import Certificate, DesignResult, EIGResult, Learned, experiment_of

MOST_SIMULATIONS = 20_000_000


def certify(
    result: EIGResult | DesignResult,
    *,
    width: float = 0.05,
    confidence: float = 0.95,
    max_simulations: int = MOST_SIMULATIONS,
    seed: int | None = None,
) -> EIGResult:
    """Put a certified interval around a result: by its trained flow, or by prior draws where nothing was trained.

    Args:
        result: What `eig_flow`, `optimise_design`, `amortise_eig(...).at` or an estimator that learns nothing, such as
            `eig_nmc`, returned, for a model whose outcome has a density. Prior draws do where the information is modest
            (`nested_certificate`). With nuisance sites: what `eig_flow(certify=True)` returned.
        width: Width asked for, nats.
        confidence: Probability with which the interval (over a batch of designs: all intervals together) holds the
            truth.
        max_simulations: Budget of simulated experiments, inner draws included, at each design.
        seed: As in `eig_flow`.

    Returns:
        The same result with `certificate` (and so `interval`) filled in.

    Raises:
        ValueError: If what was learned is no density of the targets, or width, confidence or budget are out of range.
        NotImplementedError: If the outcome has no density, or a nuisance site none that can be learned.
        ArithmeticError: If a term is not finite.

    Example:
        >>> from pyro_voed.estimators import eig_nmc
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = certify(eig_nmc(linear_gaussian(), "y", "theta", seed=0), seed=0)
        >>> low, high = result.interval.tolist()
        >>> low < 1.1989 < high, high - low < 0.06  # the exact value
        (True, True)
    """
    if isinstance(result, DesignResult):
        result = result.final
    if not isinstance(result, EIGResult):
        raise TypeError(f"result: expected an EIGResult or DesignResult, got {type(result).__name__}.")
    learned = result.learned
    if learned is not None and not (learned.of_targets and hasattr(learned.density, "condition")):
        raise ValueError(
            "result: what it learned is no density of the targets to use as proposal. Use eig_flow's result, or that "
            "of eig_nmc or eig_pce, for which prior draws are the proposal."
        )
    check_request(width, confidence, max_simulations)
    with isolated(seed):
        return certified(result, width, confidence, max_simulations)


def max_regret(result: EIGResult) -> tuple[Tensor, int]:
    """Return a bound on what choosing the best certified design may cost, and which design that is.

    Args:
        result: A certified result over a one-dimensional batch of candidate designs.

    Returns:
        `max over designs of upper - lower of the chosen`, nats, which holds with the certificate's confidence, and the
        index of the chosen design, the one with the largest lower end.

    Example:
        >>> from pyro_voed.estimators import eig_nmc
        >>> from pyro_voed.problems.finite import finite
        >>> result = eig_nmc(finite(), "y", designs={"xi": torch.tensor([0.5, 1.0])}, seed=0)
        >>> max_regret(certify(result, seed=0))[1]
        1
    """
    if result.interval is None:
        raise ValueError("result: it has no certified interval. Call certify first.")
    lower, upper = result.interval[0].reshape(-1), result.interval[1].reshape(-1)
    chosen = int(lower.argmax())
    return upper.max() - lower[chosen], chosen


def check_request(width: float, confidence: float, max_simulations: int) -> None:
    """Raise where a certificate is asked for that cannot be given."""
    check_positive(width, "width")
    check_count(max_simulations, "max_simulations", FEWEST_SIMULATIONS)
    if not 0.5 <= confidence < 1.0:
        raise ValueError(f"confidence: expected a probability in [0.5, 1), got {confidence!r}.")


def certified(
    result: EIGResult, width: float = 0.05, confidence: float = 0.95, max_simulations: int = MOST_SIMULATIONS
) -> EIGResult:
    """Certify a result inside `isolated`."""
    started, experiment = time.perf_counter(), experiment_of(result)
    calls = experiment.num_calls
    learned = result.learned
    (needs.likelihood if learned is None else needs.certifiable)(experiment, "a certificate")
    if experiment.nuisance and learned is not None and learned.nuisance is None:
        raise NotImplementedError(
            f"a certificate needs a density of the nuisance sites {list(result.nuisance_labels)}, which was not "
            "learned. Call eig_flow(..., certify=True) at the same designs, and certify for other widths after it."
        )
    batch = design_batch_shape(experiment, result.designs)
    miss = (1.0 - confidence) / (2 * batch.numel())
    quantile = math.sqrt(2.0) * float(torch.erfinv(torch.tensor(1.0 - 2.0 * miss, dtype=torch.float64)))
    asked = Request(width, quantile, max_simulations)
    member = iter(range(batch.numel()))

    def one(own: dict[str, Tensor]) -> Sides:
        if learned is None:
            return nested_sides(experiment, own, asked)
        return levels_of(experiment, own, learned, next(member)).sides(asked)

    sides = at_each_design(experiment, result.designs, one)
    if disagreement := next((side.disagreement for side in sides if side.disagreement), ""):
        warn(f"nothing is certified: {disagreement}. Correct the distribution, or give it the support of its draws.")
    certificate = _certificate(experiment, sides, batch, confidence, asked)
    certificate = replace(
        certificate, num_simulations=experiment.num_calls - calls, seconds=time.perf_counter() - started
    )
    return replace(
        result,
        certificate=certificate,
        num_simulations=result.num_simulations + certificate.num_simulations,
        seconds=result.seconds + certificate.seconds,
    )


def _certificate(
    experiment: Experiment, sides: list[Sides], batch: torch.Size, confidence: float, asked: Request
) -> Certificate:
    like: dict[str, Any] = {"dtype": experiment.dtype, "device": experiment.device}
    gather = lambda field: torch.tensor([getattr(side, field) for side in sides], **like).reshape(batch)  # noqa: E731
    lower, upper, tail = gather("lower"), gather("upper"), gather("tail")
    margins = asked.quantile * gather("lower_error"), asked.quantile * gather("upper_error")
    interval = torch.stack([lower - margins[0], upper + margins[1]])
    return Certificate(
        interval=interval,
        confidence=confidence,
        lower=lower,
        lower_standard_error=gather("lower_error"),
        upper=upper,
        upper_standard_error=gather("upper_error"),
        pareto_k=tail,
        certified=bool((tail <= HEAVY_TAIL).all()) and not any(side.disagreement for side in sides),
        disagreement=next((side.disagreement for side in sides if side.disagreement), ""),
        width_reached=bool((interval[1] - interval[0] <= asked.width).all()),
        num_flow_samples=tuple(side.plan.num_flow for side in sides),
        num_outer_samples=tuple(side.plan.num_outer for side in sides),
        num_inner_samples=tuple(side.plan.num_inner for side in sides),
        num_simulations=0,
        seconds=0.0,
    )


def levels_of(experiment: Experiment, designs: Mapping[str, Tensor], learned: Learned, member: int) -> Levels:
    """Return the two levels at one design, which is a member of the batch that was learned from."""
    density, controls = member_density(learned.density, member), score_controls(experiment, designs)
    if not experiment.nuisance:
        return Levels(experiment, designs, density, controls)
    return NuisanceLevels(experiment, designs, density, controls, nuisance=learned.nuisance)

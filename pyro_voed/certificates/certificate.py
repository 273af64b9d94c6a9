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

Bounds hold for the densities that the model states. Where its draws clearly do not follow these the interval is
returned "uncertified" too, with the reason (`consistency`).

References:
    Foster et al. (2019, 2020) as in `importance`; Giles (2015), "Multilevel Monte Carlo methods"; Vehtari et al.
    (2024), "Pareto smoothed importance sampling".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_voed.bounds.barber_agakov import ba_terms
from pyro_voed.bounds.importance import ace_terms, vnmc_terms
from pyro_voed.certificates.consistency import (
    FEWEST_PRIOR_DRAWS,
    prior_disagrees,
    prior_draws,
    share_terms,
    shares_disagree,
)
from pyro_voed.certificates.nested_certificate import nested_sides
from pyro_voed.certificates.score_controls import NUM_PROBES, score_controls
from pyro_voed.certificates.sides import Plan, Request, Sides
from pyro_voed.checks import check_count, check_positive, warn
from pyro_voed.densities.stacked import member_density
from pyro_voed.experiment import needs
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.designs import at_each_design, design_batch_shape
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.experiment.weighting import DEFENSIVE_SHARE, Weights, design_context, weighted_terms
from pyro_voed.monte_carlo import HEAVY_TAIL, controlled_terms, mean_and_standard_error, pareto_k
from pyro_voed.results import Certificate, DesignResult, EIGResult, experiment_of

PILOT_OUTER = 500
PILOT_INNER = 16
FEWEST_OUTER = 500
MOST_OUTER_FOR_TAIL = 20_000
MOST_SIMULATIONS_FOR_TAIL = 2_000_000
"""Most outer draws, and simulations, that go into seeing the end of a tail, the width asked for not needing them."""

WIDE = 1.5
"""An interval this many times as wide as asked for is made anew, longer: one rare draw can do that to a short one."""

MOST_INNER = 4_096
FLOW_CHUNK = 8_192
MOST_SIMULATIONS = 20_000_000
INNER_COST = 1.0 + 1.3 * DEFENSIVE_SHARE
"""Simulations for one inner draw: a draw from the prior's share takes one more, and their number is random."""

Controls = Callable[[Tensor], Tensor]
"""Controls of expectation zero from packed targets; see `score_controls`."""

FEWEST_SIMULATIONS = 2 * (NUM_PROBES + FEWEST_PRIOR_DRAWS) + math.ceil(
    (PILOT_OUTER + FEWEST_OUTER) * (1 + INNER_COST * PILOT_INNER) + FEWEST_OUTER
)


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
            `eig_nmc`, returned, for a model whose outcome has a density and whose targets are all its latents. Prior
            draws do where the information is modest (`nested_certificate`).
        width: Width asked for, nats.
        confidence: Probability with which the interval (over a batch of designs: all intervals together) holds the
            truth.
        max_simulations: Budget of simulated experiments, inner draws included, at each design.
        seed: As in `eig_flow`.

    Returns:
        The same result with `certificate` (and so `interval`) filled in.

    Raises:
        ValueError: If what was learned is no density of the targets, or width, confidence or budget are out of range.
        NotImplementedError: If the outcome has no density, or there are nuisance sites.
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
        >>> result = eig_nmc(finite(), "y", designs={"xi": torch.tensor([0.1, 1.0])}, seed=0)
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


CERTIFIABLE = (needs.likelihood_anywhere,)
"""What a certificate by a trained density needs."""


def certified(
    result: EIGResult, width: float = 0.05, confidence: float = 0.95, max_simulations: int = MOST_SIMULATIONS
) -> EIGResult:
    """Certify a result inside `isolated`."""
    started, experiment = time.perf_counter(), experiment_of(result)
    calls = experiment.num_calls
    for need in CERTIFIABLE if result.learned is not None else (needs.likelihood,):
        need(experiment, "a certificate")
    batch = design_batch_shape(experiment, result.designs)
    miss = (1.0 - confidence) / (2 * batch.numel())
    quantile = math.sqrt(2.0) * float(torch.erfinv(torch.tensor(1.0 - 2.0 * miss, dtype=torch.float64)))
    asked = Request(width, quantile, max_simulations)
    member = iter(range(batch.numel()))

    def one(own: dict[str, Tensor]) -> Sides:
        if result.learned is None:
            return nested_sides(experiment, own, asked)
        return _from_density(experiment, own, member_density(result.density, next(member)), asked)

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


def _from_density(experiment: Experiment, designs: Mapping[str, Tensor], density: Any, asked: Request) -> Sides:
    before = experiment.num_calls
    levels = _Levels(experiment, designs, density, score_controls(experiment, designs))
    return levels.sides(asked, experiment.num_calls - before)


@dataclass(frozen=True)
class _Levels:
    """Both levels at one design, with a trained density as proposal."""

    experiment: Experiment
    designs: Mapping[str, Tensor]
    density: Any
    controls: Controls

    def sides(self, asked: Request, spent: int) -> Sides:
        """Return both sides within what is left of the budget, made anew from more draws where that is called for."""
        before, checked = self.experiment.num_calls - spent, prior_draws(asked.max_simulations)
        budget = asked.max_simulations - 2 * checked
        plan = self._plan(asked._replace(max_simulations=budget - spent))
        found = self._sides(plan)
        longer = _longer(plan, budget - (self.experiment.num_calls - before))
        if (found.tail > HEAVY_TAIL or found.width(asked.quantile) > WIDE * asked.width) and longer is not None:
            found = self._sides(longer)
        disagreement = prior_disagrees(self.experiment, self.designs, checked)
        return replace(found, disagreement=disagreement or found.disagreement)

    def _terms(self, num_outer: int, num_inner: int) -> tuple[Tensor, ...]:
        """Return ACE, VNMC and Barber-Agakov terms, and the shares of weights, at the same outer draws."""

        def terms(weights: Weights) -> tuple[Tensor, ...]:
            return (
                ace_terms(weights.log_likelihood, weights.own, weights.inner),
                vnmc_terms(weights.log_likelihood, weights.inner),
                ba_terms(weights.log_q, weights.log_prior),
                share_terms(weights.own, weights.inner),
            )

        return weighted_terms(self.experiment, self.designs, self.density, num_outer, num_inner, terms)

    def _plan(self, asked: Request) -> Plan:
        """Choose sizes: a third of the width for the gap between the bounds, the rest for the two standard errors."""
        width, quantile, max_simulations = asked
        before = self.experiment.num_calls
        lower, upper, flow, _ = self._terms(PILOT_OUTER, PILOT_INNER)
        gap = (upper - lower).mean().clamp_min(0.0).item()
        # The gap falls at least like 1 / L while the weights' variance is finite.
        num_inner = min(MOST_INNER, max(PILOT_INNER, math.ceil(PILOT_INNER * gap / (width / 3.0))))
        variance_flow, fewest_flow = self._flow_variance(flow, max_simulations)
        variance_added = torch.maximum((lower - flow).double().var(), (upper - flow).double().var()).item()
        # A fifth is kept in hand, because the pilot's variances are estimates.
        allowed = (0.8 * (2.0 / 3.0) * width / (2.0 * quantile)) ** 2
        cost_flow, cost_added = 1.0, 1.0 + INNER_COST * num_inner
        # Lagrange: draws in proportion to sqrt(variance / cost), scaled until the variances add up to what is allowed.
        scale = (math.sqrt(variance_flow * cost_flow) + math.sqrt(variance_added * cost_added)) / allowed
        num_flow = max(fewest_flow, math.ceil(scale * math.sqrt(variance_flow / cost_flow)))
        num_outer = max(FEWEST_OUTER, math.ceil(scale * math.sqrt(variance_added / cost_added)))
        left = max_simulations - max(PILOT_OUTER * (1 + INNER_COST * PILOT_INNER), self.experiment.num_calls - before)
        spent = num_flow + num_outer * (1 + INNER_COST * num_inner)
        if spent > left:
            # Fewer of all draws; where that would leave too few outer ones, fewer inner ones.
            num_flow = max(FEWEST_OUTER, int(num_flow * left / spent))
            num_outer = max(FEWEST_OUTER, int(num_outer * left / spent))
            num_inner = min(num_inner, max(PILOT_INNER, int(((left - num_flow) / num_outer - 1) / INNER_COST)))
            num_flow = max(FEWEST_OUTER, min(num_flow, int(left - num_outer * (1 + INNER_COST * num_inner))))
        return Plan(num_flow, num_outer, num_inner)

    def _flow_variance(self, flow: Tensor, max_simulations: int) -> tuple[float, int]:
        """Return the variance of the flow's terms once controlled, and the fewest draws for which controls are fitted.

        Where so many draws are no small part of the budget it is that of the pilot's plain terms.
        """
        sample = sample_joint(self.experiment, 2, self.designs, controls=True)
        assert sample.controls is not None  # asked for above
        size = max(FEWEST_OUTER, 100 * (sample.controls.shape[-1] + self.controls(sample.theta).shape[-1]))
        if 100 * size > max_simulations:
            return flow.double().var().item(), FEWEST_OUTER
        return self._flow_terms(size).double().var().item(), size

    def _sides(self, plan: Plan) -> Sides:
        flow = self._flow_terms(plan.num_flow)
        lower, upper, own, shares = self._terms(plan.num_outer, plan.num_inner)
        base, base_error = mean_and_standard_error(flow)
        below, below_error = mean_and_standard_error(lower - own)
        above, above_error = mean_and_standard_error(upper - own)
        # Tails are judged on the terms whose mean is taken; differences of a perfect flow are rounding, and have none.
        tails = pareto_k(torch.stack([lower - own, upper - own], -1))
        negligible = torch.stack([below_error, above_error]) < 0.01 * base_error
        tail = torch.where(negligible, torch.full_like(tails, -torch.inf), tails).max()
        return Sides(
            lower=float(base.double() + below.double()),
            lower_error=float(torch.hypot(base_error, below_error)),
            upper=float(base.double() + above.double()),
            upper_error=float(torch.hypot(base_error, above_error)),
            tail=float(torch.maximum(tail, pareto_k(flow))),
            plan=plan,
            disagreement=shares_disagree(shares),
        )

    def _flow_terms(self, num_samples: int) -> Tensor:
        """Return the flow's Barber-Agakov terms, less what stated entropies and the prior's score explain of them."""
        terms, stated, scored = [], [], []
        for start in range(0, num_samples, FLOW_CHUNK):
            sample = sample_joint(self.experiment, min(FLOW_CHUNK, num_samples - start), self.designs, controls=True)
            context = design_context(self.experiment, self.designs, self.density, sample.y)
            assert sample.controls is not None  # asked for above
            assert sample.log_prior is not None  # checked at the door
            terms.append(ba_terms(self.density.log_prob(sample.theta, context), sample.log_prior))
            stated.append(sample.controls)
            scored.append(self.controls(sample.theta))
        columns = torch.cat([torch.cat(stated), torch.cat(scored)], -1)
        # Where the draws are too few for all of them, those from entropies alone, which are fewer.
        few = num_samples < 100 * columns.shape[-1]
        joined = controlled_terms(torch.cat(terms), torch.cat(stated) if few else columns)
        bad = int((~torch.isfinite(joined)).sum())
        if bad:
            raise ArithmeticError(f"a certificate: {bad} of {num_samples} terms of the flow are not finite.")
        return joined


def _longer(plan: Plan, left: int) -> Plan | None:
    """Return the plan with enough outer draws to see the end of a tail; None where the budget has not twice as many.

    A body with rare draws far out (outcomes that the flow has hardly met) looks heavy while the largest `3 sqrt(n)`
    terms reach into the body: on a regression with an unknown noise scale the index of VNMC's terms fell from 1.15 at
    1,500 draws to 0.13 at 24,000. A tail that is heavy stays so.
    """
    room = min(left, MOST_SIMULATIONS_FOR_TAIL)
    # The flow's own terms have the same rare draws, at a simulation each.
    num_flow = max(plan.num_flow, min(5 * MOST_OUTER_FOR_TAIL, room // 4))
    num_outer = min(MOST_OUTER_FOR_TAIL, int((room - num_flow) / (1 + INNER_COST * plan.num_inner)))
    return Plan(num_flow, num_outer, plan.num_inner) if num_outer >= 2 * plan.num_outer else None

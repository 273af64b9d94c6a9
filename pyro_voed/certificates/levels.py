"""Both sides at one design by a trained density, from two levels of draws; `certificate` says how they add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
from pyro_voed.certificates.score_controls import NUM_PROBES
from pyro_voed.certificates.sides import Plan, Request, Sides
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.experiment.weighting import DEFENSIVE_SHARE, Weights, design_context, weighted_terms
from pyro_voed.monte_carlo import HEAVY_TAIL, controlled_terms, mean_and_standard_error, pareto_k

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
INNER_COST = 1.0 + 1.3 * DEFENSIVE_SHARE
"""Simulations for one inner draw: a draw from the prior's share takes one more, and their number is random."""

Controls = Callable[[Tensor], Tensor]
"""Controls of expectation zero from packed targets; see `score_controls`."""

FEWEST_SIMULATIONS = 2 * (NUM_PROBES + FEWEST_PRIOR_DRAWS) + math.ceil(
    (PILOT_OUTER + FEWEST_OUTER) * (1 + INNER_COST * PILOT_INNER) + FEWEST_OUTER
)


@dataclass(frozen=True)
class Levels:
    """Both levels at one design, with a trained density as proposal."""

    experiment: Experiment
    designs: Mapping[str, Tensor]
    density: Any
    controls: Controls

    inner_cost: ClassVar[float] = INNER_COST

    def sides(self, asked: Request) -> Sides:
        """Return both sides within the budget, made anew from more draws where that is called for."""
        before, checked = self.experiment.num_calls, prior_draws(asked.max_simulations)
        # The controls have been probed.
        budget = asked.max_simulations - 2 * (checked + NUM_PROBES)
        plan = self._plan(asked._replace(max_simulations=budget))
        found = self._sides(plan)
        longer = self._longer(plan, budget - (self.experiment.num_calls - before))
        if (found.tail > HEAVY_TAIL or found.width(asked.quantile) > WIDE * asked.width) and longer is not None:
            found = self._sides(longer)
        disagreement = prior_disagrees(self.latents(), self.designs, checked)
        return replace(found, disagreement=disagreement or found.disagreement)

    def latents(self) -> Experiment:
        """Return the experiment whose stated prior is checked."""
        return self.experiment

    def terms(self, num_outer: int, num_inner: int) -> tuple[Tensor, ...]:
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
        lower, upper, flow, _ = self.terms(PILOT_OUTER, PILOT_INNER)
        gap = (upper - lower).mean().clamp_min(0.0).item()
        # The gap falls at least like 1 / L while the weights' variance is finite.
        num_inner = min(MOST_INNER, max(PILOT_INNER, math.ceil(PILOT_INNER * gap / (width / 3.0))))
        variance_flow, fewest_flow = self._flow_variance(flow, max_simulations)
        variance_added = torch.maximum((lower - flow).double().var(), (upper - flow).double().var()).item()
        # A fifth is kept in hand, because the pilot's variances are estimates.
        allowed = (0.8 * (2.0 / 3.0) * width / (2.0 * quantile)) ** 2
        cost_flow, cost_added = 1.0, 1.0 + self.inner_cost * num_inner
        # Lagrange: draws in proportion to sqrt(variance / cost), scaled until the variances add up to what is allowed.
        scale = (math.sqrt(variance_flow * cost_flow) + math.sqrt(variance_added * cost_added)) / allowed
        num_flow = max(fewest_flow, math.ceil(scale * math.sqrt(variance_flow / cost_flow)))
        num_outer = max(FEWEST_OUTER, math.ceil(scale * math.sqrt(variance_added / cost_added)))
        left = max_simulations - max(
            PILOT_OUTER * (1 + self.inner_cost * PILOT_INNER), self.experiment.num_calls - before
        )
        spent = num_flow + num_outer * (1 + self.inner_cost * num_inner)
        if spent > left:
            # Fewer of all draws; where that would leave too few outer ones, fewer inner ones.
            num_flow = max(FEWEST_OUTER, int(num_flow * left / spent))
            num_outer = max(FEWEST_OUTER, int(num_outer * left / spent))
            num_inner = min(num_inner, max(PILOT_INNER, int(((left - num_flow) / num_outer - 1) / self.inner_cost)))
            num_flow = max(FEWEST_OUTER, min(num_flow, int(left - num_outer * (1 + self.inner_cost * num_inner))))
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
        lower, upper, own, shares = self.terms(plan.num_outer, plan.num_inner)
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

    def _longer(self, plan: Plan, left: int) -> Plan | None:
        """Return the plan with outer draws to see the end of a tail; None where the budget has not twice as many.

        A body with rare draws far out (outcomes that the flow has hardly met) looks heavy while the largest `3 sqrt(n)`
        terms reach into the body: on a regression with an unknown noise scale the index of VNMC's terms fell from 1.15
        at 1,500 draws to 0.13 at 24,000. A tail that is heavy stays so.
        """
        room = min(left, MOST_SIMULATIONS_FOR_TAIL)
        # The flow's own terms have the same rare draws, at a simulation each.
        num_flow = max(plan.num_flow, min(5 * MOST_OUTER_FOR_TAIL, room // 4))
        num_outer = min(MOST_OUTER_FOR_TAIL, int((room - num_flow) / (1 + self.inner_cost * plan.num_inner)))
        return Plan(num_flow, num_outer, plan.num_inner) if num_outer >= 2 * plan.num_outer else None

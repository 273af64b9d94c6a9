"""Both sides of a certificate from prior draws alone: no density is trained.

Where the information is modest, draws from the prior are proposal enough. With M inner draws from the prior, shared by
the outer draws of one block, each outer draw gives at once a term of nested Monte Carlo, biased upwards, and one of
prior contrastive estimation, biased downwards (`bounds.nested`). The terms of a block depend on each other through its
inner draws, so standard errors are those of the means of independent blocks, with Student's quantile for their number.
A pilot chooses the sizes. The cost is that of N M scored pairs; the number of inner draws that a given gap takes grows
like the exponential of the information, so that beyond some four nats a trained flow is the better proposal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_voed.bounds.nested import nmc_terms, pce_terms
from pyro_voed.certificates.consistency import GROUP_SIZE, NUM_GROUPS, outcomes_disagree
from pyro_voed.certificates.sides import Plan, Request, Sides
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import run_controls
from pyro_voed.experiment.pairs import log_sums
from pyro_voed.experiment.programs import run_rows
from pyro_voed.experiment.scoring import outcome_log_likelihood
from pyro_voed.monte_carlo import controlled_terms, mean_and_standard_error, pareto_k

NUM_BLOCKS = 64
PILOT_OUTER, PILOT_INNER = 4_096, 1_024
FEWEST_OUTER = 1_024
FEWEST_INNER = 1_024
"""With few inner draws the upper terms of outcomes that no draw explains have long tails."""
MOST_PAIRS = 10**10
"""Largest number of outer times inner draws at one design."""

GAP_SHARE = 0.3
"""Part of the width left to the gap between the two biases; the rest is for the two standard errors."""


def nested_sides(experiment: Experiment, designs: Mapping[str, Tensor], asked: Request) -> Sides:
    """Return both sides at one design from prior draws, their standard errors fit for the normal quantile."""
    plan = _plan(experiment, designs, asked)
    blocks = [_block(experiment, designs, plan.num_outer // NUM_BLOCKS, plan.num_inner) for _ in range(NUM_BLOCKS)]
    lower, upper, controls = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    # Student's quantile for this many blocks over the normal one, to first order (Cornish and Fisher).
    inflation = 1.0 + (asked.quantile**2 + 1.0) / (4.0 * (NUM_BLOCKS - 1))
    sides = [controlled_terms(side, controls) for side in (lower, upper)]
    means = [mean_and_standard_error(side.reshape(NUM_BLOCKS, -1).mean(1)) for side in sides]
    return Sides(
        lower=float(means[0][0]),
        lower_error=inflation * float(means[0][1]),
        upper=float(means[1][0]),
        upper_error=inflation * float(means[1][1]),
        tail=float(pareto_k(torch.stack(sides, -1)).max()),
        plan=plan,
        disagreement=outcomes_disagree(experiment, designs),
    )


def _plan(experiment: Experiment, designs: Mapping[str, Tensor], asked: Request) -> Plan:
    """Choose the numbers of outer draws, in all, and of inner draws, in each block."""
    width, quantile, max_simulations = asked
    lower, upper, controls = _block(experiment, designs, PILOT_OUTER, PILOT_INNER)
    gap = float((upper - lower).mean())
    # Both biases fall like 1 / M once M is beyond the exponential of the information.
    num_inner = max(FEWEST_INNER, math.ceil(1.2 * PILOT_INNER * gap / (GAP_SHARE * width)))
    variances = [float(controlled_terms(side, controls).double().var()) for side in (lower, upper)]
    # The upper terms spread the more the fewer inner draws there are.
    variance = max(variances) * max(1.0, PILOT_INNER / num_inner)
    allowed = 0.9 * (1.0 - GAP_SHARE) * width / (2.0 * quantile)
    num_outer = max(FEWEST_OUTER, math.ceil(variance / allowed**2))
    left = max_simulations - PILOT_OUTER - PILOT_INNER - NUM_GROUPS * GROUP_SIZE
    num_inner = min(num_inner, max(FEWEST_INNER, left // (2 * NUM_BLOCKS)))
    num_outer = min(num_outer, max(FEWEST_OUTER, left - NUM_BLOCKS * num_inner))
    if num_outer * num_inner > MOST_PAIRS:
        num_outer = max(FEWEST_OUTER, MOST_PAIRS // num_inner)
        num_inner = min(num_inner, MOST_PAIRS // num_outer)
    return Plan(0, NUM_BLOCKS * math.ceil(num_outer / NUM_BLOCKS), num_inner)


def _block(
    experiment: Experiment, designs: Mapping[str, Tensor], num_outer: int, num_inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms of the lower and the upper side, and controls, of outer draws that share their inner draws."""
    outer = run_rows(experiment.program, num_outer, experiment.shapes, designs=designs)
    inner = run_rows(experiment.program, num_inner, experiment.shapes, designs=designs)
    outcomes = {site.name: outer.value(site.name) for site in experiment.observations}
    own = outcome_log_likelihood(outer, experiment)
    sums = log_sums(experiment, designs, outcomes, inner)
    upper, lower = nmc_terms(own, sums, num_inner), pce_terms(own, sums, num_inner, own)
    if not (torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        bad = int((~torch.isfinite(upper)).sum())
        raise ArithmeticError(
            f"a certificate from prior draws: {bad} of {num_outer} outcomes have density 0 under all of {num_inner} "
            "inner draws, so the upper side is infinite. Certify a trained flow (eig_flow) instead."
        )
    return lower, upper, run_controls(experiment, outer)

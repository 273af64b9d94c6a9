"""Estimators at a budget: what each makes of so many simulated experiments.

An *estimator at a budget* is any callable

    (model, observation_labels, target_labels, *, budget, seed) -> EIGResult

and `at_budget` makes one of an `eig_*` function and a rule that turns a budget B into its sizes (`pooled`,
`nested_low`, ...). The library's own are `ESTIMATORS`.

References:
    Rainforth, Cornish, Yang, Warrington and Wood (2018), "On nesting Monte Carlo estimators", for the cube root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pyro_voed.checks import Labels, check_count
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.estimators import (
    eig_ace,
    eig_flow,
    eig_laplace,
    eig_marginal,
    eig_marginal_likelihood,
    eig_nmc,
    eig_pce,
    eig_vnmc,
)
from pyro_voed.estimators.critic import eig_critic
from pyro_voed.estimators.lbkld import eig_lbkld
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.results import EIGResult
from pyro_voed.training import Pool

SMALLEST_BUDGET = 100
NEWTON_STEPS = 10

EstimatorAtBudget = Callable[..., EIGResult]
"""What `compare_estimators` calls; the arguments are those at the head of this file."""


def at_budget(estimate: Callable[..., EIGResult], sizes: Callable[[int], Mapping[str, Any]]) -> EstimatorAtBudget:
    """Make an estimator at a budget of an `eig_*` function and a rule that turns a budget into its sizes.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> small = partial(AffineCouplingFlow, num_transforms=1, hidden_dim=16)
        >>> mine = at_budget(partial(eig_flow, density=small), pooled)
        >>> mine(linear_gaussian(), "y", budget=1_000, seed=0).bound
        'lower'
    """

    def run(
        model: Callable[..., Any] | Experiment,
        observation_labels: Labels = None,
        target_labels: Labels = None,
        *,
        budget: int,
        seed: int | None = None,
    ) -> EIGResult:
        check_count(budget, "budget", SMALLEST_BUDGET)
        return estimate(model, observation_labels, target_labels, seed=seed, **sizes(budget))

    return run


def pooled(budget: int) -> dict[str, Any]:
    """Return sizes of an estimator that learns from a pool: four fifths to learn, the rest to evaluate."""
    return _pooled(round(0.8 * budget)) | {"num_samples": budget - round(0.8 * budget)}


def with_proposal(budget: int) -> dict[str, Any]:
    """Return sizes of an estimator with a learned proposal: half to learn it, the rest for outer and inner draws."""
    left = budget - budget // 2
    # With a good proposal few inner draws do, and the variance is that of the outer ones.
    num_inner = max(2, round(left**0.25))
    # A tenth of the inner draws come from the prior, and cost a run to draw as well as one to score.
    outer = max(2, round(left / (1 + 1.1 * num_inner)))
    return _pooled(budget // 2) | {"num_samples": outer, "num_inner_samples": num_inner}


def _pooled(pool: int) -> dict[str, Any]:
    # A hundred steps for each pass over a large pool are enough, and larger batches are cheaper by the row.
    return {"training": Pool(pool, batch_size=min(1_024, max(256, pool // 100))), "progress": False}


def nested_low(budget: int) -> dict[str, Any]:
    """Return sizes of nested Monte Carlo with M about B^(1/3) inner draws for each outer one: N (M + 1) = B.

    So bias and standard error fall at the same rate, which is the best one as the budget grows.
    """
    return _nested(budget, round(budget ** (1 / 3)))


def nested_high(budget: int) -> dict[str, Any]:
    """Return sizes of nested Monte Carlo with M about B^(1/2) inner draws, for less bias and more variance."""
    return _nested(budget, round(budget**0.5))


def reused(budget: int) -> dict[str, Any]:
    """Return sizes of nested Monte Carlo whose N = B outer draws serve as inner ones too: B^2 densities."""
    return {"num_outer_samples": budget, "num_inner_samples": None}


def repeated(budget: int) -> dict[str, Any]:
    """Return sizes of the nearest-neighbour bound: three experiments at each draw of the targets."""
    # The estimator takes no fewer than 1,000 draws, so that budgets below 3,000 are exceeded.
    return {"num_samples": max(1_000, budget // 3)}


def newton(budget: int) -> dict[str, Any]:
    """Return sizes of the Laplace approximation: a run to draw and one for every density at a draw.

    A step takes up to seven runs, for it is halved until the density does not fall; where steps are short of that, as
    for posteriors near to Gaussian, far less than the budget is spent.
    """
    return {"num_newton_steps": NEWTON_STEPS, "num_samples": max(4, budget // (7 * NEWTON_STEPS + 4))}


ESTIMATORS: Mapping[str, EstimatorAtBudget] = {
    "flow": at_budget(eig_flow, pooled),
    "gaussian_flow": at_budget(partial(eig_flow, density=partial(AffineCouplingFlow, num_transforms=0)), pooled),
    "critic": at_budget(eig_critic, pooled),
    "lbkld": at_budget(eig_lbkld, repeated),
    "pce": at_budget(eig_pce, reused),
    "ace": at_budget(eig_ace, with_proposal),
    "vnmc": at_budget(eig_vnmc, with_proposal),
    "marginal": at_budget(eig_marginal, pooled),
    "nmc_low": at_budget(eig_nmc, nested_low),
    "nmc_high": at_budget(eig_nmc, nested_high),
    "nmc_reused": at_budget(eig_nmc, reused),
    "marginal_likelihood": at_budget(eig_marginal_likelihood, pooled),
    "laplace": at_budget(eig_laplace, newton),
}
"""The library's estimators at a budget: lower bounds, then upper ones, then those of no guaranteed side."""


def _nested(budget: int, num_inner: int) -> dict[str, Any]:
    return {"num_outer_samples": max(2, round(budget / (num_inner + 1))), "num_inner_samples": num_inner}

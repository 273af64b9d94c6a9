r"""Posterior predictive checks: would the model, as the posterior has it, simulate outcomes like the one observed?

Targets are drawn from the trained posterior of the outcome in hand and new outcomes from the model given them,

.. math:: \theta_l \sim q(\theta \mid y, \xi), \qquad \tilde y_l \sim p(y \mid \theta_l, \xi) ,

and a statistic :math:`T(y)` of the observed outcome is placed among the :math:`T(\tilde y_l)`. A value far in their
tail says that model and posterior together do not explain the outcome: unlike calibration, which takes the model to be
right, this looks at the data. The outcome is used twice, for the posterior and for the check, so p-values crowd towards
1/2 under the right model: small ones mean more than they say, large ones prove nothing.

References:
    D. B. Rubin (1984), Bayesianly justifiable and relevant frequency calculations for the applied statistician.
    Annals of Statistics 12.
    A. Gelman, X.-L. Meng and H. Stern (1996), Posterior predictive assessment of model fitness via realized
    discrepancies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_count, check_finite
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.programs import run_rows
from pyro_voed.inference.flow import DesignIndex, flow_posterior, trained_density
from pyro_voed.results import DesignResult, EIGResult

Statistic = Callable[[Mapping[str, Tensor]], Tensor]
"""From outcome values `(batch, *shape)` by site to one number for each, `(batch,)`."""


@dataclass(frozen=True)
class PredictiveCheckResult:
    """Statistics of the observed outcome among those of outcomes simulated from the posterior.

    Attributes:
        names: Names of the statistics.
        observed: Their values at the observed outcome.
        draws: Their values at the simulated outcomes.
        quantile: Share of the simulated values below the observed one, equal ones counting half.
        p_values: Two-sided: twice the smaller of the chances of a value at least as small and at least as large, each
            with the observed one counted among the draws, at most 1.
    """

    names: tuple[str, ...]
    observed: Float[Tensor, " num_statistics"]
    draws: Float[Tensor, "num_draws num_statistics"]
    quantile: Float[Tensor, " num_statistics"]
    quantile_error: Float[Tensor, " num_statistics"]
    p_values: Float[Tensor, " num_statistics"]

    def __str__(self) -> str:
        lines = [f"posterior predictive check ({len(self.draws):,} simulated outcomes)"]
        width = max(len(name) for name in self.names)
        for index, name in enumerate(self.names):
            low, high = self.draws[:, index].quantile(self.draws.new_tensor([0.05, 0.95])).tolist()
            lines.append(
                f"{name:<{width}s}  observed {self.observed[index]:.4g}, predicted {low:.4g} to {high:.4g} (90 %), "
                f"quantile {self.quantile[index]:.3f} +- {self.quantile_error[index]:.3f}, "
                f"p = {self.p_values[index]:.2g}"
            )
        return "\n".join(lines)


def posterior_predictive_check(
    result: EIGResult | DesignResult,
    observations: Tensor | Mapping[str, Any],
    statistic: Statistic | Mapping[str, Statistic],
    num_draws: int = 500,
    *,
    design_index: DesignIndex = None,
    seed: int | None = None,
) -> PredictiveCheckResult:
    """Compare statistics of an outcome with their predictive distribution under its own posterior.

    Nuisance sites are drawn as the model draws them, given the targets before them, not from their posterior.

    Args:
        result: This, `observations` and `design_index`: as in `flow_posterior`.
        statistic: A function of outcome values `(batch, *shape)` by site that returns `(batch,)`, or several by name.
        num_draws: Outcomes to simulate, at least 20.

    Raises:
        TypeError: If a statistic cannot be called or returns no tensor.
        ValueError: As for `flow_posterior`, or if a statistic returns another shape.
        NotImplementedError: If a target is deterministic: the model cannot be run from it.
        ArithmeticError: If a statistic is not finite.

    Example:
        >>> from pyro_voed import Fresh, eig_flow
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
        >>> largest = {"largest": lambda outcome: outcome["y"].amax(-1)}
        >>> bool(posterior_predictive_check(result, torch.tensor([1.0, 2.0, 1.5]), largest, seed=0).p_values > 0.05)
        True
    """
    check_count(num_draws, "num_draws", minimum=20)
    statistics = dict(statistic) if isinstance(statistic, Mapping) else {"statistic": statistic}
    if not statistics:
        raise ValueError("statistic: expected at least one, got none.")
    for name, function in statistics.items():
        if not callable(function):
            raise TypeError(
                f"statistic: {name!r} is a {type(function).__name__}, expected a function of outcome values."
            )
    trained = trained_density(result, design_index)
    if fixed := [site.name for site in trained.experiment.targets if site.is_deterministic]:
        raise NotImplementedError(
            f"targets {fixed} are deterministic: outcomes cannot be simulated from their values. Make the sites that "
            "they are computed from the targets."
        )
    with isolated(seed), torch.no_grad(), pyro.validation_enabled(False):
        posterior = flow_posterior(result, observations, num_draws, design_index=design_index)
        # Values, not packed coordinates, are put in: so supports that depend on other targets need no rebuilding.
        rows = {name: posterior.flat(name) for name in posterior.values}
        run = run_rows(
            trained.experiment.program, num_draws, trained.experiment.shapes, designs=trained.designs, row_values=rows
        )
        simulated = {site.name: run.value(site.name) for site in trained.experiment.observations}
        seen = {name: value.unsqueeze(0) for name, value in posterior.observations.items()}
        observed = torch.cat([_evaluate(function, seen, 1, name) for name, function in statistics.items()])
        draws = torch.stack(
            [_evaluate(function, simulated, num_draws, name) for name, function in statistics.items()], -1
        )
    return _place(tuple(statistics), observed, draws)


def _evaluate(function: Statistic, values: Mapping[str, Tensor], num: int, name: str) -> Float[Tensor, " num"]:
    found = function(values)
    if not isinstance(found, Tensor):
        raise TypeError(f"statistic {name!r}: expected it to return a tensor, got {type(found).__name__}.")
    if found.shape != (num,):
        raise ValueError(
            f"statistic {name!r}: expected one number an outcome, shape ({num},), got {tuple(found.shape)}. Values "
            "have a leading batch dimension: reduce over the others."
        )
    check_finite(found, f"statistic {name!r}", ArithmeticError)
    return found.double()


def _place(
    names: tuple[str, ...], observed: Float[Tensor, " num_statistics"], draws: Float[Tensor, "num_draws num_statistics"]
) -> PredictiveCheckResult:
    """Return where observed statistics stand among simulated ones."""
    num = len(draws)
    at_most, at_least = (draws <= observed).sum(0).double(), (draws >= observed).sum(0).double()
    below = 0.5 * (at_most + num - at_least) / num
    # One success and one failure more than seen: the error of a share of 0 is not 0.
    smoothed = (below * num + 1) / (num + 2)
    tail = (torch.minimum(at_most, at_least) + 1) / (num + 1)
    return PredictiveCheckResult(
        names=names,
        observed=observed,
        draws=draws,
        quantile=below,
        quantile_error=(smoothed * (1 - smoothed)).sqrt() / math.sqrt(num),
        p_values=(2 * tail).clamp(max=1.0),
    )

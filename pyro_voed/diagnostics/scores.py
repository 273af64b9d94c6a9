r"""Scores of posteriors over simulated experiments: one number for density, one a column for point estimates.

The mean negative log posterior density of the truths,

.. math::
    \mathrm{NLP} = \mathrm{E}_{p(\theta, y)} [-\log q(\theta \mid y)]
    = \mathrm{E}\, H[p(\theta \mid y)] + \mathrm{E}_{p(y)} \mathrm{KL}(p(\theta \mid y) \,\|\, q(\theta \mid y)) ,

is least where :math:`q` is the posterior, and what two methods differ by is the difference of their mean divergences
from it, in nats. Its level means nothing by itself: it depends on the units of :math:`\theta`.

The normalised root mean square error of the posterior mean :math:`m(y)`,

.. math::
    \mathrm{NRMSE}_j = \frac{\sqrt{\mathrm{E}\, (m_j(y) - \theta_j)^2}}{\sqrt{\operatorname{var} \theta_j}} ,

is 1 for the prior mean and 0 for exact recovery. For the exact posterior its square is the share of the prior variance
that the experiment leaves, so it tells how informative the experiment is as much as how good the posterior is.

References:
    J.-M. Lueckmann et al. (2021), Benchmarking simulation-based inference. AISTATS, section 2.3.
    T. Gneiting and A. E. Raftery (2007), Strictly proper scoring rules, prediction, and estimation. Journal of the
    American Statistical Association 102, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.monte_carlo import mean_and_standard_error


@dataclass(frozen=True)
class NegativeLogPosteriorResult:
    """Mean negative log posterior density of the truths.

    Attributes:
        value: The mean in nats, of a density in packed coordinates; smaller is better.
        standard_error: Its Monte Carlo standard error, nats.
        num_simulations: Simulated experiments.
    """

    value: float
    standard_error: float
    num_simulations: int

    def __str__(self) -> str:
        return (
            f"negative log posterior {self.value:.4f} +- {self.standard_error:.4f} nats "
            f"({self.num_simulations:,} experiments)"
        )


@dataclass(frozen=True)
class NRMSEResult:
    """Root mean square error of the posterior mean, in prior standard deviations.

    Attributes:
        columns: Names of the columns.
        value: The error of each, `(dim,)`: 1 for the prior mean, 0 for exact recovery.
        standard_error: Its standard error over fresh experiments, `(dim,)`.
        num_simulations: Simulated experiments.
        num_draws: Posterior draws behind each mean.
    """

    columns: tuple[str, ...]
    value: Float[Tensor, " dim"]
    standard_error: Float[Tensor, " dim"]
    num_simulations: int
    num_draws: int

    def __str__(self) -> str:
        width = max(len(name) for name in self.columns)
        rows = zip(self.columns, self.value.tolist(), self.standard_error.tolist(), strict=True)
        lines = [f"{name:<{width}s}  NRMSE {value:.4f} +- {error:.4f} prior sd" for name, value, error in rows]
        return "\n".join([*lines, f"{self.num_simulations:,} experiments, {self.num_draws:,} draws each"])


def negative_log_posterior(simulated: SimulatedPosteriors) -> NegativeLogPosteriorResult:
    """Return the mean of `-log q(truth | y)`, in nats.

    Two results on the same experiments are compared by the mean difference of their `log_density`, whose error is
    smaller than either's.

    Args:
        simulated: At least two simulated experiments with the log densities of their truths.

    Raises:
        ValueError: If there are no log densities, or fewer than two experiments.
        ArithmeticError: If one is not finite.

    References:
        Lueckmann et al. (2021), section 2.3; Gneiting and Raftery (2007), section 4 (the logarithmic score).

    Example:
        >>> posteriors = SimulatedPosteriors(
        ...     torch.zeros(2, 1), torch.randn(2, 5, 1), ("theta",), log_density=torch.tensor([-1.0, -2.0])
        ... )
        >>> print(negative_log_posterior(posteriors))
        negative log posterior 1.5000 +- 0.5000 nats (2 experiments)
    """
    log_density = simulated.log_density
    if log_density is None:
        raise ValueError(
            "simulated: expected log densities of the truths, which draws alone do not give. Make it with "
            "simulate_posteriors, or pass log_density."
        )
    _check_several(simulated)
    bad = int((~torch.isfinite(log_density)).sum())
    if bad:
        raise ArithmeticError(
            f"the log densities of {bad} of {len(log_density)} truths are not finite: the posterior rules out what "
            "was true there, and the mean is no number."
        )
    mean, standard_error = mean_and_standard_error(-log_density)
    return NegativeLogPosteriorResult(mean.item(), standard_error.item(), simulated.num_simulations)


def nrmse(simulated: SimulatedPosteriors) -> NRMSEResult:
    r"""Return the root mean square error of the posterior mean in prior standard deviations, for each column.

    The prior standard deviation is that of the truths. Means of :math:`L` draws carry noise, which raises the value by
    a factor of about :math:`\sqrt{1 + 1/L}` where the posterior is exact. The standard error is that of the delta
    method: with :math:`r` the estimate, :math:`e_i` the errors and :math:`z_i` the truths less their mean, that of
    the mean of :math:`\tfrac r2 (e_i^2 / \overline{e^2} - z_i^2 / \overline{z^2})`.

    Args:
        simulated: At least two simulated experiments.

    Raises:
        ValueError: If there are fewer than two experiments, or the truths of a column are all equal.

    Example:
        >>> truths = torch.tensor([[-1.0], [1.0]])
        >>> nrmse(SimulatedPosteriors(truths, torch.zeros(2, 5, 1), ("theta",))).value  # the prior mean
        tensor([1.])
    """
    _check_several(simulated)
    truths = simulated.truths.double()
    squared_error = (simulated.draws.double().mean(1) - truths).square()
    squared_truth = (truths - truths.mean(0)).square()
    mean_error, variance = squared_error.mean(0), squared_truth.mean(0)
    constant = [name for name, spread in zip(simulated.columns, variance.tolist(), strict=True) if spread == 0]
    if constant:
        raise ValueError(f"truths: expected columns with spread, got {constant} constant. Leave them out.")
    value = (mean_error / variance).sqrt()
    # Multiplied out, so that errors of exactly 0 give 0 and not 0 / 0.
    terms = squared_error - mean_error / variance * squared_truth
    _, error = mean_and_standard_error(terms)
    slope = torch.where(value > 0, 0.5 / (value * variance), 0.0)
    dtype = simulated.truths.dtype
    return NRMSEResult(
        columns=simulated.columns,
        value=value.to(dtype),
        standard_error=(slope * error).to(dtype),
        num_simulations=simulated.num_simulations,
        num_draws=simulated.num_draws,
    )


def _check_several(simulated: SimulatedPosteriors) -> None:
    if simulated.num_simulations < 2:
        raise ValueError(
            f"simulated: expected at least 2 experiments for a standard error, got {simulated.num_simulations}."
        )

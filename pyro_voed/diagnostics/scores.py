r"""How probable posteriors find the truth, on average over simulated experiments: one number for the whole density.

The mean negative log posterior density of the truths,

.. math::
    \mathrm{NLP} = \mathrm{E}_{p(\theta, y)} [-\log q(\theta \mid y)]
    = \mathrm{E}\, H[p(\theta \mid y)] + \mathrm{E}_{p(y)} \mathrm{KL}(p(\theta \mid y) \,\|\, q(\theta \mid y)) ,

is least where :math:`q` is the posterior, and what two methods differ by is the difference of their mean divergences
from it, in nats. Its level means nothing by itself: it depends on the units of :math:`\theta`. How far off posterior
means are, `recovery` says.

References:
    J.-M. Lueckmann et al. (2021), Benchmarking simulation-based inference. AISTATS, section 2.3.
    T. Gneiting and A. E. Raftery (2007), Strictly proper scoring rules, prediction, and estimation. Journal of the
    American Statistical Association 102, section 4 (the logarithmic score).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.monte_carlo import mean_and_standard_error


@dataclass(frozen=True)
class NegativeLogPosteriorResult:
    """Mean negative log posterior density of the truths in packed coordinates, nats; smaller is better."""

    value: float
    standard_error: float
    num_simulations: int

    def __str__(self) -> str:
        return (
            f"negative log posterior {self.value:.4f} +- {self.standard_error:.4f} nats "
            f"({self.num_simulations:,} experiments)"
        )


def negative_log_posterior(simulated: SimulatedPosteriors) -> NegativeLogPosteriorResult:
    """Return the mean of `-log q(truth | y)`, nats, over at least two experiments with log densities of their truths.

    Two results on the same experiments are compared by the mean difference of their `log_density`, whose error is
    smaller than either's. A log density that is not finite is an ArithmeticError.

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
    if simulated.num_simulations < 2:
        raise ValueError(
            f"simulated: expected at least 2 experiments for a standard error, got {simulated.num_simulations}."
        )
    bad = int((~torch.isfinite(log_density)).sum())
    if bad:
        raise ArithmeticError(
            f"the log densities of {bad} of {len(log_density)} truths are not finite: the posterior rules out what "
            "was true there, and the mean is no number."
        )
    mean, standard_error = mean_and_standard_error(-log_density)
    return NegativeLogPosteriorResult(mean.item(), standard_error.item(), simulated.num_simulations)

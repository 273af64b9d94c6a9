r"""How much do posteriors learn of each quantity, and how far off are they?

Over simulated experiments with truths :math:`\theta^\star`, posterior means :math:`m` and variances :math:`v`, for each
column:

.. math::
    \rho = \mathrm{corr}(m, \theta^\star), \quad
    \mathrm{NRMSE} = \frac{\sqrt{\mathbb{E}(m - \theta^\star)^2}}{\mathrm{sd}(\theta^\star)}, \quad
    \mathrm{contraction} = 1 - \frac{\mathbb{E}\, v}{\mathrm{var}(\theta^\star)}, \quad
    z = \frac{\theta^\star - m}{\sqrt{v}} .

For the exact posterior the law of total variance ties the first three together: :math:`\mathrm{contraction} = \rho^2 =
1 - \mathrm{NRMSE}^2`. A contraction near 0 says that the data hold nothing about the quantity, or that nothing was
learned; below 0, that the posterior is wider than the prior, which the average over outcomes of an exact one never is.
Contraction above :math:`1 - \mathrm{NRMSE}^2` is that of a posterior too sure of itself. The z-scores have mean 0 and,
where posteriors are normal, standard deviation :math:`\sqrt{(1 + 1/L)(L - 1)/(L - 3)}`, near 1, with mean and variance
from :math:`L` draws.

None of these is a test of calibration (`calibration` is); they say how good a posterior is, not only how honest.

References:
    M. Betancourt (2018), Calibrating model-based inferences and decisions (z-scores and contraction).
    B. Efron (1982), The jackknife, the bootstrap and other resampling plans (standard errors).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_share
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.monte_carlo import mean_and_standard_error

FEWEST_SIMULATIONS = 5
"""Fisher's transform needs more than three."""


@dataclass(frozen=True)
class RecoveryResult:
    """How posteriors recover the truths of simulated experiments, column by column.

    Standard errors are by the jackknife, unless said otherwise.

    Attributes:
        truths: What the experiments were simulated with.
        posterior_mean: Posterior mean of each.
        interval: Central interval of posterior mass `mass` of each.
        correlation: Of posterior means with truths.
        correlation_error: Its standard error, by Fisher's transform: exact to first order for normal quantities.
        nrmse: Root mean squared error of the posterior mean, in standard deviations of the truths.
        contraction: One less the mean posterior variance over the truths' variance. Never clamped: it may be negative.
        z_mean: Mean of `(truth - posterior mean) / posterior sd`. Not finite where draws of some experiment are all
            equal.
        z_sd: Standard deviation of the same; above 1 the posterior is too narrow.
    """

    columns: tuple[str, ...]
    truths: Float[Tensor, "num_simulations dim"]
    posterior_mean: Float[Tensor, "num_simulations dim"]
    interval: Float[Tensor, "2 num_simulations dim"]
    mass: float
    correlation: Float[Tensor, " dim"]
    correlation_error: Float[Tensor, " dim"]
    nrmse: Float[Tensor, " dim"]
    nrmse_error: Float[Tensor, " dim"]
    contraction: Float[Tensor, " dim"]
    contraction_error: Float[Tensor, " dim"]
    z_mean: Float[Tensor, " dim"]
    z_mean_error: Float[Tensor, " dim"]
    z_sd: Float[Tensor, " dim"]
    z_sd_error: Float[Tensor, " dim"]

    def __str__(self) -> str:
        lines = [f"recovery of {len(self.columns)} quantities ({len(self.truths):,} experiments)"]
        width = max(len(name) for name in self.columns)
        shown = ("correlation", "nrmse", "contraction", "z_mean", "z_sd")
        for index, name in enumerate(self.columns):
            parts = [
                f"{field.replace('_', ' ').replace('nrmse', 'NRMSE')} {getattr(self, field)[index]:.3f} +- "
                f"{getattr(self, field + '_error')[index]:.3f}"
                for field in shown
            ]
            lines.append(f"{name:<{width}s}  {', '.join(parts)}")
        return "\n".join(lines)


def recovery(simulated: SimulatedPosteriors, *, mass: float = 0.9) -> RecoveryResult:
    """Compare posterior means and spreads with the truths they were simulated from.

    Args:
        simulated: At least 5 experiments with at least 4 posterior draws each, and truths with spread;
            `simulate_posteriors` makes them. The Monte Carlo error of a posterior mean, its variance over the number of
            draws, is part of NRMSE and z.
        mass: Posterior mass of the central intervals kept for the figure, in (0, 1).

    Example:
        >>> truths = torch.randn(1000, 1)
        >>> y = truths + torch.randn(1000, 1)
        >>> draws = 0.5 * y.unsqueeze(1) + 0.5**0.5 * torch.randn(1000, 100, 1)  # the posterior: N(y / 2, 1 / 2)
        >>> result = recovery(SimulatedPosteriors(truths, draws, ("theta",)))
        >>> bool((result.contraction - 0.5).abs() < 4 * result.contraction_error)
        True
    """
    _check(simulated, mass)
    truths, draws = simulated.truths.double(), simulated.draws.double()
    mean, variance = draws.mean(1), draws.var(1)
    tails = torch.tensor([0.5 - mass / 2, 0.5 + mass / 2], dtype=torch.float64, device=draws.device)
    error = mean - truths
    # Moments about 0 of large, narrow quantities would cancel; every statistic is the same after centring.
    centred = truths - truths.mean(0)
    moments = torch.stack([centred, centred.square(), error.square(), variance], -1)
    z = -error / variance.sqrt()
    correlation = _correlation(mean, truths)
    found = {
        "correlation": (correlation, (1 - correlation.square()) / math.sqrt(len(truths) - 3)),
        "nrmse": _jackknife(moments, lambda means: (means[..., 2] / _variance(means)).sqrt()),
        "contraction": _jackknife(
            moments, lambda means: 1 - means[..., 3] / (_variance(means) * len(truths) / (len(truths) - 1))
        ),
        "z_mean": mean_and_standard_error(z),
        "z_sd": _jackknife(
            torch.stack([z, z.square()], -1), lambda means: (_variance(means) * len(z) / (len(z) - 1)).sqrt()
        ),
    }
    return RecoveryResult(
        columns=simulated.columns,
        truths=simulated.truths,
        posterior_mean=mean,
        interval=torch.quantile(draws, tails, dim=1),
        mass=mass,
        **{name: value for name, (value, _) in found.items()},
        **{f"{name}_error": error for name, (_, error) in found.items()},
    )


def _check(simulated: SimulatedPosteriors, mass: float) -> None:
    for what, found, fewest in (
        ("experiments", simulated.num_simulations, FEWEST_SIMULATIONS),
        ("draws of each experiment", simulated.num_draws, 4),
    ):
        if found < fewest:
            raise ValueError(f"simulated: expected at least {fewest} {what}, got {found}.")
    check_share(mass, "mass")
    constant = (simulated.truths == simulated.truths[:1]).all(0).tolist()
    if any(constant):
        names = [name for name, flag in zip(simulated.columns, constant, strict=True) if flag]
        raise ValueError(f"simulated: expected truths with spread, got columns {names} constant. Leave them out.")


def _variance(means: Float[Tensor, "*batch num_moments"]) -> Float[Tensor, " *batch"]:
    """Return the variance from the means of a quantity and of its square, which come first."""
    return means[..., 1] - means[..., 0].square()


def _jackknife(
    terms: Float[Tensor, "num_simulations dim num_moments"], statistic: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Return a function of the means of terms, and its standard error from the values with one experiment left out."""
    num, total = len(terms), terms.sum(0)
    left_out = statistic((total - terms) / (num - 1))  # (num_simulations, dim)
    squares = (left_out - left_out.mean(0)).square().sum(0)
    return statistic(total / num), (squares * (num - 1) / num).sqrt()


def _correlation(
    first: Float[Tensor, "num_simulations dim"], second: Float[Tensor, "num_simulations dim"]
) -> Float[Tensor, " dim"]:
    first, second = first - first.mean(0), second - second.mean(0)
    return (first * second).sum(0) / (first.square().sum(0) * second.square().sum(0)).sqrt()

r"""What approximate Bayesian computation computes of simulations: distances, weights, the kernel, the adjustment.

A simulation with statistics :math:`s_i` is at the distance :math:`\rho_i` from the observed :math:`s_o`, by default

.. math::
    \rho_i^2 = \frac1K \sum_{k=1}^{K} \Big(\frac{s_{ik} - s_{ok}}{\sigma_k}\Big)^2,

with :math:`\sigma_k` the scale of a statistic under the prior predictive: 1.4826 median absolute deviations, which is
the standard deviation of a Gaussian. Regression adjustment moves each kept draw to where it would be had its simulation
hit the outcome, :math:`\theta_i^* = \theta_i - B (s_i - s_o)`, with B from weighted least squares of theta on the
statistics. Weighted draws are worth

.. math::
    N_\text{eff} = \frac{\sum_i w_i (x_i - \bar x)^2}{\sum_i w_i^2 (x_i - \bar x)^2}

independent ones for the mean of x. `abc` has the kernel and the references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

MAX_PAIRS = 2**22
MAD_TO_SCALE = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


Statistics = Float[Tensor, "num_rows num_statistics"]
Theta = Float[Tensor, "num_rows theta_dim"]
PerRow = Float[Tensor, " num_rows"]
Factor = Float[Tensor, "theta_dim theta_dim"]


def euclidean(statistics: Statistics, observed: Float[Tensor, " num_statistics"]) -> PerRow:
    """Return the root mean square difference of statistics, the default distance.

    Example:
        >>> euclidean(torch.tensor([[3.0, 4.0]]), torch.zeros(2))
        tensor([3.5355])
    """
    return (statistics - observed).square().mean(-1).sqrt()


@dataclass(frozen=True)
class Metric:
    """Statistics in units of the prior predictive, and their distance from the observed ones."""

    statistic: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    scale: Float[Tensor, " num_statistics"]
    observed: Float[Tensor, " num_statistics"]
    spread: float

    def statistics(self, y: Float[Tensor, "num_rows y_dim"]) -> Statistics:
        """Return the statistics of packed outcomes, in units of their scale."""
        return self.statistic(y) / self.scale

    def distances(self, statistics: Statistics) -> PerRow:
        """Return how far standardised statistics lie from the observed ones."""
        return _distances(self.distance, statistics, self.observed)


def prior_metric(
    y: Float[Tensor, "num_rows y_dim"],
    observed: Float[Tensor, " y_dim"],
    statistic: Callable[[Tensor], Tensor] | None,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Metric:
    """Return the metric that simulations of the prior standardise; their distances from each other give its spread.

    Example:
        >>> y = torch.tensor([[0.0], [1.0], [2.0]])
        >>> metric = prior_metric(y, torch.tensor([1.0]), None, euclidean)
        >>> metric.distances(metric.statistics(y)) * 1.4826
        tensor([1., 0., 1.])
    """
    own = partial(_statistics, statistic)
    statistics = own(y)
    scale = prior_scale(statistics)
    few = (statistics / scale)[:100]
    spread = torch.cat([_distances(distance, few[row + 1 :], few[row]) for row in range(len(few) - 1)]).median()
    return Metric(own, distance, scale, own(observed.unsqueeze(0))[0] / scale, float(spread))


def prior_scale(statistics: Statistics) -> Float[Tensor, " num_statistics"]:
    """Return 1.4826 median absolute deviations of each statistic; standard deviations, or 1, where those are 0."""
    deviation = (statistics - statistics.median(0).values).abs().median(0).values * MAD_TO_SCALE
    scale = torch.where(deviation > 0, deviation, statistics.std(0))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def weighted_effective_size(values: Float[Tensor, "num_rows *shape"], weights: PerRow) -> Float[Tensor, "*shape"]:
    """Return the effective number of independent weighted draws for the mean of each element.

    An element that never changes has that of the weights alone. Weights need not add up to one.
    """
    share = weights.double() / weights.double().sum()
    flat = values.double().reshape(len(values), -1)
    squares = (flat - share @ flat).square()
    effective = ((share @ squares) / (share.square() @ squares)).clamp(max=len(flat))
    constant = (flat == flat[0]).all(0)
    return torch.where(constant, 1.0 / share.square().sum(), effective).reshape(values.shape[1:])


def adjusted(theta: Theta, differences: Statistics, weights: PerRow) -> Theta:
    """Return draws moved along their weighted regression on the statistics to a difference of zero.

    References:
        Beaumont, Zhang and Balding (2002), equations 3 to 6.
    """
    num_draws, num_statistics = differences.shape
    if num_draws < num_statistics + 2:
        raise ArithmeticError(
            f"ABC: {num_draws} draws kept are too few to regress on {num_statistics} statistics. Raise num_simulations "
            "or quantile, or give a statistic with fewer elements."
        )
    share = weights.double() / weights.double().sum()
    roots = share.sqrt().unsqueeze(-1)
    centred = [roots * (columns.double() - share @ columns.double()) for columns in (differences, theta)]
    # A statistic that does not vary among the kept draws has no slope; the pseudo-inverse gives it zero.
    slopes = torch.linalg.pinv(centred[0], rtol=1e-9) @ centred[1]
    return (theta.double() - differences.double() @ slopes).to(theta)


def kernel_factor(theta: Theta, weights: PerRow) -> Factor:
    """Return the Cholesky factor of twice the covariance of draws, double precision; the weights add up to one."""
    centred = theta.double() - weights @ theta.double()
    covariance = 2.0 * (weights.unsqueeze(-1) * centred).mT @ centred
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise ArithmeticError(
            f"ABC: the {len(theta)} draws kept of a population do not span their {theta.shape[-1]} "
            "coordinates. Raise num_simulations or quantile, or take fewer populations."
        )
    return factor


def mixture_log_density(
    theta: Theta,
    centres: Float[Tensor, "num_centres theta_dim"],
    weights: Float[Tensor, " num_centres"],
    factor: Factor,
) -> PerRow:
    """Return the log density of normals at the centres, of one covariance, nats, double precision."""
    kernels = MultivariateNormal(centres.double(), scale_tril=factor.double(), validate_args=False)
    mixture = MixtureSameFamily(Categorical(weights.double()), kernels, validate_args=False)
    parts = theta.double().split(max(1, MAX_PAIRS // len(centres)))
    return torch.cat([mixture.log_prob(part) for part in parts])


def _statistics(statistic: Callable[[Tensor], Tensor] | None, y: Tensor) -> Tensor:
    if statistic is None:
        return y
    found = statistic(y)
    if found.dim() != 2 or len(found) != len(y):
        raise ValueError(
            f"statistic: expected shape ({len(y)}, num_statistics) for outcomes of shape {tuple(y.shape)}, got "
            f"{tuple(found.shape)}."
        )
    if bad := int((~torch.isfinite(found)).any(-1).sum()):
        raise ArithmeticError(f"statistic: {bad} of {len(y)} outcomes have statistics that are not finite.")
    return found


def _distances(distance: Callable[[Tensor, Tensor], Tensor], statistics: Tensor, observed: Tensor) -> Tensor:
    found = distance(statistics, observed)
    if found.shape != statistics.shape[:1]:
        raise ValueError(f"distance: expected shape ({len(statistics)},), got {tuple(found.shape)}.")
    if bad := int((~(found >= 0)).sum()):
        raise ArithmeticError(f"distance: {bad} of {len(found)} distances are negative or NaN.")
    return found

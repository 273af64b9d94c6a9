r"""Twelve variances from a set of rows: a test of whether a learned statistic of a set keeps all of its information.

.. math::
    v_d \sim U(0, 1), \qquad y_{n,d} \sim N(0, v_d), \qquad n = 1, \dots, N, \quad d = 1, \dots, D.

The variables are independent and interchangeable: whatever is learned about one can be learned about each of the
others, so that a posterior which follows some of the variances and ignores the rest is at fault. There is no design.

For one variable :math:`S = \sum_n y_n^2` is sufficient. With :math:`a = N/2 - 1`, :math:`b = S/2` the posterior is an
inverse gamma distribution cut off at one,

.. math::
    p(v \mid S) = v^{-N/2} e^{-b/v} / Z(S), \qquad Z(S) = \int_0^1 v^{-N/2} e^{-b/v} dv,

and since :math:`E[-\tfrac N2 \log v - S/2v] = 0`, the information about it is :math:`\mathrm{EIG} = -E[\log Z(S)]`.
In :math:`w = \log v` the integrand :math:`e^{-aw - b e^{-w}}` is log-concave, and :math:`x = b e^{-w}` is a gamma
variable of shape :math:`a` cut off below :math:`b`, which says where the mass is; Gauss-Legendre quadrature there
gives the information to within 1e-6 nats, from one row to thousands.

References:
    A. Gelman et al. (2013), Bayesian data analysis, 3rd edition, section 2.6, for the posterior without the cut-off.
"""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

#: EIG in nats about one of the variances from 10 rows and from 263.
EIG_OF_ONE = {10: 0.7213, 263: 2.0960}

#: Correlation of the exact posterior mean of a variance with the variance itself, from 10 rows and from 263.
CORRELATION = {10: 0.829, 263: 0.988}

_NUM_NODES = 80
# Mass smaller than exp(-40) of the rest is left out of the quadrature.
_NEGLIGIBLE = 40.0


def twelve_variances(num_rows: int = 10, num_variables: int = 12) -> Callable[[], Tensor]:
    """Make the model, with sites "variance" (target) and "y" (outcome, in the plate "rows").

    Example:
        >>> twelve_variances()().shape
        torch.Size([10, 12])
    """
    _check_sizes(num_rows, num_variables)

    def model() -> Tensor:
        variance = pyro.sample("variance", dist.Uniform(0.0, 1.0).expand([num_variables]).to_event(1))
        with pyro.plate("rows", num_rows, dim=-1):
            return pyro.sample("y", dist.Normal(torch.zeros_like(variance), variance.sqrt()).to_event(1))

    return model


def exact_eig(num_rows: int = 10, num_variables: int = 12) -> Float[Tensor, ""]:
    """Compute the EIG about all variances by quadrature, in nats, double precision; it is proportional to their number.

    Example:
        >>> round(exact_eig(10, 1).item(), 4), round(exact_eig(263, 1).item(), 4)
        (0.7213, 2.096)
    """
    _check_sizes(num_rows, num_variables)
    sum_of_squares, weights = _prior_predictive(num_rows)
    _, _, log_evidence = _posterior_nodes(sum_of_squares, num_rows)
    return -num_variables * (weights * log_evidence).sum()


def exact_correlation(num_rows: int = 10) -> Float[Tensor, ""]:
    r"""Compute the correlation of a variance's exact posterior mean with the variance, over simulated data sets.

    No estimate of the variance correlates better. As :math:`E[m v] = E[m^2]` for the posterior mean m, it is
    :math:`\sqrt{\mathrm{Var}(m) / \mathrm{Var}(v)}`.

    Example:
        >>> round(exact_correlation(10).item(), 3), round(exact_correlation(263).item(), 3)
        (0.829, 0.988)
    """
    _check_sizes(num_rows, 1)
    sum_of_squares, weights = _prior_predictive(num_rows)
    mean, _ = _moments(sum_of_squares, num_rows)
    variance = (weights * mean.square()).sum() - 0.25
    return (12.0 * variance).sqrt()


def exact_posterior_mean(y: Float[Tensor, "*batch num_rows num_variables"]) -> Float[Tensor, "*batch num_variables"]:
    """Compute the posterior mean of every variance, double precision; no column of a data set may be all zeros.

    Example:
        >>> exact_posterior_mean(torch.tensor([[0.1, 1.0], [-0.2, -1.0], [0.1, 1.0], [0.2, 2.0]]))
        tensor([0.1297, 0.8079], dtype=torch.float64)
    """
    return _moments(_sums_of_squares(y), y.shape[-2])[0]


def exact_posterior_variance(
    y: Float[Tensor, "*batch num_rows num_variables"],
) -> Float[Tensor, "*batch num_variables"]:
    """Compute the posterior variance of every variance, as `exact_posterior_mean`.

    Example:
        >>> exact_posterior_variance(torch.ones(10, 2))
        tensor([0.0211, 0.0211], dtype=torch.float64)
    """
    return _moments(_sums_of_squares(y), y.shape[-2])[1]


def exact_log_posterior(
    variance: Float[Tensor, "*#batch num_variables"], y: Float[Tensor, "*#batch num_rows num_variables"]
) -> Float[Tensor, "..."]:
    """Compute the log posterior density of all variances together, in their own coordinates, nats, double precision.

    It is zero outside (0, 1); data sets as for `exact_posterior_mean`.

    Example:
        >>> exact_log_posterior(torch.tensor([0.1, 0.7]), torch.tensor([[0.1, 1.0], [-0.2, -1.0], [0.3, 1.0]]))
        tensor(1.7051, dtype=torch.float64)
    """
    variance, num_rows = variance.double(), y.shape[-2]
    sum_of_squares = _sums_of_squares(y)
    _, _, log_evidence = _posterior_nodes(sum_of_squares, num_rows)
    log_density = -0.5 * num_rows * variance.log() - 0.5 * sum_of_squares / variance - log_evidence
    inside = (variance > 0) & (variance < 1)
    return torch.where(inside, log_density, -torch.inf).sum(-1)


def _check_sizes(num_rows: int, num_variables: int) -> None:
    for name, value in (("num_rows", num_rows), ("num_variables", num_variables)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _sums_of_squares(y: Float[Tensor, "*batch num_rows num_variables"]) -> Float[Tensor, "*batch num_variables"]:
    sum_of_squares = y.double().square().sum(-2)
    if not bool((torch.isfinite(sum_of_squares) & (sum_of_squares > 0)).all()):
        raise ValueError("y: expected finite columns that are not all zeros, whose likelihood has a maximum.")
    return sum_of_squares


def _moments(
    sum_of_squares: Float[Tensor, "*batch"], num_rows: int
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Posterior mean and variance given the sufficient statistic."""
    nodes, weights, _ = _posterior_nodes(sum_of_squares, num_rows)
    mean = (weights * nodes).sum(-1)
    return mean, (weights * (nodes - mean.unsqueeze(-1)).square()).sum(-1)


def _posterior_nodes(
    sum_of_squares: Float[Tensor, "*batch"], num_rows: int
) -> tuple[Float[Tensor, "*batch nodes"], Float[Tensor, "*batch nodes"], Float[Tensor, "*batch"]]:
    """Nodes of the posterior of v, their weights, which sum to one, and log Z."""
    shape, rate = 0.5 * num_rows - 1.0, 0.5 * sum_of_squares.unsqueeze(-1)
    # Bounds of x = rate / v: beyond them a gamma variable of this shape, cut off at the rate, has no mass to speak of.
    top = rate.clamp(min=max(shape, 0.0))
    lower = (rate / (top + _NEGLIGIBLE + math.sqrt(2.0 * _NEGLIGIBLE) * top.sqrt())).log()
    upper = torch.zeros_like(lower)
    if shape > 0.0:
        least = shape * math.exp(-_NEGLIGIBLE / shape - math.sqrt(2.0 * _NEGLIGIBLE / shape))
        upper = (rate / least).log().clamp(max=0.0)
    positions, legendre = _gauss_legendre(sum_of_squares.device)
    log_nodes = lower + (upper - lower) * positions
    log_terms = -shape * log_nodes - rate * (-log_nodes).exp() + ((upper - lower) * legendre).log()
    log_evidence = log_terms.logsumexp(-1)
    return log_nodes.exp(), (log_terms - log_evidence.unsqueeze(-1)).exp(), log_evidence


def _prior_predictive(num_rows: int) -> tuple[Float[Tensor, "draws"], Float[Tensor, "draws"]]:
    """Nodes of the sum of squares S = v c, with v uniform and c chi-square, and their weights, which sum to one."""
    positions, legendre = _gauss_legendre(torch.device("cpu"))
    # log Z has a logarithmic singularity at v = 0, which the substitution v = position ** 3 takes away.
    variances, variance_weights = positions**3, 3.0 * positions**2 * legendre
    half = 0.5 * num_rows
    lower = math.log(half) - _NEGLIGIBLE / half - math.sqrt(2.0 * _NEGLIGIBLE / half)
    upper = math.log(half + _NEGLIGIBLE + math.sqrt(2.0 * _NEGLIGIBLE * half))
    log_x = lower + (upper - lower) * positions
    chi_square_weights = (half * log_x - log_x.exp() - math.lgamma(half)).exp() * (upper - lower) * legendre
    sums = torch.outer(variances, 2.0 * log_x.exp())
    weights = torch.outer(variance_weights, chi_square_weights)
    return sums.flatten(), weights.flatten()


def _gauss_legendre(device: torch.device) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
    """Nodes and weights of the unit interval."""
    nodes, weights = np.polynomial.legendre.leggauss(_NUM_NODES)
    return torch.as_tensor(0.5 * (nodes + 1.0), device=device), torch.as_tensor(0.5 * weights, device=device)

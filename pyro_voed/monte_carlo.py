"""Monte Carlo averages and their errors.

Every estimate of the library is a mean of per-sample terms, so its standard error is the terms' standard deviation
over the square root of their number. Terms that are not finite are never dropped: they reach the caller as an error.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def log_mean_exp(values: Tensor, dim: int = -1) -> Tensor:
    """Return log of the mean of exp(values) along `dim`, without overflow.

    Example:
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        tensor(1000.)
    """
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])


def mean_and_standard_error(
    terms: Float[Tensor, "num_samples *batch"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return the mean of independent terms along the first axis, and its standard error.

    Example:
        >>> mean, standard_error = mean_and_standard_error(torch.tensor([1.0, 3.0]))
        >>> mean.item(), standard_error.item()
        (2.0, 1.0)
    """
    # Sums of many float32 terms lose digits that a standard error would count, so both are taken in float64.
    wide = terms.double()
    mean = wide.mean(0).to(terms.dtype)
    return mean, (wide.std(0) / math.sqrt(terms.shape[0])).to(terms.dtype)


MOST_COMPARED = 1_000
"""Members of a batch of which all pairs are compared."""


def difference_errors(terms: Float[Tensor, "num_samples *batch"]) -> Float[Tensor, "size size"] | None:
    """Return the standard error of the difference between the means of any two members of a batch, flattened.

    Rows are independent; what members of a row have in common, such as random numbers, cancels. None for fewer than two
    members and for more than `MOST_COMPARED`.

    Example:
        >>> shared = torch.randn(100, 1)
        >>> difference_errors(shared + torch.tensor([0.0, 0.5]))
        tensor([[0., 0.],
                [0., 0.]])
    """
    size = terms[0].numel()
    if not 1 < size <= MOST_COMPARED:
        return None
    wide = terms.double().reshape(-1, size)
    # From what differs between members: a difference of variances of what they share would be rounding alone.
    apart = wide - wide.mean(1, keepdim=True)
    covariance = torch.cov(apart.mT) / len(wide)
    variance = covariance.diagonal()
    squares = variance.unsqueeze(0) + variance.unsqueeze(1) - 2.0 * covariance
    return squares.clamp_min(0.0).sqrt().to(terms.dtype)


def controlled_terms(
    terms: Float[Tensor, "num_samples *batch"], controls: Float[Tensor, "num_samples *batch num_controls"]
) -> Float[Tensor, "num_samples *batch"]:
    """Return terms of the same expectation, less the part that controls, of expectation exactly zero, explain.

    Coefficients are fitted by least squares on one half of the draws and used on the other, so that the mean stays
    unbiased whatever the controls.

    References:
        Glasserman (2003), "Monte Carlo methods in financial engineering", section 4.1.

    Example:
        >>> noise = torch.randn(1000, 1)
        >>> mean, standard_error = mean_and_standard_error(controlled_terms(2.0 + 3.0 * noise[:, 0], noise))
        >>> round(mean.item(), 3), bool(standard_error < 1e-5)
        (2.0, True)
    """
    num_controls = controls.shape[-1]
    # With few draws the fit would cost more than the controls explain; infinite terms are for the caller to report.
    if num_controls == 0 or terms.shape[0] < 100 * num_controls or not torch.isfinite(terms).all():
        return terms
    # A control that is infinite somewhere has no expectation to rely on.
    controls = torch.where(torch.isfinite(controls).all(0), controls, torch.zeros_like(controls))
    half = terms.shape[0] // 2
    first, second = slice(None, half), slice(half, None)
    wide, columns = terms.double(), controls.double()
    parts = [
        wide[use] - (columns[use] * _coefficients(wide[fit], columns[fit])).sum(-1)
        for use, fit in ((first, second), (second, first))
    ]
    return torch.cat(parts).to(terms.dtype)


def _coefficients(terms: Tensor, controls: Tensor) -> Tensor:
    """Least-squares coefficients of terms on controls for each member of the batch."""
    centred = (controls - controls.mean(0)).movedim(0, -2)  # (*batch, num_samples, num_controls)
    scale = centred.square().mean(-2, keepdim=True).sqrt()
    # A control that does not vary, such as a uniform prior's, explains nothing.
    varies = scale > 1e-9 * (1.0 + controls.abs().amax(0).unsqueeze(-2))
    unit = torch.where(varies, centred / torch.where(varies, scale, torch.ones_like(scale)), torch.zeros_like(centred))
    moments = unit.mT @ (terms - terms.mean(0)).movedim(0, -1).unsqueeze(-1)
    fitted = torch.linalg.pinv(unit.mT @ unit, rtol=1e-9, hermitian=True) @ moments
    return (fitted / torch.where(varies, scale, torch.ones_like(scale)).mT).squeeze(-1)


def pareto_k(terms: Float[Tensor, "num_samples *batch"]) -> Float[Tensor, "*batch"]:
    """Return the tail index of terms: the larger shape of generalised Pareto fits to their two tails.

    A mean of terms with k above 0.5 has no finite variance, and above 0.7 its standard error cannot be trusted in
    practice. The fit is to the largest `min(num_samples / 5, 3 sqrt(num_samples))` deviations on either side; fewer
    than 20 terms give NaN, for nothing is known then.

    References:
        Zhang and Stephens (2009), "A new and efficient estimation method for the generalized Pareto distribution";
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed importance sampling".
    """
    flat = terms.double().reshape(terms.shape[0], -1)
    indices = [max(_tail_index(column), _tail_index(-column)) for column in flat.T]
    return torch.tensor(indices, dtype=terms.dtype, device=terms.device).reshape(terms.shape[1:])


HEAVY_TAIL = 0.7
"""Pareto k above which a mean of terms is not to be trusted."""

FEWEST_FOR_TAIL = 20
"""Fewer terms than this say nothing about their tails."""


def _tail_index(values: Tensor) -> float:
    """Shape of a generalised Pareto distribution fitted to the upper tail by Zhang and Stephens's empirical Bayes."""
    size = values.shape[0]
    if size < FEWEST_FOR_TAIL:
        return math.nan
    count = int(min(0.2 * size, 3 * math.sqrt(size)))
    largest = values.sort().values[-count - 1 :]
    excess = largest[1:] - largest[0]
    # A tail of few distinct values is that of a discrete quantity, which is bounded.
    if excess[-1] <= 0 or excess.unique().shape[0] < count // 2:
        return -math.inf
    num_points = 30 + int(math.sqrt(count))
    quartile = excess[int(count / 4 + 0.5) - 1].clamp_min(excess[-1] * 1e-12)
    steps = torch.arange(1, num_points + 1, dtype=values.dtype, device=values.device)
    candidates = (1 - torch.sqrt(num_points / (steps - 0.5))) / (3 * quartile) + 1 / excess[-1]
    shapes = torch.log1p(-candidates[:, None] * excess).mean(-1)
    profile = count * (torch.log(-candidates / shapes) - shapes - 1)
    weights = torch.softmax(profile, 0)
    inverse_scale = (weights * candidates).sum()
    shape = torch.log1p(-inverse_scale * excess).mean()
    # A weak prior at 1/2, worth ten observations, keeps short tails from looking heavy by chance.
    return float((shape * count + 10 * 0.5) / (count + 10))

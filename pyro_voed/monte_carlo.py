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
    terms: Float[Tensor, num_samples * batch],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return the mean of independent terms along the first axis, and its standard error.

    Args:
        terms: Independent draws of one quantity, `num_samples` at least 2, finite.

    Returns:
        The mean, and the sample standard deviation divided by `sqrt(num_samples)`.

    Example:
        >>> mean, standard_error = mean_and_standard_error(torch.tensor([1.0, 3.0]))
        >>> mean.item(), standard_error.item()
        (2.0, 1.0)
    """
    # Sums of many float32 terms lose digits that a standard error would count, so both are taken in float64.
    wide = terms.double()
    mean = wide.mean(0).to(terms.dtype)
    return mean, (wide.std(0) / math.sqrt(terms.shape[0])).to(terms.dtype)


def check_finite_terms(terms: Tensor, estimator: str, explanation: str = "") -> None:
    """Raise ArithmeticError, with the count, where a term is not finite."""
    bad = int((~torch.isfinite(terms)).sum())
    if bad:
        raise ArithmeticError(f"{estimator}: {bad} of {terms.numel()} terms are not finite. {explanation}".rstrip())

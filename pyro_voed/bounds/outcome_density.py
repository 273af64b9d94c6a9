"""Terms of bounds that learn the density of the outcome, as the chapters `marginal` and `marginal_likelihood` say."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def marginal_terms(log_likelihood: Float[Tensor, "*batch"], log_q: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return marginal terms, nats, whose mean is an upper bound on the expected information gain.

    Args:
        log_likelihood: Log density of an outcome given the targets that made it.
        log_q: Its log density under the learned outcome density, in the same coordinates.

    Example:
        >>> import torch
        >>> marginal_terms(torch.tensor([-0.5]), torch.tensor([-1.5]))
        tensor([1.])
    """
    return log_likelihood - log_q


def marginal_likelihood_terms(
    log_q_given: Float[Tensor, "*batch"], log_q: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Return marginal plus likelihood terms, nats, of no guaranteed side.

    Args:
        log_q_given: Log density of an outcome under the learned density given the targets that made it.
        log_q: Its log density under the learned density of the outcome alone.

    Example:
        >>> import torch
        >>> marginal_likelihood_terms(torch.tensor([-0.5]), torch.tensor([-1.5]))
        tensor([1.])
    """
    return log_q_given - log_q

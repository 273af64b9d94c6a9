"""Terms of the Barber-Agakov bound; derived in `estimators.flow`.

The bound is off by the expected divergence from the posterior to q. So of two densities the one with the larger bound
is nearer to the posterior by exactly the difference of the bounds.

References:
    Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational Bayesian optimal experimental design
    with normalizing flows", proposition 1.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def ba_terms(log_q: Float[Tensor, "*batch"], log_prior: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """Return Barber-Agakov terms, nats, whose mean is a lower bound on the expected information gain.

    Args:
        log_q: Log density of the targets that made an outcome, under the learned posterior given that outcome.
        log_prior: Their log prior density, in the same coordinates.

    Example:
        >>> import torch
        >>> ba_terms(torch.tensor([-0.5]), torch.tensor([-1.5]))
        tensor([1.])
    """
    return log_q - log_prior

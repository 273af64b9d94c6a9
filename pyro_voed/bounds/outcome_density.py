r"""Terms of bounds that learn the density of the outcome.

With a density q(y) of the outcome alone, the *marginal* bound (Foster et al. 2019, Eq. 6)

.. math::
    \mathrm{EIG}(\xi) \;\le\;
    \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log p(y \mid \theta, \xi) - \log q(y \mid \xi)\big]

is off by the divergence from p(y) to q. Where the model states no density of the outcome, one given the targets is
learned too (Foster et al. 2019, Eq. 8), and the errors of the two have opposite signs: no side is left.

References:
    Foster, Jankowiak, Bingham, Horsfall, Teh, Rainforth and Goodman (2019), "Variational Bayesian optimal experimental
    design".
"""

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

r"""Terms of ACE and VNMC: an outcome's density averaged by importance sampling; derived in `estimators.importance`.

With :math:`q_\alpha` the proposal, mixed with the prior, a draw has the weight
:math:`w = p(\theta)\, p(y \mid \theta) / q_\alpha(\theta \mid y)`; :math:`\theta_0` is the draw that made y.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def ace_terms(
    log_likelihood: Float[Tensor, " num_outer"],
    own_weights: Float[Tensor, " num_outer"],
    inner_weights: Float[Tensor, "num_outer num_inner"],
) -> Float[Tensor, " num_outer"]:
    """Return adaptive contrastive estimation terms, nats, whose mean is a lower bound.

    Args:
        log_likelihood: log p(y given theta_0).
        own_weights: Log weight of theta_0, the draw that made y.
        inner_weights: Log weights of the proposal's draws.

    Example:
        >>> ace_terms(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([[-torch.inf]]))
        tensor([0.6931])
    """
    total = torch.cat([own_weights.unsqueeze(-1), inner_weights], -1).logsumexp(-1)
    return log_likelihood - total + math.log(inner_weights.shape[-1] + 1)


def vnmc_terms(
    log_likelihood: Float[Tensor, " num_outer"], inner_weights: Float[Tensor, "num_outer num_inner"]
) -> Float[Tensor, " num_outer"]:
    """Return variational nested Monte Carlo terms, nats, whose mean is an upper bound.

    Args:
        log_likelihood: log p(y given theta_0).
        inner_weights: Log weights of the proposal's draws.

    Example:
        >>> vnmc_terms(torch.tensor([0.0]), torch.tensor([[0.0, -torch.inf]]))
        tensor([0.6931])
    """
    return log_likelihood - inner_weights.logsumexp(-1) + math.log(inner_weights.shape[-1])

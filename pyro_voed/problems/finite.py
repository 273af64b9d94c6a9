r"""One binary target and one binary outcome: the smallest model without densities, exact by enumeration.

.. math::
    \theta \sim \mathrm{Bernoulli}(0.4), \qquad y \mid \theta \sim \mathrm{Bernoulli}((\xi + \theta) / 2), \qquad
    \mathrm{EIG}(\xi) = H[y] - E_\theta H[y \mid \theta] .

Neither the target nor the outcome is reparametrised, so design gradients need score-function terms here.

References:
    T. M. Cover and J. A. Thomas (2006), Elements of Information Theory, equation 2.40.
"""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor

PRIOR_PROBABILITY = 0.4
DEFAULT_DESIGN = 0.5

#: EIG of the default design, in nats.
DEFAULT_EIG = 0.12580366909


def finite(initial_design: float | Float[Tensor, ""] = DEFAULT_DESIGN) -> Callable[[], Tensor]:
    """Make the model, with sites "xi" (design, in the unit interval), "theta" (target) and "y" (outcome).

    Example:
        >>> finite()().shape
        torch.Size([])
    """

    def model() -> Tensor:
        xi = pyro.param("xi", lambda: torch.as_tensor(initial_design), constraint=constraints.unit_interval)
        theta = pyro.sample("theta", dist.Bernoulli(xi.new_tensor(PRIOR_PROBABILITY)))
        return pyro.sample("y", dist.Bernoulli((xi + theta) / 2))

    return model


def exact_eig(design: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Compute the EIG of designs by enumerating the values of target and outcome, in nats, double precision.

    Example:
        >>> exact_eig(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.2231, 0.1258, 0.1950], dtype=torch.float64)
    """
    success = torch.stack([design.double() / 2, (design.double() + 1) / 2], dim=-1)  # p(y = 1 | theta), (*batch, 2)
    prior = success.new_tensor([1 - PRIOR_PROBABILITY, PRIOR_PROBABILITY])
    return _binary_entropy((prior * success).sum(-1)) - (prior * _binary_entropy(success)).sum(-1)


def _binary_entropy(probability: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return torch.special.entr(probability) + torch.special.entr(1 - probability)

r"""An outcome without a density of its own: a deterministic, invertible map of target and noise.

.. math::
    \theta \sim N(0, 1), \qquad e \sim N(0, 0.5^2), \qquad y = \sinh(\xi \theta + e) .

The model is implicit: "y" is a deterministic site and the noise "e" a nuisance, so p(y given theta) is nowhere in the
program. Mutual information does not change under invertible maps of the outcome, hence

.. math:: \mathrm{EIG}(\xi) = \tfrac12 \log(1 + \xi^2 / 0.5^2) .

The hyperbolic sine makes the outcome heavy-tailed, as those of simulators often are.

References:
    T. M. Cover and J. A. Thomas (2006), Elements of Information Theory, sections 8.6 and 9.1 (the Gaussian channel).
"""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor

NOISE_SCALE = 0.5
MAXIMAL_DESIGN = 2.0
DEFAULT_DESIGN = 1.0

#: EIG of the default design of `implicit_toy`, 0.5 log 5 nats.
DEFAULT_EIG = 0.5 * math.log(5.0)


def implicit_toy(initial_design: float | Float[Tensor, ""] = DEFAULT_DESIGN) -> Callable[[], Tensor]:
    """Make the model: sites "xi" (design in (0, 2)), "theta" (target), "e" (nuisance), "y" (deterministic outcome).

    Example:
        >>> implicit_toy()().shape
        torch.Size([])
    """

    def model() -> Tensor:
        xi = pyro.param(
            "xi", lambda: torch.as_tensor(initial_design), constraint=constraints.interval(0.0, MAXIMAL_DESIGN)
        )
        theta = pyro.sample("theta", dist.Normal(xi.new_tensor(0.0), xi.new_tensor(1.0)))
        noise = pyro.sample("e", dist.Normal(xi.new_tensor(0.0), xi.new_tensor(NOISE_SCALE)))
        return pyro.deterministic("y", torch.sinh(xi * theta + noise), event_dim=0)

    return model


def implicit_pair(
    initial_design: tuple[float, float] | Float[Tensor, "2"] = (DEFAULT_DESIGN, DEFAULT_DESIGN),
) -> Callable[[], Tensor]:
    r"""Make the two-dimensional model, whose outcomes mix two experiments by an invertible map.

    :math:`z = \xi \odot \theta + e`, :math:`y = \sinh(z_1, z_1 + z_2)`. The EIG is the sum of those of the two
    experiments, ``exact_eig(xi).sum(-1)``, although the outcomes are dependent.

    Example:
        >>> implicit_pair()().shape
        torch.Size([2])
    """

    def model() -> Tensor:
        xi = pyro.param(
            "xi",
            lambda: torch.as_tensor(initial_design),
            constraint=constraints.independent(constraints.interval(0.0, MAXIMAL_DESIGN), 1),
        )
        theta = pyro.sample("theta", dist.Normal(xi.new_zeros(2), xi.new_ones(2)).to_event(1))
        noise = pyro.sample("e", dist.Normal(xi.new_zeros(2), xi.new_full((2,), NOISE_SCALE)).to_event(1))
        return pyro.deterministic("y", torch.sinh((xi * theta + noise).cumsum(-1)), event_dim=1)

    return model


def exact_eig(design: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Compute the EIG of one experiment at each design, in nats, double precision.

    Example:
        >>> exact_eig(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.0000, 0.8047, 1.4166], dtype=torch.float64)
    """
    return 0.5 * torch.log1p((design.double() / NOISE_SCALE) ** 2)

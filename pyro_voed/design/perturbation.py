r"""Simultaneous perturbation stochastic approximation (SPSA), on tensors.

Finite differences take two values for each of d variables, SPSA two in all. With a random direction
:math:`\Delta_k \in \{-1, 1\}^d`,

.. math::
    \hat g_k = \frac{\hat f(x_k + c_k \Delta_k) - \hat f(x_k - c_k \Delta_k)}{2 c_k}\, \Delta_k, \qquad
    x_{k+1} = x_k + a_k\, \hat g_k, \qquad
    a_k = \frac{a}{(A + k)^{\alpha}}, \quad c_k = \frac{c}{k^{\gamma}}, \quad k = 1, 2, \dots

Since the signs of different coordinates are independent, :math:`E[\hat g_k] = \nabla f + O(c_k^2)`: the error along the
other coordinates is noise that later steps average out. The exponents :math:`\alpha = 0.602` and :math:`\gamma = 0.101`
are about the smallest that theory allows, and Spall's advice for finite runs; 1 and 1/6 are asymptotically optimal.

*Bounds.* Bounded coordinates stay in [0, 1]. A step that would leave it is reflected at the end. The two evaluations
stay inside too: they are made about the point of :math:`[c_k, 1 - c_k]^d` nearest to :math:`x_k` (Sadegh), whose
difference still shows the slope at a bound; reflecting the two points would make them one.

*Other constraints.* Both points, and each step, are moved to the nearest admissible points. Where these lie in a plane
with the orthogonal projection P, the difference is :math:`2 c_k\, \nabla f^\top P \Delta_k` and its estimate of the
gradient :math:`P \nabla f` on average: the slope along the plane.

References:
    Spall (1992), "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", IEEE
    Transactions on Automatic Control 37, equation 2.2; (1998), "Implementation of the simultaneous perturbation
    algorithm for stochastic optimization", IEEE Transactions on Aerospace and Electronic Systems 34. Sadegh (1997),
    "Constrained optimization via stochastic approximation with a simultaneous perturbation gradient approximation",
    Automatica 33 (bounds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Evaluate = Callable[[Tensor], Tensor]
"""From points `(2, num_repeats, num_starts, dim)` to values at them, `(2, num_repeats, num_starts)`."""

Admissible = Callable[[Tensor], Tensor]
"""From points `(*batch, dim)` to the nearest admissible ones."""


@dataclass(frozen=True)
class Gains:
    """Gain sequences of SPSA; `stability` is the constant A, in steps, that keeps early steps small."""

    a: float
    c: float
    stability: float
    alpha: float = 0.602
    gamma: float = 0.101

    def step(self, k: int) -> float:
        """Return a_k, for k = 1, 2, ..."""
        return self.a / (self.stability + k) ** self.alpha

    def perturbation(self, k: int) -> float:
        """Return c_k, for k = 1, 2, ..."""
        return self.c / k**self.gamma


def spsa_gradient(
    evaluate: Evaluate,
    x: Float[Tensor, "num_starts dim"],
    perturbation: float,
    bounded: Bool[Tensor, " dim"],
    *,
    num_repeats: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "num_repeats num_starts dim"], Float[Tensor, " num_starts"]]:
    """Return a gradient for each random direction, from values at two points each, and the mean of all values.

    Coordinates that are `bounded` stay in [0, 1].
    """
    shape = (num_repeats, *x.shape)
    directions = 2.0 * torch.randint(2, shape, generator=generator).to(x) - 1.0
    centre = torch.where(bounded.to(x.device), x.clamp(perturbation, 1.0 - perturbation), x)
    points = torch.stack([centre + perturbation * directions, centre - perturbation * directions])
    values = evaluate(points)
    slopes = (values[0] - values[1]) / (2.0 * perturbation)  # (num_repeats, num_starts)
    return slopes.unsqueeze(-1) * directions, values.mean((0, 1))


def spsa_ascent(
    evaluate: Evaluate,
    starts: Float[Tensor, "num_starts dim"],
    bounded: Bool[Tensor, " dim"],
    gains: Gains,
    *,
    num_steps: int,
    num_repeats: int,
    largest_step: float,
    generator: torch.Generator,
    admissible: Admissible = lambda x: x,
) -> Iterator[tuple[Float[Tensor, "num_starts dim"], Float[Tensor, " num_starts"]]]:
    """Climb from several starts side by side, a step each time the next one is asked for.

    Yields the points that each step reached, and the mean value of its evaluations, which may be noisy. No step moves a
    coordinate by more than `largest_step`, before it is made `admissible`.
    """
    x = starts
    for k in range(1, num_steps + 1):
        gradients, value = spsa_gradient(
            evaluate, x, gains.perturbation(k), bounded, num_repeats=num_repeats, generator=generator
        )
        move = (gains.step(k) * gradients.mean(0)).clamp(-largest_step, largest_step)
        x = admissible(torch.where(bounded.to(x.device), reflected(x + move), x + move))
        yield x, value


def reflected(x: Tensor) -> Tensor:
    """Fold the real line onto [0, 1] by reflection at both ends."""
    return 1.0 - (x.remainder(2.0) - 1.0).abs()

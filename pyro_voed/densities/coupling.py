r"""Coupling flows: conditional densities with a fast log-density, fast draws and an exact start at N(0, I).

In the density direction, with features :math:`c` of the context computed once by a trunk that all layers share,

.. math::
    \theta \to z = e^{-\lambda(c)} (I + L(c)) (\theta - m(c)), \qquad
    z_1 \leftarrow f(z_1; z_2, c), \quad z_2 \leftarrow f(z_2; z_1, c), \quad z \leftarrow P z, \quad \ldots

A *transform* moves both halves in turn, each given the other as it then stands (Dinh, Sohl-Dickstein and Bengio, 2017,
"Density estimation using Real NVP"). The permutation :math:`P` is that of `halves`. A single coordinate has no other
half and is moved given the context alone.

Every layer ends in weights that start at zero, so a flow starts at N(0, I) for every context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import check_count, check_positive
from pyro_voed.densities.distribution import Context, Density, LogProb, Theta
from pyro_voed.densities.elementwise import AffineMap, ElementwiseMap, SplineMap
from pyro_voed.densities.gaussian import ConditionalGaussian, colour, whiten
from pyro_voed.densities.halves import Conditioner, permute, split, unpermute
from pyro_voed.densities.rebuilding import rebuildable


class CouplingFlow(Density):
    """What coupling flows share; subclasses say which map each coordinate goes through."""

    has_rsample = True
    elementwise: ElementwiseMap

    def __init__(
        self,
        theta_dim: int,
        context_dim: int,
        *,
        num_transforms: int = 4,
        hidden_dim: int = 64,
        num_hidden: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.theta_dim = check_count(theta_dim, "theta_dim")
        self.context_dim = check_count(context_dim, "context_dim", minimum=0)
        check_count(num_transforms, "num_transforms", minimum=0)
        check_count(hidden_dim, "hidden_dim")
        check_count(num_hidden, "num_hidden")
        # Without a context the trunk sees the constant one, so that it learns plain numbers.
        widths = [max(context_dim, 1)] + [hidden_dim] * num_hidden
        self.trunk = nn.Sequential(*(layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())))
        self.gaussian = ConditionalGaussian(theta_dim, hidden_dim, context_dim)
        sizes = (theta_dim // 2, theta_dim - theta_dim // 2)
        # One coordinate: the first half is empty and only the second moves.
        self.steps = num_transforms * ([0, 1] if theta_dim > 1 else [1])
        self.permuted = set(range(2, len(self.steps), 2)) if theta_dim > 2 else set()
        num_parameters = self.elementwise.num_parameters
        self.conditioners = nn.ModuleList(
            Conditioner(sizes[1 - moved], sizes[moved], hidden_dim, num_parameters) for moved in self.steps
        )

    def log_prob(self, theta: Theta, context: Context) -> LogProb:
        """Return the log-density of theta given the context; each context passes the trunk once, for any batch."""
        z, log_det = self.whiten(theta, context)
        return log_det - 0.5 * (z * z).sum(-1) - 0.5 * self.theta_dim * math.log(2.0 * math.pi)

    def whiten(self, theta: Theta, context: Context) -> tuple[Float[Tensor, "... theta_dim"], LogProb]:
        """Return z, standard normal where the flow is right, and the log-determinant of its Jacobian."""
        _check_last("theta", theta, self.theta_dim)
        features = self._features(context)
        gaussian = self.gaussian(features, context)
        halves = split(whiten(theta, *gaussian))
        log_det = -gaussian[1].sum(-1)
        constants = self.elementwise.constants(theta)
        for step, (moved, conditioner) in enumerate(zip(self.steps, self.conditioners, strict=True)):
            if step in self.permuted:
                halves = permute(halves)
            raw = conditioner(halves[1 - moved], features)
            new, log_slope = self.elementwise.forward(halves[moved], raw, constants)
            halves = (halves[0], new) if moved else (new, halves[1])
            log_det = log_det + log_slope.sum(-1)
        return torch.cat(halves, -1), log_det

    def colour(self, z: Theta, context: Context) -> Float[Tensor, "... theta_dim"]:
        """Return theta from z, the inverse of `whiten`."""
        features = self._features(context)
        gaussian = self.gaussian(features, context)
        halves = split(z)
        constants = self.elementwise.constants(z)
        for step in reversed(range(len(self.steps))):
            moved = self.steps[step]
            raw = self.conditioners[step](halves[1 - moved], features)
            new = self.elementwise.inverse(halves[moved], raw, constants)
            halves = (halves[0], new) if moved else (new, halves[1])
            if step in self.permuted:
                halves = unpermute(halves)
        return colour(torch.cat(halves, -1), *gaussian)

    def draw(self, context: Context, batch_shape: Sequence[int]) -> Float[Tensor, "... theta_dim"]:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""
        z = torch.randn(*batch_shape, self.theta_dim, dtype=context.dtype, device=context.device)
        return self.colour(z, context)

    def _features(self, context: Tensor) -> Tensor:
        _check_last("context", context, self.context_dim)
        return self.trunk(context if self.context_dim else context.new_ones(*context.shape[:-1], 1))


@rebuildable
class AffineCouplingFlow(CouplingFlow):
    """Model the density of theta given a context with a full Gaussian and affine couplings.

    Args:
        theta_dim: Dimension of theta.
        context_dim: Dimension of the context; zero for a density without context (contexts then have shape (..., 0)).
        num_transforms: Number of transforms, each of both halves.
        hidden_dim: Width of the hidden layers.
        num_hidden: Number of hidden layers of the trunk; each conditioner adds one.
        activation: Makes the activations of the trunk. Rectifiers follow kinks in the context, such as a threshold in
            a design; smooth ones follow smooth dependence with fewer units.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using Real NVP".

    Example:
        >>> flow = AffineCouplingFlow(theta_dim=2, context_dim=3)
        >>> flow.log_prob(torch.zeros(4, 2), torch.randn(4, 3))  # at construction a standard normal
        tensor([-1.8379, -1.8379, -1.8379, -1.8379], grad_fn=...)
    """

    elementwise = AffineMap()


@rebuildable
class SplineCouplingFlow(CouplingFlow):
    """Model the density of theta given a context with a full Gaussian and rational-quadratic spline couplings.

    Arguments as in `AffineCouplingFlow`, and:

    Args:
        theta_dim: Dimension of theta; standardise it, the splines bend only [-bound, bound].
        num_bins: Number of bins of each spline.
        bound: Where the splines end and linear tails begin, in standardised units.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), "Neural Spline Flows".

    Example:
        >>> flow = SplineCouplingFlow(theta_dim=2, context_dim=3, num_transforms=2)
        >>> flow.condition(torch.zeros(5, 3)).sample((10,)).shape
        torch.Size([10, 5, 2])
    """

    def __init__(
        self,
        theta_dim: int,
        context_dim: int,
        *,
        num_bins: int = 8,
        bound: float = 5.0,
        num_transforms: int = 4,
        hidden_dim: int = 64,
        num_hidden: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        # Before the rest, which asks how many parameters it takes.
        self.elementwise = SplineMap(check_count(num_bins, "num_bins", minimum=2), check_positive(bound, "bound"))
        sizes = {"num_transforms": num_transforms, "hidden_dim": hidden_dim, "num_hidden": num_hidden}
        super().__init__(theta_dim, context_dim, **sizes, activation=activation)


def _check_last(name: str, values: Tensor, dim: int) -> None:
    if values.shape[-1] != dim:
        raise ValueError(
            f"{name}: expected shape (..., {dim}), got {tuple(values.shape)}. "
            "Build the flow with the dimensions of your data."
        )

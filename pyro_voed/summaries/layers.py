"""Layers that summaries are made of: residual blocks with normalised inputs and orthogonal weights.

Why these: a set network has to find features whose mean over the rows is informative. Where the mean of a row does not
depend on the targets, nearly linear features are not, the loss is flat around them, and which informative features are
found is a matter of chance. Normalised inputs and orthogonal weights keep the features different from each other from
the start; residual paths keep their gradients from vanishing.

References:
    A. M. Saxe, J. L. McClelland and S. Ganguli (2014), Exact solutions to the nonlinear dynamics of learning in deep
    linear neural networks. ICLR.
    R. Xiong et al. (2020), On layer normalization in the transformer architecture. ICML.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import check_count


def check_sizes(**sizes: int) -> None:
    """Raise where a size, given by its argument's name, is not an integer of at least 1."""
    for argument, size in sizes.items():
        check_count(size, argument)


def linear(in_dim: int, out_dim: int, *, gain: float = 1.0) -> nn.Linear:
    """Return a linear layer with orthogonal weights and no offset at the start."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Add a hidden layer's output for the normalised input, and for what all rows of a set share, to the input."""

    def __init__(self, dim: int, shared_dim: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.first = linear(dim, dim, gain=2.0**0.5)
        self.from_shared = linear(shared_dim, dim) if shared_dim else None
        self.second = linear(dim, dim, gain=0.5)

    def forward(
        self, x: Float[Tensor, "*batch dim"], shared: Float[Tensor, "*#batch shared_dim"] | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """Return the block's output; `shared` is one row, computed once for all."""
        hidden = self.first(self.norm(x))
        if self.from_shared is not None:
            hidden = hidden + self.from_shared(shared)
        return x + self.second(nn.functional.silu(hidden))


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers of these widths with smooth rectifiers between them."""
    layers = [layer for a, b in pairwise(widths) for layer in (linear(a, b, gain=2.0**0.5), nn.SiLU())]
    return nn.Sequential(*layers[:-1])

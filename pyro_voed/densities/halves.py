"""The halves of a coupling: how coordinates are split and permuted, and the network by which one half moves the other.

Between transforms the odd coordinates go before the even ones, which sorts them by one binary digit of their numbers
after the other. Split in the middle, every pair is separated within ceil(log2(dim)) transforms, the fewest possible.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Halves = tuple[Tensor, Tensor]
"""The coordinates in two parts. They stay apart between couplings: joining them cost up to a fifth of a step."""


def permute(halves: Halves) -> Halves:
    """Put the odd coordinates (counted from zero) before the even ones."""
    z = torch.cat(halves, -1)
    return z[..., 1::2], z[..., 0::2]


def unpermute(halves: Halves) -> Halves:
    """Undo `permute`."""
    odd, even = halves
    missing = even.shape[-1] - odd.shape[-1]
    z = torch.stack([even, F.pad(odd, (0, missing))], -1).flatten(-2)
    return split(z[..., : z.shape[-1] - missing])


def split(z: Float[Tensor, "*batch dim"]) -> Halves:
    """Return the first half of the coordinates, the smaller one, and the second."""
    dim = z.shape[-1]
    return z.split([dim // 2, dim - dim // 2], -1)


class Conditioner(nn.Module):
    """Give the raw parameters of one half from the other half and the features."""

    def __init__(self, fixed_dim: int, moved_dim: int, hidden_dim: int, num_parameters: int) -> None:
        super().__init__()
        self.shape = (moved_dim, num_parameters)
        self.from_features = nn.Linear(hidden_dim, hidden_dim)
        self.from_fixed = nn.Linear(fixed_dim, hidden_dim, bias=False) if fixed_dim else None
        self.out = nn.Linear(hidden_dim, moved_dim * num_parameters)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, fixed: Float[Tensor, "*#batch fixed_dim"], features: Float[Tensor, "*#batch hidden_dim"]
    ) -> Float[Tensor, "num_parameters ... moved_dim"]:
        """Return the raw parameters, which lead so that what follows is contiguous in the batch."""
        hidden = self.from_features(features)
        if self.from_fixed is None:
            # The batch dimensions that only theta has, so that those of the parameters align once these lead.
            hidden = hidden[(None,) * (fixed.ndim - hidden.ndim)]
        else:
            hidden = hidden + self.from_fixed(fixed)
        return self.out(F.silu(hidden)).unflatten(-1, self.shape).movedim(-1, 0).contiguous()

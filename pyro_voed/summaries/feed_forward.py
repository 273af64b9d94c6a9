"""A summary of a vector of fixed size and order: hidden layers, with the plain linear map beside them.

References:
    B. Jiang, T.-Y. Wu, C. Zheng and W. H. Wong (2017), Learning summary statistic for approximate Bayesian computation
    via deep neural network. Statistica Sinica 27.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.summaries.layers import ResidualBlock, check_sizes, linear


@rebuildable
class FeedForwardSummary(nn.Module):
    """Summarise a vector with residual blocks.

    Args:
        dim: Dimension of the vector.
        summary_dim: Learned features; a rule of thumb is twice the number of the targets' sufficient statistics.
        hidden_dim: Width of the hidden layers.
        num_blocks: Residual blocks.

    Example:
        >>> import torch
        >>> FeedForwardSummary(100, 8)(torch.randn(5, 100)).shape
        torch.Size([5, 8])
    """

    def __init__(self, dim: int, summary_dim: int = 16, *, hidden_dim: int = 128, num_blocks: int = 2) -> None:
        super().__init__()
        check_sizes(dim=dim, summary_dim=summary_dim, hidden_dim=hidden_dim)
        check_count(num_blocks, "num_blocks", minimum=0)
        self.embed = linear(dim, hidden_dim)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden_dim) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(hidden_dim)
        self.out = linear(hidden_dim, summary_dim)
        self.skip = linear(dim, summary_dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch summary_dim"]:
        """Return the summary."""
        return self.skip(x) + self.out(self.norm(self.blocks(self.embed(x))))

    def layout(self, dim: int) -> tuple[Int[Tensor, " dim"], Int[Tensor, " dim"]]:
        """Return row and column of each input: one row of all."""
        return torch.zeros(dim, dtype=torch.long), torch.arange(dim)

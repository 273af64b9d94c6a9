"""A summary of a long series by convolutions.

Each block of two convolutions halves the length. The summary is made of mean and spread over the remaining times, and
of these times averaged in segments, which keep *when* something happened.

References:
    Z. Wang, W. Yan and T. Oates (2017), Time series classification from scratch with deep neural networks: a strong
    baseline. IJCNN.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.summaries.layers import check_sizes, mlp
from pyro_voed.summaries.series import split_series


@rebuildable
class ConvolutionalSummary(nn.Module):
    """Summarise a series with one-dimensional convolutions.

    Args:
        num_steps: Length of the series, at least `2 ** num_blocks`.
        num_channels: Numbers at each time, which stand together in the vector.
        summary_dim: Learned features.
        hidden_dim: Channels of the hidden layers.
        num_blocks: Blocks, each of which halves the length.
        kernel_size: Times that a convolution sees.
        num_segments: Parts of the series that are averaged separately.

    Example:
        >>> ConvolutionalSummary(num_steps=200, summary_dim=10)(torch.randn(5, 200)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        num_steps: int,
        num_channels: int = 1,
        summary_dim: int = 16,
        *,
        hidden_dim: int = 32,
        num_blocks: int = 3,
        kernel_size: int = 5,
        num_segments: int = 8,
    ) -> None:
        super().__init__()
        check_sizes(num_channels=num_channels, summary_dim=summary_dim, hidden_dim=hidden_dim)
        check_sizes(kernel_size=kernel_size, num_segments=num_segments)
        check_count(num_blocks, "num_blocks", minimum=0)
        self.num_steps = check_count(num_steps, "num_steps", minimum=2**num_blocks)
        self.num_channels = num_channels
        self.embed = nn.Conv1d(num_channels, hidden_dim, kernel_size, padding="same")
        self.blocks = nn.ModuleList(_Block(hidden_dim, kernel_size) for _ in range(num_blocks))
        num_segments = min(num_segments, num_steps // 2**num_blocks)
        self.segments = nn.AdaptiveAvgPool1d(num_segments)
        self.out = mlp([hidden_dim * (2 + num_segments), 2 * hidden_dim, summary_dim])

    def forward(self, x: Float[Tensor, "*batch series_dim"]) -> Float[Tensor, "*batch summary_dim"]:
        """Return the summary of series whose times stand one after the other."""
        hidden = self.embed(split_series(x, self.num_channels, self.num_steps).transpose(-1, -2))
        for block in self.blocks:
            hidden = block(hidden)
        mean = hidden.mean(-1)
        spread = (hidden - mean.unsqueeze(-1)).square().mean(-1)
        pooled = torch.cat([mean, spread, self.segments(hidden).flatten(1)], -1)
        return self.out(pooled).reshape(*x.shape[:-1], -1)


class _Block(nn.Module):
    """Two convolutions on normalised channels beside a residual path, at half the length."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.first = nn.Conv1d(dim, dim, kernel_size, padding="same")
        self.second = nn.Conv1d(dim, dim, kernel_size, padding="same")
        self.halve = nn.AvgPool1d(2)

    def forward(self, x: Float[Tensor, "batch dim num_steps"]) -> Float[Tensor, "batch dim half"]:
        hidden = self.second(nn.functional.silu(self.first(self.norm(x))))
        return self.halve(x + hidden)

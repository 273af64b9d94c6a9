r"""A summary of a series by a recurrent network.

The series goes through an LSTM or GRU, in both directions by default; the hidden states of all times (the context
vectors) are joined and go through an embedding network to the summary, as in Dong et al. (2025, appendix E.3). For
series of varying length only the last state of each direction is joined (`join="last"`).

References:
    S. Hochreiter and J. Schmidhuber (1997), Long short-term memory. Neural Computation 9.
    F. Gers, J. Schmidhuber and F. Cummins (2000), Learning to forget: continual prediction with LSTM. Neural
    Computation 12.
    K. Cho et al. (2014), Learning phrase representations using RNN encoder-decoder for statistical machine translation.
    Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational Bayesian optimal experimental design
    with normalizing flows".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.summaries.layers import check_sizes, mlp
from pyro_voed.summaries.series import split_series


@rebuildable
class RecurrentSummary(nn.Module):
    """Summarise a series with an LSTM or GRU.

    Args:
        num_steps: Length of the series.
        num_channels: Numbers at each time, which stand together in the vector.
        summary_dim: Learned features.
        hidden_dim: Size of the hidden state of each direction.
        num_layers: Recurrent layers.
        cell: `nn.LSTM` or `nn.GRU`.
        bidirectional: Go through the series in both directions.
        join: "all" joins the hidden states of all times, "last" only the final one of each direction, for series of any
            length.
        embedding: Widths of the hidden layers between the joined states and the summary.

    Example:
        >>> RecurrentSummary(num_steps=50, summary_dim=10)(torch.randn(5, 50)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        num_steps: int,
        num_channels: int = 1,
        summary_dim: int = 16,
        *,
        hidden_dim: int = 16,
        num_layers: int = 1,
        cell: type[nn.LSTM] | type[nn.GRU] = nn.LSTM,
        bidirectional: bool = True,
        join: Literal["all", "last"] = "all",
        embedding: Sequence[int] = (40, 20),
    ) -> None:
        super().__init__()
        check_sizes(num_steps=num_steps, num_channels=num_channels, summary_dim=summary_dim)
        check_sizes(hidden_dim=hidden_dim, num_layers=num_layers)
        if join not in ("all", "last"):
            raise ValueError(f"join: expected 'all' or 'last', got {join!r}.")
        self.num_steps, self.num_channels, self.join = num_steps, num_channels, join
        self.recurrent = cell(num_channels, hidden_dim, num_layers, batch_first=True, bidirectional=bidirectional)
        for name, weight in self.recurrent.named_parameters():
            if "weight" in name:
                for gate in weight.chunk(4 if cell is nn.LSTM else 3):
                    nn.init.orthogonal_(gate)
        width = hidden_dim * (2 if bidirectional else 1)
        self.out = mlp([width * (num_steps if join == "all" else 1), *embedding, summary_dim])

    def forward(self, x: Float[Tensor, "*batch series_dim"]) -> Float[Tensor, "*batch summary_dim"]:
        """Return the summary of series whose times stand one after the other."""
        num_steps = self.num_steps if self.join == "all" else None
        states, _ = self.recurrent(split_series(x, self.num_channels, num_steps))
        if self.join == "all":
            joined = states.flatten(1)
        else:
            forth, back = states[:, -1], states[:, 0]
            size = self.recurrent.hidden_size
            joined = torch.cat([forth[:, :size], back[:, size:]], -1)
        return self.out(joined).reshape(*x.shape[:-1], -1)

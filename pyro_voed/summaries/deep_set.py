r"""A summary of a set of rows by pooling: the same network on every row, then means.

.. math::
    h_i = \phi(x_i), \qquad h_i \leftarrow h_i + f\Big(h_i, \tfrac1n \sum_j h_j\Big), \qquad
    s = \rho\Big(\tfrac1n \sum_i h_i, \; \text{moments of } x\Big)

With enough features every continuous function of a set has this form (Zaheer et al. 2017). Training such a network
is harder: where the mean of a row does not depend on the targets, common architectures learn some targets and ignore
the rest. Normalised inputs, orthogonal weights and residual paths (`layers`), and the moments of the rows on
a path of their own (`moments`), which also go into the summary as they are, prevent it.

References:
    M. Zaheer, S. Kottur, S. Ravanbakhsh, B. Poczos, R. Salakhutdinov and A. Smola (2017), Deep sets. NeurIPS.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.summaries.layers import ResidualBlock, check_sizes, linear
from pyro_voed.summaries.rows import SetHead, row_layout, row_statistics, split_rows


@rebuildable
class DeepSetSummary(nn.Module):
    """Summarise exchangeable rows with a deep set.

    Args:
        row_dim: Numbers in a row.
        summary_dim: Learned features. A rule of thumb is twice the number of the targets' sufficient statistics; the
            moments come on top of them.
        hidden_dim: Width of the hidden layers.
        num_blocks: Residual blocks that every row goes through; each also sees the mean over the rows.
        moments: Give moments and extremes of the rows to the last layers and to the summary.
        cross: Also the correlations of all pairs of columns.
        masked: Rows carry one more number, 1 where the row is present and 0 where it is not (a set of varying size is
            filled up with such rows); at least one must be present.

    Example:
        >>> import torch
        >>> summary = DeepSetSummary(row_dim=3, summary_dim=8)
        >>> rows = torch.randn(5, 10, 3)  # five sets of ten rows
        >>> summary(rows.flatten(1)).shape  # eight features, and five statistics of each column
        torch.Size([5, 23])
    """

    def __init__(
        self,
        row_dim: int,
        summary_dim: int = 16,
        *,
        hidden_dim: int = 64,
        num_blocks: int = 2,
        moments: bool = True,
        cross: bool = False,
        masked: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"row_dim": row_dim, "summary_dim": summary_dim, "hidden_dim": hidden_dim}
        check_sizes(**sizes)
        check_count(num_blocks, "num_blocks", minimum=0)
        self.row_dim, self.masked, self.cross = row_dim, masked, cross
        self.embed = linear(row_dim, hidden_dim)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_dim, hidden_dim) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = SetHead(hidden_dim, **sizes, moments=moments, cross=cross, masked=masked)

    def forward(self, x: Float[Tensor, "*batch set_dim"]) -> Float[Tensor, "*batch summary_dim"]:
        """Return the summary of sets whose rows stand one after the other."""
        rows, weights, log_size = split_rows(x, self.row_dim, masked=self.masked)
        share = 1.0 / rows.shape[-2] if weights is None else weights
        hidden = self.embed(rows)
        for block in self.blocks:
            pooled = (hidden * share).sum(-2, keepdim=True)
            hidden = block(hidden, pooled)
        return self.head((self.norm(hidden) * share).sum(-2), rows, weights, log_size)

    def layout(self, dim: int) -> tuple[Int[Tensor, " dim"], Int[Tensor, " dim"]]:
        """Return row and column of each input; entries of one column share a scale, those of column -1 have none."""
        return row_layout(dim, self.row_dim, masked=self.masked)

    def fixed_features(self, x: Float[Tensor, "*batch set_dim"]) -> Float[Tensor, "*batch num_statistics"]:
        """Return moments and extremes of the rows, which no weight enters."""
        return row_statistics(x, self.row_dim, masked=self.masked, cross=self.cross)

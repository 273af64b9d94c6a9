r"""A summary of a set of rows by attention: rows attend to each other, then a few learned queries attend to all rows.

.. math::
    h \leftarrow h + \operatorname{attention}(h, h, h), \qquad h \leftarrow h + f(h), \qquad
    s = \rho\big(\operatorname{attention}(\text{seeds}, h, h), \; \text{moments of } x\big)

with every input normalised first. With `num_inducing` the rows attend to that many learned summaries of all rows and
not to each other, at a cost proportional to the number of rows, not to its square. As in `deep_set`, the moments of the
rows take a path of their own.

References:
    J. Lee, Y. Lee, J. Kim, A. R. Kosiorek, S. Choi and Y. W. Teh (2019), Set transformer: a framework for
    attention-based permutation-invariant neural networks. ICML, equations 7 to 11.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.summaries.layers import ResidualBlock, check_sizes, linear
from pyro_voed.summaries.rows import SetHead, row_layout, row_statistics, split_rows


@rebuildable
class SetTransformerSummary(nn.Module):
    """Summarise exchangeable rows with a set transformer.

    `row_dim`, `summary_dim`, `moments`, `cross` and `masked` as in `DeepSetSummary`.

    Args:
        hidden_dim: Width of the hidden layers, a multiple of `num_heads`.
        num_blocks: Blocks of attention among the rows.
        num_heads: Heads of every attention.
        num_seeds: Learned queries that pool the rows.
        num_inducing: Learned points through which the rows attend to each other; None for direct attention.

    Example:
        >>> SetTransformerSummary(row_dim=3, summary_dim=8)(torch.randn(5, 10 * 3)).shape
        torch.Size([5, 23])
    """

    def __init__(
        self,
        row_dim: int,
        summary_dim: int = 16,
        *,
        hidden_dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 4,
        num_seeds: int = 4,
        num_inducing: int | None = None,
        moments: bool = True,
        cross: bool = False,
        masked: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"row_dim": row_dim, "summary_dim": summary_dim, "hidden_dim": hidden_dim}
        check_sizes(**sizes, num_heads=num_heads, num_seeds=num_seeds)
        check_count(num_blocks, "num_blocks", minimum=0)
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim: expected a multiple of num_heads {num_heads}, got {hidden_dim}.")
        if num_inducing is not None:
            check_count(num_inducing, "num_inducing")
        self.row_dim, self.masked, self.cross = row_dim, masked, cross
        self.embed = linear(row_dim, hidden_dim)
        self.blocks = nn.ModuleList(_Block(hidden_dim, num_heads, num_inducing) for _ in range(num_blocks))
        self.seeds = _points(num_seeds, hidden_dim)
        self.pool = _Attention(hidden_dim, num_heads)
        self.norm = nn.LayerNorm(hidden_dim)
        pooled_dim = num_seeds * hidden_dim
        self.head = SetHead(pooled_dim, **sizes, moments=moments, cross=cross, masked=masked)

    def forward(self, x: Float[Tensor, "*batch set_dim"]) -> Float[Tensor, "*batch summary_dim"]:
        """Return the summary of sets whose rows stand one after the other."""
        rows, weights, log_size = split_rows(x, self.row_dim, masked=self.masked)
        seen = None if weights is None else (weights > 0).squeeze(-1)[..., None, None, :]  # heads and queries broadcast
        hidden = self.embed(rows)
        for block in self.blocks:
            hidden = block(hidden, seen)
        pooled = self.norm(self.pool(self.seeds.expand(*hidden.shape[:-2], -1, -1), hidden, seen)).flatten(-2)
        return self.head(pooled, rows, weights, log_size)

    def layout(self, dim: int) -> tuple[Int[Tensor, " dim"], Int[Tensor, " dim"]]:
        """Return row and column of each input; entries of one column share a scale, those of column -1 have none."""
        return row_layout(dim, self.row_dim, masked=self.masked)

    def fixed_features(self, x: Float[Tensor, "*batch set_dim"]) -> Float[Tensor, "*batch num_statistics"]:
        """Return moments and extremes of the rows, which no weight enters."""
        return row_statistics(x, self.row_dim, masked=self.masked, cross=self.cross)


class _Attention(nn.Module):
    """Attention of queries to normalised rows, with several heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_norm, self.row_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = linear(dim, dim), linear(dim, dim), linear(dim, dim)
        self.out = linear(dim, dim)

    def forward(
        self,
        queries: Float[Tensor, "*batch num_queries dim"],
        rows: Float[Tensor, "*batch num_rows dim"],
        seen: Tensor | None,
    ) -> Float[Tensor, "*batch num_queries dim"]:
        normed = self.row_norm(rows)
        parts = (self.query(self.query_norm(queries)), self.key(normed), self.value(normed))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3) for part in parts)
        # Written out, because torch's fused attention does not stack under `vmap`.
        score = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
        if seen is not None:
            score = torch.where(seen, score, -torch.inf)
        looked = score.softmax(-1) @ value
        return queries + self.out(looked.transpose(-2, -3).flatten(-2))


class _Block(nn.Module):
    """Rows attend to each other, directly or through inducing points, then each goes through a residual block."""

    def __init__(self, dim: int, num_heads: int, num_inducing: int | None) -> None:
        super().__init__()
        self.points = None if num_inducing is None else _points(num_inducing, dim)
        self.gather = None if num_inducing is None else _Attention(dim, num_heads)
        self.look = _Attention(dim, num_heads)
        self.residual = ResidualBlock(dim)

    def forward(
        self, rows: Float[Tensor, "*batch num_rows dim"], seen: Tensor | None
    ) -> Float[Tensor, "*batch num_rows dim"]:
        if self.points is None or self.gather is None:
            return self.residual(self.look(rows, rows, seen))
        gathered = self.gather(self.points.expand(*rows.shape[:-2], -1, -1), rows, seen)
        return self.residual(self.look(rows, gathered, None))


def _points(number: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(number, dim))

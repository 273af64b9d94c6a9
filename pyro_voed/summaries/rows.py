"""What summaries of sets share: how rows come, and how pooled features and raw moments become the summary.

Rows come one after the other in a vector. In a masked set each ends with a number that says whether the row is present.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_voed.summaries.layers import mlp
from pyro_voed.summaries.moments import num_statistics, row_extremes, row_moments

Rows = Float[Tensor, "*batch num_rows row_dim"]
Weights = Float[Tensor, "*batch num_rows 1"]
LogSize = Float[Tensor, "*batch 1"]


def split_rows(
    x: Float[Tensor, "*batch set_dim"], row_dim: int, *, masked: bool
) -> tuple[Rows, Weights | None, LogSize | None]:
    """Return the rows, their weights in a mean, and the log of their number; the last two None where all are present.

    Absent rows are set to zero.
    """
    size = row_dim + masked
    if x.shape[-1] == 0 or x.shape[-1] % size:
        what = f"row_dim {row_dim}" + (" and one number that says whether the row is present" if masked else "")
        raise ValueError(
            f"summary: expected vectors of whole rows, each of {what}, got {x.shape[-1]} numbers. Give row_dim as the "
            "outcome has it."
        )
    rows = x.unflatten(-1, (-1, size))
    if not masked:
        return rows, None, None
    rows, present = rows.split([row_dim, 1], -1)
    present = (present > 0.5).to(rows)
    number = present.sum(-2, keepdim=True)
    return rows * present, present / number, number.log().squeeze(-2)


def row_layout(dim: int, row_dim: int, *, masked: bool) -> tuple[Int[Tensor, " dim"], Int[Tensor, " dim"]]:
    """Return row and column of every number of a vector of rows; column -1 where it says whether a row is present."""
    places = torch.arange(dim)
    column = places % (row_dim + masked)
    return places // (row_dim + masked), torch.where(column < row_dim, column, -1)


def row_statistics(
    x: Float[Tensor, "*batch set_dim"], row_dim: int, *, masked: bool, cross: bool
) -> Float[Tensor, "*batch num_statistics"]:
    """Return what is known of a set without weights: moments and extremes of its rows, and the log of their number."""
    rows, weights, log_size = split_rows(x, row_dim, masked=masked)
    return torch.cat(_raw(rows, weights, cross=cross) + ([] if log_size is None else [log_size]), -1)


def _raw(rows: Rows, weights: Weights | None, *, cross: bool) -> list[Tensor]:
    return [row_moments(rows, weights, cross=cross), row_extremes(rows, weights)]


class SetHead(nn.Module):
    """The last layers of a summary of a set: a network of pooled features and of the rows' moments and extremes.

    These also go into the summary as they are, as does the log of the number of rows where it varies (`masked`).
    """

    def __init__(
        self,
        pooled_dim: int,
        *,
        row_dim: int,
        hidden_dim: int,
        summary_dim: int,
        moments: bool,
        cross: bool,
        masked: bool,
    ) -> None:
        super().__init__()
        self.moments, self.cross = moments, cross
        num_raw = num_statistics(row_dim, cross=cross) if moments else 0
        self.out = mlp([pooled_dim + num_raw + masked, hidden_dim, summary_dim])

    def forward(
        self, pooled: Float[Tensor, "*batch pooled_dim"], rows: Rows, weights: Weights | None, log_size: LogSize | None
    ) -> Float[Tensor, "*batch summary_dim"]:
        """Return the summary."""
        raw = _raw(rows, weights, cross=self.cross) if self.moments else []
        raw += [] if log_size is None else [log_size]
        return torch.cat([self.out(torch.cat([pooled, *raw], -1)), *raw], -1)

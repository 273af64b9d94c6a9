"""Sets as they come: rows one after the other in a vector, with a last number that says whether the row is there."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def split_rows(
    x: Float[Tensor, "*batch set_dim"], row_dim: int, *, masked: bool
) -> tuple[
    Float[Tensor, "*batch num_rows row_dim"],
    Float[Tensor, "*batch num_rows 1"] | None,
    Float[Tensor, "*batch 1"] | None,
]:
    """Return the rows, their weights in a mean, and the log of their number; the last two None where all are there.

    Rows that are not there come as zeros, whatever stood in them.

    Raises:
        ValueError: If the vector does not hold whole rows.
    """
    size = row_dim + masked
    if x.shape[-1] == 0 or x.shape[-1] % size:
        what = f"row_dim {row_dim}" + (" and one number that says whether the row is there" if masked else "")
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


def row_groups(dim: int, row_dim: int, *, masked: bool) -> Int[Tensor, " dim"]:
    """Return the column of every number of a vector of rows; -1 for what says whether the row is there."""
    column = torch.arange(dim) % (row_dim + masked)
    return torch.where(column < row_dim, column, -1)

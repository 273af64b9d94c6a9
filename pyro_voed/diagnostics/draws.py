"""Sets of draws to compare: as matrices, with columns matched by name and chains thinned to what they are worth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_finite, check_shape
from pyro_voed.posterior_sample import PosteriorSample

MIN_DRAWS = 100
"""Fewest draws of a set: below, one standard error of a share is 0.05 and little could be said."""


@dataclass(frozen=True)
class Draws:
    """Draws as a matrix, and how many independent draws those of each column are worth, at most `num_draws`.

    `named` says whether the columns are named by sites rather than numbered.
    """

    matrix: Float[Tensor, "num_draws dim"]
    effective: Float[Tensor, " dim"]
    columns: tuple[str, ...]
    named: bool

    def thinned(self) -> Float[Tensor, "num_kept dim"]:
        """Return evenly spaced rows, as many as the least effective number over the columns."""
        num_kept, num_draws = int(self.effective.min()), len(self.matrix)
        return self.matrix[torch.arange(num_kept, device=self.matrix.device) * num_draws // num_kept]


def matched_draws(
    first: PosteriorSample | Tensor, second: PosteriorSample | Tensor, arguments: tuple[str, str] = ("first", "second")
) -> tuple[Draws, Draws]:
    """Return two sets of draws with the columns of the first: matched by name where both have names, else by place."""
    ours, theirs = (as_draws(sample, name) for sample, name in zip((first, second), arguments, strict=True))
    by_name = ours.named and theirs.named
    if len(ours.columns) != len(theirs.columns) or (by_name and set(ours.columns) != set(theirs.columns)):
        raise ValueError(
            f"{arguments[1]}: expected the columns {list(ours.columns)} of {arguments[0]}, got {list(theirs.columns)}."
        )
    if by_name:
        order = [theirs.columns.index(name) for name in ours.columns]
        theirs = replace(theirs, matrix=theirs.matrix[:, order], effective=theirs.effective[order])
    return ours, replace(theirs, matrix=theirs.matrix.to(ours.matrix.device), columns=ours.columns)


def as_draws(sample: PosteriorSample | Tensor, argument: str, fewest: int = MIN_DRAWS) -> Draws:
    """Return a posterior sample or a plain matrix of independent draws as `Draws`, checked."""
    matrix = (sample.matrix() if isinstance(sample, PosteriorSample) else sample).detach()
    check_shape(matrix, (None, None), argument)
    if len(matrix) < fewest:
        raise ValueError(f"{argument}: expected at least {fewest} draws, got {len(matrix)}.")
    check_finite(matrix, argument)
    if constant := (matrix == matrix[:1]).all(0).nonzero().flatten().tolist():
        raise ValueError(f"{argument}: expected draws with spread, got columns {constant} constant. Leave them out.")
    if not isinstance(sample, PosteriorSample):
        size = matrix.new_full((matrix.shape[1],), len(matrix))
        return Draws(matrix, size, tuple(f"column {index}" for index in range(len(size))), False)
    effective = torch.cat([sample.effective_sample_size[name].flatten() for name in sample.values]).to(matrix)
    # Antithetic chains are worth more draws than they have; there are no more rows to take, though.
    return Draws(matrix, effective.clamp(max=len(matrix)), tuple(sample.columns), True)

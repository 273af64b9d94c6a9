"""A summary of several outcome sites: each part sees its own entries, the others pass unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.densities.whitening import fixed_features_of, layout_of


@rebuildable
class ComposedSummary(nn.Module):
    """Put summaries of parts of a vector side by side.

    Args:
        parts: One summary for each part.
        entries: The entries of the vector that each part sees, in its order.
        dim: Dimension of the vector; entries that no part sees go into the summary unchanged.
        description: What it is, in words, for results to print.

    Example:
        >>> from pyro_voed.summaries import DeepSetSummary
        >>> summary = ComposedSummary([DeepSetSummary(2, 8)], [torch.arange(20)], dim=21, description="ten pairs")
        >>> summary(torch.randn(5, 21)).shape  # eight features, ten statistics, and the last entry
        torch.Size([5, 19])
    """

    def __init__(
        self, parts: Sequence[nn.Module], entries: Sequence[Int[Tensor, " num"]], dim: int, description: str
    ) -> None:
        super().__init__()
        if len(parts) != len(entries):
            raise ValueError(f"entries: expected one index for each part, {len(parts)} of them, got {len(entries)}.")
        seen = torch.cat([own.flatten() for own in entries])
        if seen.numel() and not (0 <= int(seen.min()) and int(seen.max()) < dim):
            raise ValueError(
                f"entries: expected numbers from 0 to {dim - 1}, got {int(seen.min())} to {int(seen.max())}."
            )
        self.parts = nn.ModuleList(parts)
        self.description = description
        for number, own in enumerate(entries):
            self.register_buffer(f"entries_{number}", own, persistent=False)
        unseen = torch.ones(dim, dtype=torch.bool)
        unseen[seen] = False
        self.register_buffer("rest", unseen.nonzero().flatten(), persistent=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch summary_dim"]:
        """Return the summaries of the parts, then what no part sees."""
        features = [
            part(x.index_select(-1, self.get_buffer(f"entries_{number}"))) for number, part in enumerate(self.parts)
        ]
        return torch.cat([*features, x.index_select(-1, self.get_buffer("rest"))], -1)

    def layout(self, dim: int) -> tuple[Int[Tensor, " dim"], Int[Tensor, " dim"]]:
        """Return row and column of each input: those of the parts, and one row of all that no part sees."""
        rows, columns = torch.zeros(dim, dtype=torch.long), torch.arange(dim)
        for number, part in enumerate(self.parts):
            entries = self.get_buffer(f"entries_{number}").cpu()
            own_rows, own_columns = layout_of(part, len(entries))
            # Numbers that no other part has.
            rows[entries] = dim * (number + 1) + own_rows
            columns[entries] = torch.where(own_columns >= 0, dim * (number + 1) + own_columns, own_columns)
        return rows, columns

    def fixed_features(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch num_features"]:
        """Return what the parts and the rest say before anything is learned."""
        seen = [x.index_select(-1, self.get_buffer(f"entries_{number}")) for number in range(len(self.parts))]
        known = [fixed_features_of(part, own) for part, own in zip(self.parts, seen, strict=True)]
        return torch.cat([*known, x.index_select(-1, self.get_buffer("rest"))], -1)

"""Series as they come: the numbers of one time after those of the other, in a vector."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def split_series(
    x: Float[Tensor, "*batch series_dim"], num_channels: int, num_steps: int | None
) -> Float[Tensor, "num num_steps num_channels"]:
    """Return series as rows of times, the batch flattened; `num_steps` None takes any number of times."""
    steps, left = divmod(x.shape[-1], num_channels)
    if left or steps != (num_steps or steps):
        raise ValueError(
            f"summary: expected series of {num_steps or 'any number of'} times {num_channels} numbers, got "
            f"{x.shape[-1]} numbers. Give num_steps and num_channels as the outcome has them."
        )
    return x.reshape(-1, steps, num_channels)

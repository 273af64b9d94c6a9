"""Layers that densities and critics are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers of these widths with smooth rectifiers between them."""
    layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def rescale_layer_(layer: nn.Module, factor: Float[Tensor, " dim"], shift: Float[Tensor, " dim"]) -> None:
    """Let a linear layer stay the same function of inputs c that from now on come as (c - shift) / factor, in place."""
    assert isinstance(layer, nn.Linear)
    layer.bias.add_(layer.weight @ shift)
    layer.weight.mul_(factor)

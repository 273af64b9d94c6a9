"""Layers that densities and critics are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers of these widths with smooth rectifiers between them."""
    layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.SiLU())]
    return nn.Sequential(*layers[:-1])

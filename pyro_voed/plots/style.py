"""Colours, line styles and the small helpers that all figures share.

Colours are those of Okabe and Ito, told apart with any common colour vision; line styles or markers repeat what they
say. Neither the backend nor matplotlib's global settings are touched.

References:
    M. Okabe and K. Ito (2008), "Color universal design".
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, BLACK = "0.55", "0.1"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
LINE_STYLES = ("-", (0, (5, 1.5)), "-.", (0, (2, 1)), (0, (7, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)))
SIDES = {"lower": "lower bound", "upper": "upper bound", "consistent": "reference", "neither": "no guaranteed side"}


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (6.0, 3.8)) -> Axes:
    """Return the axes given, or those of a new figure."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def to_numpy(values: Tensor) -> np.ndarray:
    """Return values that matplotlib can draw."""
    return values.detach().cpu().numpy()


def check_shape(values: Tensor, shape: tuple[int | None, ...], argument: str) -> None:
    """Raise ValueError unless the shape is the one wanted, None standing for any size."""
    if values.ndim != len(shape) or any(w not in (None, size) for w, size in zip(shape, values.shape, strict=True)):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{argument}: expected shape {wanted}, got {tuple(values.shape)}.")

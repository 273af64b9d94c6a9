"""Colours, line styles and the small helpers that all figures share.

Colours are those of Okabe and Ito, which any common colour vision distinguishes; line styles or markers repeat what
they say. Neither the backend nor matplotlib's global settings are touched.

References:
    M. Okabe and K. Ito (2008), "Color universal design".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from pyro_voed.checks import check_known
from pyro_voed.results import EIGResult

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


def colours_of(number: int) -> Sequence[Any] | np.ndarray:
    """Return colours for so many curves."""
    # Beyond the palette neighbours share a hue: what is read then is the order, not the single line.
    return COLOURS if number <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.9, number))


def only_label(values: Mapping[str, Tensor], label: str | None) -> str:
    """Return the label of a design; it may be left out where there is only one."""
    if label is not None:
        check_known([label], values, "design_label", "design")
        return label
    if len(values) != 1:
        raise ValueError(f"design_label: expected one of {list(values)}, as there are several designs.")
    return next(iter(values))


def along_design(result: EIGResult, label: str | None) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Return the label of a scalar design, its values in order, and that order; None at a single design."""
    shape = tuple(result.eig.shape)
    if len(shape) > 1:
        raise ValueError(
            f"result: expected one design or a one-dimensional batch, got a batch of shape {shape}. Draw one slice at "
            "a time."
        )
    if result.eig.numel() == 1:
        return None
    label = only_label(result.designs, label)
    designs = result.designs[label]
    if designs.numel() != result.eig.numel():
        raise ValueError(
            f"design_label: expected a scalar design, but each {label!r} has shape {tuple(designs.shape[1:])}."
        )
    x = to_numpy(designs.flatten())
    order = x.argsort()
    return label, x[order], order


def bars(
    ax: Axes, estimates: Sequence[tuple[Tensor, Tensor]], labels: Sequence[str], looks: Sequence[tuple[str, str]]
) -> None:
    """Draw estimates with bars of two standard errors side by side, each with a colour and a marker."""
    for position, ((value, error), label, (colour, marker)) in enumerate(zip(estimates, labels, looks, strict=True)):
        height, reach = value.item(), 2 * error.item()
        ax.errorbar(position, height, yerr=reach, color=colour, marker=marker, capsize=4, linestyle="none", label=label)

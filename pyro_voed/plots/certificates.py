"""Figures of certified intervals: how far the truth can be from what was estimated, and at which designs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from pyro_voed.plots.style import BLUE, GREEN, LINE_STYLES, VERMILLION, along_design, axes_or_new, bars, to_numpy
from pyro_voed.results import Certificate, EIGResult

HEIGHTS = (5, 2)
"""Heights of the axes of the interval and of those of the gap below, in proportion."""


def plot_certificate(result: EIGResult, design_label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a certified interval with its two bounds, and against a scalar design the gap between them.

    The interval reaches beyond the bounds by their standard errors. Over several designs the axes make room for second
    ones below, the last of `ax.figure.axes`, with the gap `upper - lower` and the width of the interval against the
    design.

    Args:
        result: What `certify` or `eig_flow(certify=True)` returned, at one design or over a one-dimensional batch of
            scalar designs.
        design_label: Which design is the horizontal axis; may be left out where there is only one.
    """
    certificate = result.certificate
    if certificate is None:
        raise ValueError("result: it has no certificate. Call certify first, or eig_flow with certify=True.")
    place = along_design(result, design_label)
    if place is None:
        ax = _at_one_design(certificate, axes_or_new(ax, (3.6, 3.6)))
    else:
        ax = _against_design(certificate, *place, axes_or_new(ax, (6.0, 5.2)))
    ax.set(ylabel="expected information gain (nats)")
    ax.legend(frameon=False, fontsize="small")
    return ax


def _at_one_design(certificate: Certificate, ax: Axes) -> Axes:
    low, high = certificate.interval.flatten().tolist()
    ax.axhspan(low, high, color=GREEN, alpha=0.25, linewidth=0, label=_interval_name(certificate))
    sides = [
        (certificate.lower, certificate.lower_standard_error),
        (certificate.upper, certificate.upper_standard_error),
    ]
    names = ("lower bound", "upper bound")
    labels = [f"{name} {value.item():.4g}" for name, (value, _) in zip(names, sides, strict=True)]
    bars(ax, sides, labels, [(BLUE, "^"), (VERMILLION, "v")])
    ax.set_xticks((0, 1), [f"{name}\n(±2 standard errors)" for name in names], fontsize="small")
    # Room above the interval for the legend.
    ax.set(xlim=(-0.6, 1.6), ylim=(low - 0.3 * (high - low), high + 0.9 * (high - low)))
    return ax


def _against_design(certificate: Certificate, label: str, x: np.ndarray, order: np.ndarray, ax: Axes) -> Axes:
    low, high = to_numpy(certificate.interval)[:, order]
    lower, upper = to_numpy(certificate.lower)[order], to_numpy(certificate.upper)[order]
    marker = "." if len(x) <= 30 else None
    ax.fill_between(x, low, high, color=GREEN, alpha=0.25, linewidth=0, label=_interval_name(certificate))
    ax.plot(x, upper, color=VERMILLION, linestyle=LINE_STYLES[1], marker=marker, label="upper bound")
    ax.plot(x, lower, color=BLUE, linestyle=LINE_STYLES[0], marker=marker, label="lower bound")
    below = _axes_below(ax)
    below.plot(x, high - low, color=GREEN, linestyle=LINE_STYLES[2], marker=marker, label="width of the interval")
    below.plot(x, upper - lower, color="0.1", marker=marker, label="gap: upper - lower")
    below.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    below.set(xlabel=label, ylabel="gap (nats)")
    below.legend(frameon=False, fontsize="small")
    ax.tick_params(labelbottom=False)
    return ax


def _axes_below(ax: Axes) -> Axes:
    """Give the lower part of the place of axes to new ones that share the horizontal axis."""
    figure, place = ax.figure, ax.get_subplotspec()
    if place is not None:
        grid = place.subgridspec(2, 1, height_ratios=HEIGHTS)
        upper, lower = grid[0, 0], grid[1, 0]
        ax.set_subplotspec(upper)
        return figure.add_subplot(lower, sharex=ax)
    # Axes put in by hand stand in no grid.
    box, share = ax.get_position(), HEIGHTS[1] / sum(HEIGHTS)
    ax.set_position((box.x0, box.y0 + share * box.height, box.width, (1 - share) * box.height))
    return figure.add_axes((box.x0, box.y0, box.width, 0.85 * share * box.height), sharex=ax)


def _interval_name(certificate: Certificate) -> str:
    word = "certified" if certificate.certified else "uncertified"
    together = ", all together" if certificate.lower.numel() > 1 else ""
    return f"{word} {certificate.confidence:.3g} interval{together}"

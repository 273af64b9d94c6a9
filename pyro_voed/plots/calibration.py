"""Figures of calibration and recovery: what to look at when a check fails.

In all of them the grey band holds the curves of a right posterior, all at once, with the stated confidence: a curve
that leaves it anywhere is a failed check.

References:
    T. Säilynoja, P.-C. Bürkner and A. Vehtari (2022), Graphical test for discrete uniformity (ECDF and its difference).
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from pyro_voed.diagnostics.calibration import SBCResult
from pyro_voed.diagnostics.coverage import CoverageResult
from pyro_voed.diagnostics.recovery import RecoveryResult
from pyro_voed.diagnostics.tarp import TARPResult
from pyro_voed.plots.style import BLACK, BLUE, COLOURS, GREY, LINE_STYLES, VERMILLION, axes_or_new, to_numpy

MOST_NAMED = 12
"""More curves than this are drawn alike, with one entry in the legend."""


def plot_sbc(result: SBCResult, *, difference: bool = True, ax: Axes | None = None) -> Axes:
    """Draw the ECDF of the ranks of every column with the band that it keeps to under calibration.

    As a difference from the diagonal, in which small departures can be seen, a posterior too narrow shows as a hill on
    the left and a valley on the right, one too wide the other way round; biased up is a hill in the middle and biased
    down a valley.

    Example:
        >>> import torch
        >>> from pyro_voed.diagnostics import SimulatedPosteriors, sbc
        >>> simulated = SimulatedPosteriors(torch.randn(100, 1), torch.randn(100, 50, 1), ("theta",))
        >>> plot_sbc(sbc(simulated, seed=0)).get_xlabel()
        'normalised rank of the truth'
    """
    ax = axes_or_new(ax, (6.6, 3.8))
    curves = dict(zip(result.columns, result.ecdf.T, strict=True))
    _draw(ax, result, result.points, curves, difference)
    ax.set(xlabel="normalised rank of the truth", ylabel="ECDF less diagonal" if difference else "share of ranks below")
    ax.set_title(_title("simulation-based calibration", result))
    return ax


def plot_coverage(result: CoverageResult, *, difference: bool = False, ax: Axes | None = None) -> Axes:
    """Draw expected coverage, or its difference from the level, for the joint region and the intervals of every column.

    Below the diagonal the posterior is too narrow (or in the wrong place), above it too wide.

    Example:
        >>> import torch
        >>> from pyro_voed.diagnostics import SimulatedPosteriors, expected_coverage
        >>> simulated = SimulatedPosteriors(torch.randn(100, 1), torch.randn(100, 50, 1), ("theta",))
        >>> plot_coverage(expected_coverage(simulated, seed=0)).get_xlabel()
        'credibility of the region'
    """
    ax = axes_or_new(ax, (7.2, 3.8) if difference else (6.6, 4.4))
    joint = {} if result.joint is None else {"joint, highest density": result.joint.coverage}
    _draw(ax, result, result.levels, {region.name: region.coverage for region in result.columns}, difference, joint)
    ax.set(xlabel="credibility of the region")
    ax.set(ylabel="coverage less credibility" if difference else "share of regions with the truth")
    ax.set_title(_title("expected coverage", result))
    return ax


def plot_tarp(result: TARPResult, *, difference: bool = False, ax: Axes | None = None) -> Axes:
    """Draw the coverage of balls around random references against its level, or its difference from it.

    Too little coverage at the high levels, often with too much at the low ones, is that of a posterior too narrow.

    Example:
        >>> import torch
        >>> from pyro_voed.diagnostics import SimulatedPosteriors, tarp
        >>> simulated = SimulatedPosteriors(torch.randn(100, 2), torch.randn(100, 50, 2), ("a", "b"))
        >>> plot_tarp(tarp(simulated, seed=0)).get_xlabel()
        'posterior mass of the ball'
    """
    ax = axes_or_new(ax, (6.0, 3.8) if difference else (4.6, 4.4))
    _draw(ax, result, result.levels, {f"balls, {result.num_references} a truth": result.coverage}, difference)
    ax.set(xlabel="posterior mass of the ball")
    ax.set(ylabel="coverage less mass" if difference else "share of balls with the truth")
    ax.set_title(_title("random points (TARP)", result))
    return ax


def plot_recovery(result: RecoveryResult, *, most_points: int = 200) -> np.ndarray:
    """Draw posterior means with central intervals against the truths, one pair of axes a column.

    Intervals that miss the truth are drawn in another colour. A flat cloud at the prior's mean is a quantity that the
    data say nothing about, or that was not learned. Of the experiments the first `most_points` are drawn; axes of the
    grid beyond the last column are hidden.

    Example:
        >>> import torch
        >>> from pyro_voed.diagnostics import SimulatedPosteriors, recovery
        >>> simulated = SimulatedPosteriors(torch.randn(100, 2), torch.randn(100, 50, 2), ("a", "b"))
        >>> plot_recovery(recovery(simulated)).shape
        (1, 2)
    """
    dim = len(result.columns)
    num_columns = min(dim, 4)
    num_rows = -(-dim // num_columns)
    size = (0.6 + 2.9 * num_columns, 0.7 + 3.0 * num_rows)
    figure, grid = plt.subplots(num_rows, num_columns, squeeze=False, figsize=size, layout="constrained")
    for index, ax in enumerate(grid.flat):
        if index < dim:
            _recovered(ax, result, index, most_points)
        else:
            ax.set_visible(False)
    figure.supxlabel("truth", fontsize="medium")
    figure.supylabel(f"posterior mean and {result.mass:.3g} interval", fontsize="medium")
    return grid


def _recovered(ax: Axes, result: RecoveryResult, index: int, most_points: int) -> None:
    truth, mean = (to_numpy(values[:most_points, index]) for values in (result.truths, result.posterior_mean))
    low, high = to_numpy(result.interval[:, :most_points, index])
    missed = (truth < low) | (truth > high)
    for chosen, colour, marker in ((~missed, BLUE, "o"), (missed, VERMILLION, "D")):
        ax.vlines(truth[chosen], low[chosen], high[chosen], color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(truth[chosen], mean[chosen], linestyle="none", marker=marker, markersize=2.5, color=colour)
    ends = (truth.min(), truth.max())
    ax.plot(ends, ends, color=BLACK, linewidth=1)
    ax.set_title(
        f"{result.columns[index]}\ncontraction {result.contraction[index]:.2f}, correlation "
        f"{result.correlation[index]:.2f}\noutside their interval: {missed.mean():.0%}",
        fontsize="small",
    )


def _draw(
    ax: Axes,
    result: SBCResult | CoverageResult | TARPResult,
    x: Tensor,
    curves: dict[str, Tensor],
    difference: bool,
    emphasised: dict[str, Tensor] | None = None,
) -> None:
    """Draw curves over the band, less the diagonal where asked for; all of them meet it at 0 and at 1."""
    at = np.concatenate([[0.0], to_numpy(x), [1.0]])

    def ends(values: Tensor) -> np.ndarray:
        return np.concatenate([[0.0], to_numpy(values), [1.0]]) - (at if difference else 0.0)

    band = f"{result.confidence:.3g} band"
    ax.fill_between(at, ends(result.lower), ends(result.upper), color=GREY, alpha=0.3, linewidth=0, label=band)
    ax.plot(at, np.zeros_like(at) if difference else at, color=GREY, linewidth=0.8)
    many = len(curves) > MOST_NAMED
    for index, (name, values) in enumerate(curves.items()):
        # The style shifts with every round of colours, so that no two of twelve curves look alike.
        style = LINE_STYLES[(index + index // len(COLOURS)) % len(LINE_STYLES)]
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linestyle": style, "label": name}
        if many:
            label = None if index else f"{len(curves)} columns"
            look = {"color": BLUE, "linewidth": 0.8, "alpha": 0.5, "label": label}
        ax.plot(at, ends(values), **look)
    for name, values in (emphasised or {}).items():
        ax.plot(at, ends(values), color=BLACK, linewidth=2.0, label=name)
    ax.set(xlim=(0, 1), ylim=None if difference else (0, 1))
    # Inside, a long legend would lie on one curve or another.
    outside = len(ax.get_legend_handles_labels()[1]) > 3
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if outside else {}
    ax.legend(frameon=False, fontsize="small", **place)


def _title(name: str, result: SBCResult | CoverageResult | TARPResult) -> str:
    return f"{name}: {'passed' if result.passed else 'failed'}, p = {result.p_value:.2g}"

"""Figures of posteriors: pair plots, and the grid of outcomes by parameters.

References:
    D. W. Scott (1992), Multivariate density estimation, equation 6.42 (bandwidth in two dimensions; ArviZ chooses
    that in one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pyro_voed.checks import check_known, check_shape
from pyro_voed.diagnostics.draws import as_draws
from pyro_voed.plots.style import BLACK, COLOURS, GREY, LINE_STYLES, to_numpy
from pyro_voed.posterior_sample import PosteriorSample
from pyro_voed.results import element_names

CONTOUR_MASSES = (0.5, 0.9)
"""Probability inside each contour of the pair plot."""

FEWEST_DRAWS = 10
"""Fewer make no density."""


def plot_posterior_pair(
    samples: Mapping[str, PosteriorSample | Tensor],
    *,
    prior: PosteriorSample | Tensor | None = None,
    true_values: Mapping[str, Tensor] | Tensor | None = None,
    column_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw posteriors over each other: marginal densities on the diagonal, contours of each pair below it.

    Contours hold 50 % and 90 % of the draws. Axes cover the posteriors, not the prior; those above the diagonal of the
    grid are hidden.

    Args:
        samples: Draws under the names for the legend; a plain matrix is `(num_draws, dim)`.
        prior: Draws of the prior; contours hold 90 %.
        true_values: Values the outcome was simulated from, by site or one for each column, `(dim,)`.
        column_names: Names for the axes; None takes those of the first sample.

    Example:
        >>> import torch
        >>> plot_posterior_pair({"flow": torch.randn(500, 2), "NUTS": torch.randn(500, 2)}).shape
        (2, 2)
    """
    curves, names = _curves(samples, prior, "samples")
    truth = _truth(true_values, names)
    dim = len(names)
    size = (1 + 2 * dim, 0.6 + 2 * dim)
    figure, grid = plt.subplots(dim, dim, squeeze=False, sharex="col", figsize=size, layout="constrained")
    limits = [_limits(curves[-len(samples) :], column, truth[column]) for column in range(dim)]
    for (row, column), ax in np.ndenumerate(grid):
        ax.set_visible(column <= row)
        ax.set_xlim(limits[column])
        if column == row:
            _marginals(ax, curves, row)
        elif column < row:
            ax.set_ylim(limits[row])
            for curve in curves:
                _contours(ax, curve.draws[:, [column, row]], curve.masses, curve.colour, curve.style)
        _mark_truth(ax, truth[column], truth[row] if column < row else np.nan)
    for index, name in enumerate(column_names or names):
        grid[-1, index].set_xlabel(name)
        if index > 0:
            grid[index, 0].set_ylabel(name)
    _shared_legend(figure, grid[0, 0], dim)
    return grid


def plot_posterior_grid(
    rows: Sequence[Mapping[str, PosteriorSample | Tensor]],
    *,
    prior: PosteriorSample | Tensor | None = None,
    true_values: Sequence[Mapping[str, Tensor] | Tensor] | None = None,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw the marginal posteriors of several outcomes: a row for each outcome, a column for each parameter.

    Args:
        rows: For each outcome its draws under the names for the legend, such as the flow's and a reference's.
        prior: Draws of the prior, shared by all rows.
        true_values: For each outcome what `plot_posterior_pair` takes.
        row_names: Names of the outcomes; None numbers them.
        column_names: Names of the parameters; None takes those of the first sample.

    Example:
        >>> import torch
        >>> rows = [{"flow": torch.randn(500, 2) + shift} for shift in (-1.0, 1.0)]
        >>> plot_posterior_grid(rows, prior=3.0 * torch.randn(500, 2)).shape
        (2, 2)
    """
    if not rows:
        raise ValueError("rows: expected at least one outcome, got none.")
    for argument, given in (("true_values", true_values), ("row_names", row_names)):
        if given is not None and len(given) != len(rows):
            raise ValueError(f"{argument}: expected one entry for each of the {len(rows)} rows, got {len(given)}.")
    sets = [_curves(row, prior, f"rows[{index}]") for index, row in enumerate(rows)]
    names, sizes = sets[0][1], [len(columns) for _, columns in sets]
    if len(set(sizes)) > 1:
        raise ValueError(f"rows: expected the same dimension in all, got {sizes}.")
    dim = len(names)
    size = (1 + 2.4 * dim, 0.7 + 1.5 * len(rows))
    figure, grid = plt.subplots(len(rows), dim, squeeze=False, sharex="col", figsize=size, layout="constrained")
    for index, (curves, _) in enumerate(sets):
        truth = _truth(None if true_values is None else true_values[index], names)
        for column in range(dim):
            _marginals(grid[index, column], curves, column)
            _mark_truth(grid[index, column], truth[column], np.nan)
        grid[index, 0].set_ylabel(row_names[index] if row_names is not None else f"outcome {index + 1}")
    for column, name in enumerate(column_names or names):
        grid[-1, column].set_xlabel(name)
    _shared_legend(figure, grid[0, 0], dim)
    return grid


@dataclass(frozen=True)
class _Curve:
    """Draws under a name, and how they are drawn."""

    name: str
    draws: np.ndarray
    colour: str
    style: object
    masses: tuple[float, ...]


def _curves(
    samples: Mapping[str, PosteriorSample | Tensor], prior: PosteriorSample | Tensor | None, argument: str
) -> tuple[list[_Curve], tuple[str, ...]]:
    """Return what is to be drawn, the prior first, and the column names of the first sample."""
    if not 1 <= len(samples) <= len(COLOURS):
        raise ValueError(f"{argument}: expected 1 to {len(COLOURS)} samples to draw, got {len(samples)}.")
    found = {name: as_draws(sample, f"{argument}[{name!r}]", FEWEST_DRAWS) for name, sample in samples.items()}
    curves = [
        _Curve(name, to_numpy(draws.matrix.double()), colour, style, CONTOUR_MASSES)
        for (name, draws), colour, style in zip(found.items(), COLOURS, LINE_STYLES, strict=False)
    ]
    if prior is not None:
        matrix = as_draws(prior, "prior", FEWEST_DRAWS).matrix
        curves.insert(0, _Curve("prior", to_numpy(matrix.double()), GREY, ":", CONTOUR_MASSES[1:]))
    columns = next(iter(found.values())).columns
    for curve in curves:
        if (dim := curve.draws.shape[1]) != len(columns):
            raise ValueError(f"{argument}: expected dimension {len(columns)} throughout, got {dim} in {curve.name!r}.")
    return curves, columns


def _truth(values: Mapping[str, Tensor] | Tensor | None, columns: Sequence[str]) -> np.ndarray:
    """Return the true value of each column; NaN, which matplotlib does not draw, where there is none."""
    if values is None:
        return np.full(len(columns), np.nan)
    if isinstance(values, Tensor):
        check_shape(values, (len(columns),), "true_values")
        return to_numpy(values.double())
    by_column = {
        element: number
        for name, value in values.items()
        for element, number in zip(element_names(name, value.shape), value.flatten().tolist(), strict=True)
    }
    check_known(by_column, columns, "true_values", "column")
    return np.array([by_column.get(column, np.nan) for column in columns])


def _limits(curves: Sequence[_Curve], column: int, true_value: float) -> tuple[float, float]:
    ends = [end for curve in curves for end in np.quantile(curve.draws[:, column], (0.002, 0.998))]
    low, high = np.nanmin([*ends, true_value]), np.nanmax([*ends, true_value])
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _marginals(ax: Axes, curves: Sequence[_Curve], column: int) -> None:
    import arviz  # here, because it takes seconds that not every figure should pay

    for curve in curves:
        # Reflected at the ends, so that a uniform prior keeps its edges.
        at, density = arviz.kde(curve.draws[:, column], bound_correction=True)
        ax.plot(at, density, color=curve.colour, linestyle=curve.style, label=curve.name)
        if curve.colour == COLOURS[0]:
            ax.fill_between(at, density, color=curve.colour, alpha=0.15, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_yticks([])
    ax.spines[["left", "top", "right"]].set_visible(False)


def _mark_truth(ax: Axes, x: float, y: float) -> None:
    if np.isfinite(x):
        ax.axvline(x, color=BLACK, linewidth=1, label="truth")
    if np.isfinite(y):
        ax.axhline(y, color=BLACK, linewidth=1)


def _contours(ax: Axes, draws: np.ndarray, masses: Sequence[float], colour: str, style: object) -> None:
    """Draw the regions of highest density that hold `masses`.

    The kernel density is taken in whitened coordinates: along a narrow ridge a kernel with the axes' own widths would
    blur the ridge away.
    """
    centre, factor = draws.mean(0), np.linalg.cholesky(np.cov(draws.T))
    white = np.linalg.solve(factor, (draws - centre).T)
    bandwidth, bins = len(draws) ** (-1 / 6), 128
    ends = [(w.min() - 3 * bandwidth, w.max() + 3 * bandwidth) for w in white]
    counts, *edges = np.histogram2d(white[0], white[1], bins=bins, range=ends)
    density = gaussian_filter(counts, [bandwidth * bins / (high - low) for low, high in ends], mode="constant")
    ranked = np.sort(density.ravel())[::-1]
    inside = np.cumsum(ranked) / ranked.sum()
    levels = sorted(ranked[np.searchsorted(inside, mass)] for mass in masses)
    u, v = np.meshgrid(*(0.5 * (edge[1:] + edge[:-1]) for edge in edges), indexing="ij")
    x, y = centre[0] + factor[0, 0] * u, centre[1] + factor[1, 0] * u + factor[1, 1] * v
    ax.contour(x, y, density, levels=levels, colors=[colour], linestyles=[style], linewidths=1.3)


def _shared_legend(figure: plt.Figure, ax: Axes, num_columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    columns = len(labels) if num_columns > 1 else 2
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize="small")

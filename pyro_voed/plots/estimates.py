"""Figures of estimates, training and design search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from pyro_voed.checks import check_count, check_shape
from pyro_voed.plots.style import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LINE_STYLES,
    SIDES,
    SKY,
    VERMILLION,
    along_design,
    axes_or_new,
    bars,
    colours_of,
    only_label,
    to_numpy,
)
from pyro_voed.results import DesignResult, EIGResult, FitHistory, element_names

LOOKS = [(BLUE, "o"), (VERMILLION, "s"), (BLACK, "D"), (GREEN, "^")]
INTERVAL: dict[str, Any] = {"color": GREEN, "alpha": 0.25, "linewidth": 0, "label": "certified interval"}

MOST_MARKED = 30
"""More points than this are drawn without markers."""


def plot_eig(result: EIGResult, design_label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the expected information gain against a scalar design, or beside its companions at a single design.

    References and the certified interval are drawn where the result has them; bands and bars are two standard errors
    either way.

    Args:
        result: Estimate at one design, or over a one-dimensional batch of scalar designs.
        design_label: Which design is the horizontal axis; may be left out where there is only one.

    Example:
        >>> import torch
        >>> xi = torch.linspace(0.0, 3.0, 7)
        >>> eig, error = 0.5 * torch.log1p(xi**2), torch.full((7,), 0.02)
        >>> result = EIGResult(eig, error, "lower", "eig_flow", 10_000, 1_000, 1.0, {"xi": xi}, ("theta",), ("y",))
        >>> plot_eig(result).get_ylabel()
        'expected information gain (nats)'
    """
    place = along_design(result, design_label)
    estimates = (result, *result.references)
    looks = list(itertools.islice(itertools.chain(LOOKS[:1], itertools.cycle(LOOKS[1:])), len(estimates)))
    names = [f"{estimate.estimator} ({SIDES[estimate.bound]})" for estimate in estimates]
    if place is None:
        ax = axes_or_new(ax, (1.6 + 1.5 * len(estimates), 3.6))
        if result.interval is not None:
            ax.axhspan(*result.interval.flatten().tolist(), **INTERVAL)
            ax.legend(frameon=False, fontsize="small")
        bars(ax, [(estimate.eig, estimate.standard_error) for estimate in estimates], names, looks)
        ax.set_xticks(range(len(names)), [name.replace(" (", "\n(") for name in names], fontsize="small")
        ax.set(xlim=(-0.5, len(names) - 0.5), ylabel="expected information gain (nats)\nbars: ±2 standard errors")
        return ax
    label, x, order = place
    ax = axes_or_new(ax)
    if result.interval is not None:
        ax.fill_between(x, *to_numpy(result.interval)[:, order], **INTERVAL)
    few = len(x) <= MOST_MARKED
    for estimate, name, (colour, marker), style in zip(estimates, names, looks, LINE_STYLES, strict=False):
        eig, error = to_numpy(estimate.eig)[order], to_numpy(estimate.standard_error)[order]
        ax.fill_between(x, eig - 2 * error, eig + 2 * error, color=colour, alpha=0.2, linewidth=0)
        ax.plot(x, eig, color=colour, linestyle=style, marker=marker if few else None, markersize=4, label=name)
    ax.set(xlabel=label, ylabel="expected information gain (nats)")
    ax.legend(
        frameon=False, title="bands: ±2 standard errors", title_fontsize="small", fontsize="small", alignment="left"
    )
    return ax


def plot_training(history: FitHistory | None, ax: Axes | None = None, smooth: int | None = None) -> Axes:
    """Draw the minibatch bound of each step, its running mean, validation, and where the learning rate is reduced.

    The view starts at the first percentile of the minibatch bound: the first steps of a fit can be thousands of nats
    down. The running mean is over `smooth` steps; None takes a fiftieth of all.

    Example:
        >>> import torch
        >>> history = FitHistory(torch.linspace(-1.0, 1.0, 100), torch.ones(100), "budget", seconds=1.0)
        >>> plot_training(history).get_xlabel()
        'step'
    """
    if history is None or history.num_steps == 0:
        raise ValueError("history: nothing was learned, so there is no training to draw.")
    num_steps = history.num_steps
    smooth = max(1, num_steps // 50) if smooth is None else check_count(smooth, "smooth")
    if smooth > num_steps:
        raise ValueError(f"smooth: expected at most the {num_steps} steps of the history, got {smooth}.")
    ax = axes_or_new(ax)
    bound = to_numpy(history.bound)
    steps = np.arange(1, num_steps + 1)
    for number, (start, stop) in enumerate(_runs(to_numpy(history.learning_rate) < 1)):
        label = "learning rate reduced" if number == 0 else None
        ax.axvspan(start + 0.5, stop + 0.5, color="0.92", linewidth=0, zorder=0, label=label)
    ax.plot(steps, bound, color=SKY, linewidth=0.6, alpha=0.8, label="minibatch")
    running = np.convolve(bound, np.full(smooth, 1 / smooth), mode="valid")
    ax.plot(steps[smooth - 1 :], running, color=BLUE, linewidth=2, label=f"mean of the last {smooth} steps")
    shown = [np.quantile(bound, 0.01), bound.max()]
    if history.validation is not None:
        validation = to_numpy(history.validation)
        at = num_steps * np.arange(1, len(validation) + 1) / len(validation)
        marker = "s" if len(validation) <= MOST_MARKED else None
        ax.plot(at, validation, "--", color=VERMILLION, marker=marker, markersize=4, label="validation")
        shown += [np.quantile(validation, 0.01), validation.max()]
    margin = 0.05 * (max(shown) - min(shown)) or 0.5
    ax.set(xlabel="step", ylabel="bound (nats)", xlim=(1, max(num_steps, 2)))
    ax.set_ylim(min(shown) - margin, max(shown) + margin)
    # Framed, or its patch for the shaded span could not be told from the span behind it.
    ax.legend(facecolor="white", framealpha=1.0, edgecolor="none", fontsize="small")
    return ax


def plot_design_path(result: DesignResult, design_label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw each element of a design against the step of the search.

    For each element there is a line, an open circle where the winning start began, a filled one where it ended, and the
    last value in the legend. `design_label` may be left out where there is only one.

    Example:
        >>> import torch
        >>> steps, value = torch.arange(0, 101, 10), torch.tensor(1.2)
        >>> final = EIGResult(value, value / 100, "lower", "eig_flow", 0, 0, 0.0, {"xi": torch.ones(2)}, (), ())
        >>> result = DesignResult(final, 10_000, 1.0, path={"xi": torch.rand(11, 2)}, path_steps=steps)
        >>> plot_design_path(result).get_ylabel()
        'design xi'
    """
    if result.path is None or result.path_steps is None:
        raise ValueError("result: candidates were compared, so there is no path. Plot result.candidates with plot_eig.")
    label = only_label(result.path, design_label)
    path = result.path[label]
    names = element_names(label, path.shape[1:])
    values, steps = to_numpy(path.flatten(1) if path.ndim > 1 else path.unsqueeze(1)), to_numpy(result.path_steps)
    ax = axes_or_new(ax)
    colours, many = colours_of(len(names)), len(names) > len(COLOURS)
    for index, name in enumerate(names):
        style = "-" if many else LINE_STYLES[index]
        column = values[:, index]
        ax.plot(steps, column, color=colours[index], linestyle=style, label=f"{name} = {column[-1]:.3g}")
        ax.plot(steps[0], column[0], "o", color=colours[index], markerfacecolor="white", clip_on=False, zorder=3)
        ax.plot(steps[-1], column[-1], "o", color=colours[index], clip_on=False, zorder=3)
    ax.set(xlabel="step", ylabel=f"design {label}")
    ax.legend(frameon=False, fontsize="small", title="at the end", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax


def plot_realisations(
    designs: Tensor,
    observations: Tensor,
    ax: Axes | None = None,
    *,
    curve_designs: Tensor | None = None,
    curve_values: Tensor | None = None,
    design_name: str = "design",
    observation_name: str = "outcome",
) -> Axes:
    """Draw the outcomes of a few experiments at their design points, one colour an experiment.

    Args:
        designs: Design points, `(num_points,)`.
        observations: Outcomes, `(num_experiments, num_points)`.
        curve_designs: Fine grid for mean curves, `(num_grid,)`.
        curve_values: Curves over the grid, `(num_curves, num_grid)`. As many as experiments: each in the colour of
            its experiment; any other number: all grey.
        design_name: Name of the horizontal axis, with its unit.
        observation_name: Name of the vertical axis, with its unit.

    Example:
        >>> import torch
        >>> points, noise = torch.tensor([1.0, 2.0, 4.0]), 0.1 * torch.randn(5, 3)
        >>> len(plot_realisations(points, points / (1 + points) + noise).collections)
        5
    """
    check_shape(designs, (None,), "designs")
    check_shape(observations, (None, len(designs)), "observations")
    if (curve_designs is None) != (curve_values is None):
        raise ValueError("curve_designs, curve_values: expected both or neither.")
    ax = axes_or_new(ax)
    colours = colours_of(len(observations))
    if curve_designs is not None and curve_values is not None:
        check_shape(curve_designs, (None,), "curve_designs")
        check_shape(curve_values, (None, len(curve_designs)), "curve_values")
        matched = len(curve_values) == len(observations)
        for index, curve in enumerate(to_numpy(curve_values)):
            ax.plot(to_numpy(curve_designs), curve, color=colours[index] if matched else GREY, linewidth=1.2, alpha=0.8)
    for index, (outcome, colour) in enumerate(zip(to_numpy(observations), colours, strict=False)):
        look: dict[str, Any] = {"marker": "osD^vP"[index % 6], "s": 28, "edgecolor": "white", "linewidth": 0.5}
        ax.scatter(to_numpy(designs), outcome, color=colour, zorder=3, label=f"experiment {index + 1}", **look)
    ax.set(xlabel=design_name, ylabel=observation_name)
    return ax


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, one past last) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]

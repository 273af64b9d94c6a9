"""Figures of what the library returns.

Every `plot_*` takes a result, draws on the axes it is given (or on a new figure) and returns them, so that titles,
limits and files stay the caller's. Colours are those of Okabe and Ito, told apart with any common colour vision, and
line styles or markers repeat what they say. Neither the backend nor matplotlib's global settings are touched.

References:
    M. Okabe and K. Ito (2008), Color universal design. https://jfly.uni-koeln.de/color
    B. W. Silverman (1986), Density estimation for statistics and data analysis, equation 3.31 (bandwidth in one
    dimension).
    D. W. Scott (1992), Multivariate density estimation, equation 6.42 (bandwidth in two).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_voed.checks import check_count, check_known
from pyro_voed.results import DesignResult, EIGResult, FitHistory, PosteriorSample, element_names

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, BLACK = "0.55", "0.1"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
LINE_STYLES = ("-", (0, (5, 1.5)), "-.", (0, (2, 1)), (0, (7, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)))
SIDES = {"lower": "lower bound", "upper": "upper bound", "consistent": "reference", "neither": "no guaranteed side"}

CONTOUR_MASSES = (0.5, 0.9)
"""Probability inside each contour of the pair plot."""


def plot_eig(result: EIGResult, design_label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the expected information gain against a scalar design, or beside its companions at a single design.

    The marginal bound, the nested Monte Carlo reference and the certified interval are drawn where the result has
    them; bands and bars are two standard errors either way.

    Args:
        result: Estimate at one design, or over a one-dimensional batch of scalar designs.
        design_label: Which design is the horizontal axis; may be left out where there is only one.
        ax: Axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the batch has more than one dimension, the design is no scalar, or the label is unknown.

    Example:
        >>> xi = torch.linspace(0.0, 3.0, 7)
        >>> result = EIGResult(
        ...     eig=0.5 * torch.log1p(xi**2),
        ...     standard_error=torch.full((7,), 0.02),
        ...     bound="lower",
        ...     estimator="eig_flow",
        ...     num_simulations=10_000,
        ...     num_samples=1_000,
        ...     seconds=1.0,
        ...     designs={"xi": xi},
        ...     target_labels=("theta",),
        ...     observation_labels=("y",),
        ... )
        >>> plot_eig(result).get_ylabel()
        'expected information gain (nats)'
    """
    if result.eig.ndim > 1:
        raise ValueError(
            f"result: expected one design or a one-dimensional batch, got a batch of shape {tuple(result.eig.shape)}. "
            "Draw one slice at a time."
        )
    estimates = [
        (estimate, colour, marker)
        for estimate, colour, marker in (
            (result, BLUE, "o"),
            (result.marginal, VERMILLION, "s"),
            (result.nmc, BLACK, "D"),
        )
        if estimate is not None
    ]
    if result.eig.numel() == 1:
        return _eig_at_one_design(result, estimates, _axes(ax, (1.6 + 1.5 * len(estimates), 3.6)))
    label = _only_label(result.designs, design_label, "design_label")
    designs = result.designs[label]
    if designs.numel() != result.eig.numel():
        raise ValueError(
            f"design_label: expected a scalar design, but each {label!r} has shape {tuple(designs.shape[1:])}."
        )
    ax = _axes(ax)
    x = _numpy(designs.flatten())
    order = x.argsort()
    x = x[order]
    if result.interval is not None:
        low, high = _numpy(result.interval)[:, order]
        ax.fill_between(x, low, high, color=GREEN, alpha=0.25, linewidth=0, label="certified interval")
    for (estimate, colour, marker), style in zip(estimates, LINE_STYLES, strict=False):
        eig, error = _numpy(estimate.eig)[order], _numpy(estimate.standard_error)[order]
        ax.fill_between(x, eig - 2 * error, eig + 2 * error, color=colour, alpha=0.2, linewidth=0)
        ax.plot(
            x, eig, color=colour, linestyle=style, marker=marker if len(x) <= 30 else None, markersize=4,
            label=_estimate_name(estimate),
        )  # fmt: skip
    ax.set(xlabel=label, ylabel="expected information gain (nats)")
    ax.legend(
        frameon=False, title="bands: ±2 standard errors", title_fontsize="small", fontsize="small", alignment="left"
    )
    return ax


def plot_training(history: FitHistory | None, ax: Axes | None = None, smooth: int | None = None) -> Axes:
    """Draw the minibatch bound of each step, its running mean, validation, and where the learning rate is reduced.

    The view starts at the first percentile of the minibatch bound: the first steps of a fit can be thousands of nats
    down.

    Args:
        history: Training record.
        ax: Axes to draw on; None makes a new figure.
        smooth: Steps in the running mean; None takes a fiftieth of all steps.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no history, or `smooth` exceeds its length.

    Example:
        >>> history = FitHistory(torch.linspace(-1.0, 1.0, 100), torch.ones(100), "budget", seconds=1.0)
        >>> plot_training(history).get_xlabel()
        'step'
    """
    if history is None or history.num_steps == 0:
        raise ValueError("history: nothing was learnt, so there is no training to draw.")
    num_steps = history.num_steps
    smooth = max(1, num_steps // 50) if smooth is None else check_count(smooth, "smooth")
    if smooth > num_steps:
        raise ValueError(f"smooth: expected at most the {num_steps} steps of the history, got {smooth}.")
    ax = _axes(ax)
    bound = _numpy(history.bound)
    steps = np.arange(1, num_steps + 1)
    for number, (start, stop) in enumerate(_runs(_numpy(history.learning_rate) < 1)):
        label = "learning rate reduced" if number == 0 else None
        ax.axvspan(start + 0.5, stop + 0.5, color="0.92", linewidth=0, zorder=0, label=label)
    ax.plot(steps, bound, color=SKY, linewidth=0.6, alpha=0.8, label="minibatch")
    running = np.convolve(bound, np.full(smooth, 1 / smooth), mode="valid")
    ax.plot(steps[smooth - 1 :], running, color=BLUE, linewidth=2, label=f"mean of the last {smooth} steps")
    shown = [np.quantile(bound, 0.01), bound.max()]
    if history.validation is not None:
        validation = _numpy(history.validation)
        at = num_steps * np.arange(1, len(validation) + 1) / len(validation)
        few = len(validation) <= 30
        ax.plot(
            at,
            validation,
            color=VERMILLION,
            linestyle="--",
            marker="s" if few else None,
            markersize=4,
            label="validation",
        )
        shown += [np.quantile(validation, 0.01), validation.max()]
    margin = 0.05 * (max(shown) - min(shown)) or 0.5
    ax.set(xlabel="step", ylabel="bound (nats)", xlim=(1, max(num_steps, 2)))
    ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_design_path(result: DesignResult, design_label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw each element of a design against the step of the search.

    Args:
        result: Outcome of a design search.
        design_label: Which design; may be left out where there is only one.
        ax: Axes to draw on; None makes a new figure.

    Returns:
        The axes: for each element a line, an open circle where the winning start began, a filled one where it ended,
        and the last value in the legend.

    Raises:
        ValueError: If the label is unknown, or is left out where there are several.

    Example:
        >>> steps = torch.arange(0, 101, 10)
        >>> at_best = EIGResult(
        ...     eig=torch.tensor(1.2),
        ...     standard_error=torch.tensor(0.01),
        ...     bound="lower",
        ...     estimator="eig_flow",
        ...     num_simulations=10_000,
        ...     num_samples=1_000,
        ...     seconds=1.0,
        ...     designs={"xi": torch.ones(2)},
        ...     target_labels=("theta",),
        ...     observation_labels=("y",),
        ... )
        >>> result = DesignResult(
        ...     designs=at_best.designs,
        ...     eig=at_best.eig,
        ...     standard_error=at_best.standard_error,
        ...     bound="lower",
        ...     final=at_best,
        ...     path={"xi": (steps / 100.0).unsqueeze(-1) * torch.ones(2)},
        ...     path_steps=steps,
        ...     history=FitHistory(torch.zeros(100), torch.ones(100), "budget", seconds=1.0),
        ...     start_eigs=torch.tensor([1.2]),
        ...     num_simulations=10_000,
        ...     seconds=1.0,
        ... )
        >>> plot_design_path(result).get_ylabel()
        'design xi'
    """
    label = _only_label(result.path, design_label, "design_label")
    path = result.path[label]
    names = element_names(label, path.shape[1:])
    values, steps = _numpy(path.flatten(1) if path.ndim > 1 else path.unsqueeze(1)), _numpy(result.path_steps)
    ax = _axes(ax)
    # Beyond the palette neighbours share a hue: what is read then is the order, not the single line.
    many = len(names) > len(COLOURS)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names))) if many else COLOURS
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
        ax: Axes to draw on; None makes a new figure.
        curve_designs: Fine grid for mean curves, `(num_grid,)`.
        curve_values: Curves over the grid, `(num_curves, num_grid)`. As many as experiments: each in the colour of
            its experiment; any other number: all grey.
        design_name: Name of the horizontal axis, with its unit.
        observation_name: Name of the vertical axis, with its unit.

    Returns:
        The axes.

    Raises:
        ValueError: If shapes do not fit, or only one of the two curve arguments is given.

    Example:
        >>> points, noise = torch.tensor([1.0, 2.0, 4.0]), 0.1 * torch.randn(5, 3)
        >>> axes = plot_realisations(points, points / (1 + points) + noise)
        >>> len(axes.collections)
        5
    """
    _check_shape(designs, (None,), "designs")
    _check_shape(observations, (None, len(designs)), "observations")
    if (curve_designs is None) != (curve_values is None):
        raise ValueError("curve_designs, curve_values: expected both or neither.")
    ax = _axes(ax)
    num_experiments = len(observations)
    colours = (
        COLOURS if num_experiments <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.9, num_experiments))
    )
    if curve_designs is not None and curve_values is not None:
        _check_shape(curve_designs, (None,), "curve_designs")
        _check_shape(curve_values, (None, len(curve_designs)), "curve_values")
        matched = len(curve_values) == num_experiments
        for index, curve in enumerate(_numpy(curve_values)):
            ax.plot(_numpy(curve_designs), curve, color=colours[index] if matched else GREY, linewidth=1.2, alpha=0.8)
    for index, outcome in enumerate(_numpy(observations)):
        marker = "osD^vP"[index % 6]
        ax.scatter(
            _numpy(designs),
            outcome,
            color=colours[index],
            marker=marker,
            s=28,
            edgecolor="white",
            linewidth=0.5,
            zorder=3,
            label=f"experiment {index + 1}",
        )
    ax.set(xlabel=design_name, ylabel=observation_name)
    return ax


def plot_posterior_pair(
    samples: Mapping[str, PosteriorSample | Tensor],
    *,
    prior: PosteriorSample | Tensor | None = None,
    true_values: Mapping[str, Tensor] | Tensor | None = None,
    column_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw posteriors over each other: marginal densities on the diagonal, contours of each pair below it.

    Contours hold 50 % and 90 % of the draws. Axes cover the posteriors, not the prior.

    Args:
        samples: Draws under the names for the legend; a plain matrix is `(num_draws, dim)`.
        prior: Draws of the prior; contours hold 90 %.
        true_values: Values the outcome was simulated from, by site or one an column, `(dim,)`.
        column_names: Names for the axes; None takes those of the first sample.

    Returns:
        The grid of axes, `(dim, dim)`; those above the diagonal are hidden.

    Raises:
        ValueError: If there are no samples, dimensions differ, or draws are not finite.

    Example:
        >>> grid = plot_posterior_pair({"flow": torch.randn(500, 2), "NUTS": torch.randn(500, 2)})
        >>> grid.shape
        (2, 2)
    """
    sets, prior_draws, names = _sample_sets(samples, prior, "samples")
    truth = _truth(true_values, names)
    dim = len(names)
    figure, grid = plt.subplots(
        dim, dim, squeeze=False, sharex="col", figsize=(1 + 2 * dim, 0.6 + 2 * dim), layout="constrained"
    )
    limits = [_limits([draws[:, column] for draws in sets.values()], truth[column]) for column in range(dim)]
    for row in range(dim):
        for column in range(dim):
            ax = grid[row, column]
            if column > row:
                ax.set_visible(False)
                continue
            ax.set_xlim(limits[column])
            if column == row:
                _marginals(ax, {name: draws[:, row] for name, draws in sets.items()}, _column(prior_draws, row))
            else:
                ax.set_ylim(limits[row])
                if prior_draws is not None:
                    _contours(ax, prior_draws[:, [column, row]], CONTOUR_MASSES[1:], GREY, ":")
                for (draws, colour), style in zip(zip(sets.values(), COLOURS, strict=False), LINE_STYLES, strict=False):
                    _contours(ax, draws[:, [column, row]], CONTOUR_MASSES, colour, style)
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
        rows: For each outcome its draws under the names for the legend, such as the flow's and a reference's; a plain
            matrix is `(num_draws, dim)`.
        prior: Draws of the prior, shared by all rows.
        true_values: For each outcome the values it was simulated from, by site or one a column, `(dim,)`.
        row_names: Names of the outcomes; None numbers them.
        column_names: Names of the parameters; None takes those of the first sample.

    Returns:
        The grid of axes, `(num_rows, dim)`.

    Raises:
        ValueError: If there are no rows, lengths or dimensions differ, or draws are not finite.

    Example:
        >>> rows = [{"flow": torch.randn(500, 2) + shift} for shift in (-1.0, 1.0)]
        >>> plot_posterior_grid(rows, prior=3.0 * torch.randn(500, 2)).shape
        (2, 2)
    """
    if not rows:
        raise ValueError("rows: expected at least one outcome, got none.")
    for argument, given in (("true_values", true_values), ("row_names", row_names)):
        if given is not None and len(given) != len(rows):
            raise ValueError(f"{argument}: expected one entry for each of the {len(rows)} rows, got {len(given)}.")
    sets = [_sample_sets(row, prior, f"rows[{index}]") for index, row in enumerate(rows)]
    names = sets[0][2]
    dim = len(names)
    if any(len(columns) != dim for _, _, columns in sets):
        raise ValueError(f"rows: expected the same dimension in all, got {[len(columns) for _, _, columns in sets]}.")
    figure, grid = plt.subplots(
        len(rows),
        dim,
        squeeze=False,
        sharex="col",
        figsize=(1 + 2.4 * dim, 0.7 + 1.5 * len(rows)),
        layout="constrained",
    )
    for index, (row, prior_draws, _) in enumerate(sets):
        truth = _truth(None if true_values is None else true_values[index], names)
        for column in range(dim):
            ax = grid[index, column]
            _marginals(ax, {name: draws[:, column] for name, draws in row.items()}, _column(prior_draws, column))
            _mark_truth(ax, truth[column], np.nan)
        grid[index, 0].set_ylabel(row_names[index] if row_names is not None else f"outcome {index + 1}")
    for column, name in enumerate(column_names or names):
        grid[-1, column].set_xlabel(name)
    _shared_legend(figure, grid[0, 0], dim)
    return grid


def _axes(ax: Axes | None, size: tuple[float, float] = (6.0, 3.8)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _only_label(values: Mapping[str, Tensor], label: str | None, argument: str) -> str:
    if label is not None:
        check_known([label], values, argument, "design")
        return label
    if len(values) != 1:
        raise ValueError(f"{argument}: expected one of {list(values)}, as there are several designs.")
    return next(iter(values))


def _check_shape(values: Tensor, shape: tuple[int | None, ...], argument: str) -> None:
    if values.ndim != len(shape) or any(w not in (None, size) for w, size in zip(shape, values.shape, strict=True)):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{argument}: expected shape {wanted}, got {tuple(values.shape)}.")


def _estimate_name(estimate: EIGResult) -> str:
    return f"{estimate.estimator} ({SIDES[estimate.bound]})"


def _eig_at_one_design(result: EIGResult, estimates: list[tuple[EIGResult, str, str]], ax: Axes) -> Axes:
    if result.interval is not None:
        low, high = result.interval.flatten().tolist()
        ax.axhspan(low, high, color=GREEN, alpha=0.25, linewidth=0, label="certified interval")
        ax.legend(frameon=False, fontsize="small")
    for position, (estimate, colour, marker) in enumerate(estimates):
        ax.errorbar(
            position, estimate.eig.item(), yerr=2 * estimate.standard_error.item(), color=colour, marker=marker,
            capsize=4, linestyle="none", label=_estimate_name(estimate),
        )  # fmt: skip
    names = [f"{estimate.estimator}\n({SIDES[estimate.bound]})" for estimate, _, _ in estimates]
    ax.set_xticks(range(len(names)), names, fontsize="small")
    ax.set(xlim=(-0.5, len(names) - 0.5), ylabel="expected information gain (nats)\nbars: ±2 standard errors")
    return ax


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, one past last) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _matrix(sample: PosteriorSample | Tensor, argument: str) -> tuple[np.ndarray, list[str]]:
    draws = sample.matrix() if isinstance(sample, PosteriorSample) else sample
    _check_shape(draws, (None, None), argument)
    if not bool(torch.isfinite(draws).all()):
        raise ValueError(f"{argument}: some draws are not finite. None is left out: find out why.")
    if len(draws) < 10 or bool((draws == draws[0]).all(0).any()):
        raise ValueError(f"{argument}: expected at least 10 draws that differ in every column, for a density.")
    names = sample.columns if isinstance(sample, PosteriorSample) else [f"column {i}" for i in range(draws.shape[1])]
    return _numpy(draws.double()), names


def _sample_sets(
    samples: Mapping[str, PosteriorSample | Tensor], prior: PosteriorSample | Tensor | None, argument: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None, list[str]]:
    """Return the draws by name, the prior's, and the column names of the first sample."""
    if not 1 <= len(samples) <= len(COLOURS):
        raise ValueError(f"{argument}: expected 1 to {len(COLOURS)} samples to draw, got {len(samples)}.")
    matrices = {name: _matrix(sample, f"{argument}[{name!r}]") for name, sample in samples.items()}
    prior_matrix = None if prior is None else _matrix(prior, "prior")
    columns = next(iter(matrices.values()))[1]
    everything = matrices if prior_matrix is None else matrices | {"prior": prior_matrix}
    for name, (_, others) in everything.items():
        if len(others) != len(columns):
            raise ValueError(
                f"{argument}: expected dimension {len(columns)} throughout, got {len(others)} in {name!r}."
            )
    return {name: draws for name, (draws, _) in matrices.items()}, prior_matrix and prior_matrix[0], columns


def _truth(values: Mapping[str, Tensor] | Tensor | None, columns: Sequence[str]) -> np.ndarray:
    """Return the true value of each column; NaN, which matplotlib does not draw, where there is none."""
    if values is None:
        return np.full(len(columns), np.nan)
    if isinstance(values, Tensor):
        _check_shape(values, (len(columns),), "true_values")
        return _numpy(values.double())
    by_column = {
        element: number
        for name, value in values.items()
        for element, number in zip(element_names(name, value.shape), value.flatten().tolist(), strict=True)
    }
    check_known(by_column, columns, "true_values", "column")
    return np.array([by_column.get(column, np.nan) for column in columns])


def _column(draws: np.ndarray | None, column: int) -> np.ndarray | None:
    return None if draws is None else draws[:, column]


def _limits(columns: Sequence[np.ndarray], true_value: float) -> tuple[float, float]:
    ends = [end for draws in columns for end in np.quantile(draws, (0.002, 0.998))]
    low, high = np.nanmin([*ends, true_value]), np.nanmax([*ends, true_value])
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _marginals(ax: Axes, columns: Mapping[str, np.ndarray], prior: np.ndarray | None) -> None:
    if prior is not None:
        ax.plot(*_density(prior), color=GREY, linestyle=":", label="prior")
    for index, (name, draws) in enumerate(columns.items()):
        at, density = _density(draws)
        ax.plot(at, density, color=COLOURS[index], linestyle=LINE_STYLES[index], label=name)
        if index == 0:
            ax.fill_between(at, density, color=COLOURS[index], alpha=0.15, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_yticks([])
    ax.spines[["left", "top", "right"]].set_visible(False)


def _density(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid over the range of the draws, and a Gaussian kernel density on it."""
    edges = np.linspace(draws.min(), draws.max(), 513)
    counts, middles, step = np.histogram(draws, edges)[0], 0.5 * (edges[1:] + edges[:-1]), edges[1] - edges[0]
    low, high = np.quantile(draws, (0.25, 0.75))
    spread = min(draws.std(), (high - low) / 1.349) or draws.std()
    bandwidth = max(0.9 * spread * len(draws) ** -0.2, step)
    # What the kernel would put beyond the extreme draws is folded back, so that a uniform prior keeps its edges.
    images = (middles, 2 * edges[0] - middles, 2 * edges[-1] - middles)
    kernel = sum(np.exp(-0.5 * ((middles[:, None] - image) / bandwidth) ** 2) for image in images)
    density = kernel @ counts
    return middles, density / (density.sum() * step)


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
    white = np.linalg.solve(factor, (draws - centre).T).T
    bandwidth = len(draws) ** (-1 / 6)
    edges = [np.linspace(w.min() - 3 * bandwidth, w.max() + 3 * bandwidth, 129) for w in white.T]
    counts = np.histogramdd(white, bins=edges)[0]
    middles = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    kernels = [np.exp(-0.5 * ((m[:, None] - m[None, :]) / bandwidth) ** 2) for m in middles]
    density = kernels[0] @ counts @ kernels[1].T
    ranked = np.sort(density.ravel())[::-1]
    inside = np.cumsum(ranked) / ranked.sum()
    levels = sorted(ranked[np.searchsorted(inside, mass)] for mass in masses)
    u, v = np.meshgrid(*middles, indexing="ij")
    x, y = centre[0] + factor[0, 0] * u, centre[1] + factor[1, 0] * u + factor[1, 1] * v
    ax.contour(x, y, density, levels=levels, colors=[colour], linestyles=[style], linewidths=1.3)


def _shared_legend(figure: plt.Figure, ax: Axes, num_columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    columns = len(labels) if num_columns > 1 else 2
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize="small")

"""The figure of a comparison of estimators."""

from __future__ import annotations

from matplotlib.axes import Axes

from pyro_voed.compare.comparison import Comparison
from pyro_voed.plots.style import axes_or_new


def plot_comparison(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Draw the error of each estimator against its simulator calls, or its estimate where no exact value is known.

    Bars are two standard errors of the mean over repeats (of the one run, without repeats) either way; estimators
    without an estimate are left out.

    Example:
        >>> from pyro_voed.compare.comparison import ComparisonRow
        >>> row = ComparisonRow("flow", 1_000, 1.1, 0.02, "lower", num_simulations=1e3, error=-0.1)
        >>> plot_comparison(Comparison((row,), 1, exact=1.2)).get_xlabel()
        'simulated experiments'
    """
    curves = {name: comparison.curve(name) for name in comparison.estimators}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        raise ValueError("comparison: no estimator gave an estimate, so there is nothing to draw.")
    ax = axes_or_new(ax, (6.4, 4.2))
    markers = "osD^v<>PX*hpd"
    for number, (name, (calls, values, errors)) in enumerate(curves.items()):
        # Markers tell apart what colours, which come round again after ten, do not.
        ax.errorbar(
            calls, values, [2 * error for error in errors], label=name, capsize=3, markersize=5, linewidth=1.2,
            color=f"C{number % 10}", marker=markers[number % len(markers)],
        )  # fmt: skip
    if comparison.exact is not None:
        ax.axhline(0.0, color="0.3", linewidth=1)
    ax.set(
        xscale="log",
        xlabel="simulated experiments",
        ylabel="expected information gain (nats)" if comparison.exact is None else "estimate less exact value (nats)",
    )
    ax.legend(frameon=False, fontsize="small", title="bars: ±2 standard errors", title_fontsize="small")
    return ax

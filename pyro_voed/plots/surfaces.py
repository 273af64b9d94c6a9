"""Maps of the expected information gain over two design variables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from pyro_voed.checks import check_known
from pyro_voed.plots.style import SIDES, VERMILLION, axes_or_new, to_numpy
from pyro_voed.results import EIGResult, element_names

FEWEST_DESIGNS = 4


def plot_eig_surface(result: EIGResult, design_variables: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the expected information gain over two design variables as a map, with the largest value marked.

    The designs may lie on a grid or anywhere else but on one line; between them the map is linear. Draw
    `AmortisedEIG.at` a grid.

    Args:
        result: Estimates over a batch of at least four designs, of any batch shape.
        design_variables: The two variables to draw, horizontal then vertical: labels of scalar designs, or elements
            as in "xi[0]". May be left out where the designs have two in all.

    Example:
        >>> import torch
        >>> first, second = torch.meshgrid(torch.linspace(0.0, 1.0, 5), torch.linspace(0.0, 2.0, 6), indexing="ij")
        >>> eig, designs = first * (2.0 - second), {"dose": first, "time": second}
        >>> result = EIGResult(eig, torch.full((5, 6), 0.01), "lower", "eig_flow", 0, 0, 0.0, designs, (), ())
        >>> plot_eig_surface(result).get_title()
        'largest: 2.00 ± 0.02 nats'
    """
    variables = _variables(result)
    names = list(variables) if design_variables is None else list(design_variables)
    check_known(names, variables, "design_variables", "design variable")
    if len(names) != 2:
        raise ValueError(f"design_variables: expected two of {list(variables)}, got {names}.")
    x, y = (to_numpy(variables[name]).astype(float) for name in names)
    eig, error = (to_numpy(values.flatten()).astype(float) for values in (result.eig, result.standard_error))
    if eig.size < FEWEST_DESIGNS:
        raise ValueError(f"result: expected at least {FEWEST_DESIGNS} designs to draw a map of, got {eig.size}.")
    if np.linalg.matrix_rank(np.stack([x - x.mean(), y - y.mean()]), tol=1e-9 * (np.ptp(x) + np.ptp(y) + 1e-300)) < 2:
        raise ValueError(f"result: the designs lie on one line in {names}, so there is no map. Use plot_eig.")
    ax = axes_or_new(ax, (5.6, 4.2))
    # Lines show what a scale of greys hides; sequential colours in one order of lightness print in grey too.
    filled = ax.tricontourf(x, y, eig, levels=14, cmap="cividis")
    ax.tricontour(x, y, eig, levels=14, colors="0.2", linewidths=0.4)
    best = int(eig.argmax())
    ax.plot(x[best], y[best], marker="*", markersize=13, color=VERMILLION, markeredgecolor="white", clip_on=False)
    ax.figure.colorbar(filled, ax=ax, label=f"expected information gain (nats)\n{SIDES[result.bound]}")
    ax.set(xlabel=names[0], ylabel=names[1], title=f"largest: {eig[best]:.2f} ± {2 * error[best]:.2f} nats")
    return ax


def _variables(result: EIGResult) -> dict[str, Tensor]:
    """Return every scalar design variable, one value a member of the batch."""
    batch = result.eig.numel()
    variables: dict[str, Tensor] = {}
    for name, value in result.designs.items():
        shape = value.shape[result.eig.ndim :]
        flat = value.expand(*result.eig.shape, *shape).reshape(batch, -1)
        variables |= dict(zip(element_names(name, shape), flat.unbind(-1), strict=True))
    return variables

"""What figures of calibration show, read back from the artists that were drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_voed.diagnostics.calibration import sbc
from pyro_voed.diagnostics.coverage import expected_coverage
from pyro_voed.diagnostics.recovery import recovery
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.diagnostics.tarp import tarp
from pyro_voed.plots.calibration import plot_coverage, plot_recovery, plot_sbc, plot_tarp
from tests.plots.cases import data_of, line_of


def simulated(dim=2, *, scale=1.0, densities=False):
    truths, draws = torch.randn(60, dim), scale * torch.randn(60, 20, dim)
    columns = tuple(f"theta[{index}]" for index in range(dim))
    if not densities:
        return SimulatedPosteriors(truths, draws, columns)
    return SimulatedPosteriors(truths, draws, columns, None, -truths.square().sum(-1), -draws.square().sum(-1))


FIGURES = {
    "sbc": (plot_sbc, lambda: sbc(simulated(), seed=0), "theta[1]", lambda r: (r.points, r.ecdf[:, 1])),
    "coverage": (
        plot_coverage,
        lambda: expected_coverage(simulated(densities=True), seed=0),
        "joint, highest density",
        lambda r: (r.levels, r.joint.coverage),
    ),
    "tarp": (plot_tarp, lambda: tarp(simulated(), seed=0), "balls, 10 a truth", lambda r: (r.levels, r.coverage)),
}


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize(("plot", "make", "name", "curve"), FIGURES.values(), ids=FIGURES)
def test_the_curve_and_its_band_are_those_of_the_result(plot, make, name, curve, difference):
    result = make()
    _, given = plt.subplots()
    ax = plot(result, difference=difference, ax=given)
    assert ax is given
    at, values = curve(result)
    x, y = data_of(line_of(ax, name))
    assert np.allclose(x, [0.0, *at.tolist(), 1.0])
    assert np.allclose(y + (x if difference else 0.0), [0.0, *values.tolist(), 1.0])
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    middle = len(at) // 2
    ends = corners[np.isclose(corners[:, 0], at[middle].item()), 1] + (at[middle].item() if difference else 0.0)
    assert {round(end, 6) for end in ends} == {
        round(result.lower[middle].item(), 6),
        round(result.upper[middle].item(), 6),
    }
    assert ("passed" if result.passed else "failed") in ax.get_title()


@pytest.mark.parametrize(
    ("plot", "check"), [(plot_sbc, sbc), (plot_coverage, expected_coverage), (plot_tarp, tarp)], ids=FIGURES
)
def test_a_failed_check_says_so(plot, check):
    result = check(simulated(scale=0.3), seed=0)
    assert "failed, p = " in plot(result).get_title()


def test_many_columns_share_one_entry_in_the_legend():
    ax = plot_sbc(sbc(simulated(30), seed=0))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["0.95 band", "30 columns"]
    assert len(ax.get_lines()) == 31


def test_named_columns_look_different():
    ax = plot_sbc(sbc(simulated(12), seed=0))
    looks = {(found.get_color(), str(found._unscaled_dash_pattern)) for found in ax.get_lines()[1:]}
    assert len(looks) == 12


def test_coverage_without_densities_has_columns_alone():
    labels = plot_coverage(expected_coverage(simulated(), seed=0)).get_legend_handles_labels()[1]
    assert labels == ["0.95 band", "theta[0]", "theta[1]"]


def test_recovery_draws_every_column_once_and_marks_misses():
    result = recovery(simulated(5))
    grid = plot_recovery(result)
    assert grid.shape == (2, 4)
    assert [ax.get_visible() for ax in grid.flat] == [True] * 5 + [False] * 3
    inside, missed, diagonal = grid[0, 2].get_lines()
    low, high = result.interval[..., 2]
    outside = (result.truths[:, 2] < low) | (result.truths[:, 2] > high)
    assert np.allclose(np.sort(missed.get_xdata()), result.truths[outside, 2].sort().values)
    assert np.allclose(np.sort(inside.get_ydata()), result.posterior_mean[~outside, 2].sort().values)
    assert np.allclose(diagonal.get_xdata(), diagonal.get_ydata())
    assert f"outside their interval: {outside.double().mean():.0%}" in grid[0, 2].get_title()


def test_recovery_draws_no_more_points_than_asked_for():
    inside, missed, _ = plot_recovery(recovery(simulated(1)), most_points=25)[0, 0].get_lines()
    assert len(inside.get_xdata()) + len(missed.get_xdata()) == 25

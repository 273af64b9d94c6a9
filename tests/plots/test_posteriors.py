import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_voed.plots import plot_posterior_grid, plot_posterior_pair
from pyro_voed.plots.posteriors import _contours
from pyro_voed.posterior_sample import PosteriorSample
from tests.plots.cases import data_of


def posterior(num_draws=200, **shapes):
    return PosteriorSample(
        values={name: torch.randn(2, num_draws, *shape) for name, shape in shapes.items()},
        observations={},
        method="NUTS",
        seconds=1.0,
        effective_sample_size={name: torch.full(shape, 100.0) for name, shape in shapes.items()},
    )


def test_pair_draws_marginals_and_contours_of_every_sample():
    samples = {"flow": posterior(theta=(2,), sigma=(1,)), "NUTS": posterior(theta=(2,), sigma=(1,))}
    truth = {"theta": torch.tensor([0.1, 0.2]), "sigma": torch.tensor([0.3])}
    grid = plot_posterior_pair(samples, prior=torch.randn(300, 3), true_values=truth)
    assert grid.shape == (3, 3)
    assert [ax.get_xlabel() for ax in grid[-1]] == ["theta[0]", "theta[1]", "sigma[0]"]
    assert [ax.get_ylabel() for ax in grid[1:, 0]] == ["theta[1]", "sigma[0]"]
    labels = grid[0, 0].get_legend_handles_labels()[1]
    assert labels == ["prior", "flow", "NUTS", "truth"]
    for row in range(3):
        assert len(grid[row, row].lines) == 4
        for column in range(3):
            assert grid[row, column].get_visible() == (column <= row)
            if column < row:
                assert len(grid[row, column].collections) == 3  # prior, flow, NUTS
    vertical, horizontal = grid[2, 1].lines
    assert vertical.get_xdata()[0] == pytest.approx(0.2)
    assert horizontal.get_ydata()[0] == pytest.approx(0.3)


def test_pair_axes_cover_the_posterior_and_the_truth_rather_than_the_prior():
    grid = plot_posterior_pair(
        {"flow": torch.randn(500, 2)}, prior=100 * torch.randn(500, 2), true_values=torch.tensor([8.0, 0.0])
    )
    low, high = grid[0, 0].get_xlim()
    assert -6 < low < -2
    assert 8 < high < 9


def test_scalar_sites_are_drawn():
    grid = plot_posterior_pair({"NUTS": posterior(alpha=(), theta=(1,))}, true_values={"alpha": torch.tensor(0.5)})
    assert [ax.get_xlabel() for ax in grid[-1]] == ["alpha", "theta[0]"]
    assert len(grid[1, 0].lines) == 1  # Only the column with a known truth is marked.


def test_grid_has_a_row_for_each_outcome_and_a_column_for_each_parameter():
    rows = [{"flow": torch.randn(200, 2) + i, "NUTS": posterior(theta=(2,))} for i in range(3)]
    grid = plot_posterior_grid(
        rows,
        prior=torch.randn(200, 2),
        true_values=torch.arange(6.0).reshape(3, 2).unbind(),
        row_names=["a", "b", "c"],
        column_names=["V", "K"],
    )
    assert grid.shape == (3, 2)
    assert [ax.get_ylabel() for ax in grid[:, 0]] == ["a", "b", "c"]
    assert [ax.get_xlabel() for ax in grid[-1]] == ["V", "K"]
    for index, ax in enumerate(grid.flat):
        assert [line.get_label() for line in ax.lines] == ["prior", "flow", "NUTS", "truth"]
        assert ax.lines[-1].get_xdata()[0] == index
        x, density = data_of(ax.lines[1])
        # The mean of the density drawn is that of the draws: the right column is in the right place.
        of_draws = rows[index // 2]["flow"][:, index % 2].mean().item()
        assert np.average(x, weights=density) == pytest.approx(of_draws, abs=0.05)


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_density_integrates_to_one_and_keeps_the_edges(draw):
    at, density = data_of(plot_posterior_grid([{"flow": draw(4000, 1)}])[0, 0].lines[0])
    # The grid of 512 leaves out a cell at either end.
    assert np.trapezoid(density, at) == pytest.approx(1.0, abs=2 / 512)
    exact = np.exp(-0.5 * at**2) / np.sqrt(2 * np.pi) if draw is torch.randn else np.ones_like(at)
    # The standard error sqrt(exact / (2 sqrt(pi) n bandwidth)) is below 0.025 inside; folding doubles the variance at
    # an edge. Five of them.
    assert np.abs(density - exact).max() < 5 * 0.025 * np.sqrt(2)


def test_contours_hold_their_mass_along_a_narrow_ridge():
    # With correlation 0.99 the exact 90 % region is the ellipse where the squared Mahalanobis radius is -2 log 0.1.
    # Its area in whitened coordinates is pi times that; smoothing by a bandwidth h widens it by the factor 1 + h^2.
    draws = torch.randn(5000, 2).double().numpy() @ np.array([[1.0, 0.99], [0.0, np.sqrt(1 - 0.99**2)]])
    ax = plt.figure().add_subplot()
    _contours(ax, draws, (0.9,), "k", "-")
    (segment,) = ax.collections[0].get_paths()[0].to_polygons()
    x, y = segment.T
    area = 0.5 * abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / np.sqrt(np.linalg.det(np.cov(draws.T)))
    widened = 1 + 5000 ** (-1 / 3)
    assert area == pytest.approx(np.pi * -2 * np.log(0.1) * widened, rel=0.05)


def test_posterior_plots_refuse_what_they_cannot_draw():
    good = torch.randn(50, 2)
    with pytest.raises(ValueError, match="expected 1 to 6 samples to draw, got 0"):
        plot_posterior_pair({})
    with pytest.raises(ValueError, match=r"samples\['flow'\]: expected shape \(any, any\), got \(50,\)"):
        plot_posterior_pair({"flow": torch.randn(50)})
    with pytest.raises(ValueError, match="100 of 100 values are not finite"):
        plot_posterior_pair({"flow": good / 0})
    with pytest.raises(ValueError, match=r"columns \[0, 1\] constant"):
        plot_posterior_pair({"flow": torch.ones(50, 2)})
    with pytest.raises(ValueError, match="expected dimension 2 throughout, got 3 in 'prior'"):
        plot_posterior_pair({"flow": good}, prior=torch.randn(50, 3))
    with pytest.raises(ValueError, match=r"true_values: expected shape \(2,\), got \(3,\)"):
        plot_posterior_pair({"flow": good}, true_values=torch.zeros(3))
    with pytest.raises(ValueError, match=r"no column called \['phi'\]"):
        plot_posterior_pair({"flow": posterior(theta=(2,))}, true_values={"phi": torch.tensor(0.0)})
    with pytest.raises(ValueError, match="rows: expected at least one outcome"):
        plot_posterior_grid([])
    with pytest.raises(ValueError, match="row_names: expected one entry for each of the 1 rows, got 2"):
        plot_posterior_grid([{"flow": good}], row_names=["a", "b"])
    with pytest.raises(ValueError, match="expected the same dimension in all"):
        plot_posterior_grid([{"flow": good}, {"flow": torch.randn(50, 3)}])

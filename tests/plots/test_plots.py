import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from pyro_voed.plots import (
    plot_design_path,
    plot_eig,
    plot_posterior_grid,
    plot_posterior_pair,
    plot_realisations,
    plot_training,
)
from pyro_voed.plots.posteriors import _contours
from pyro_voed.results import Certificate, DesignResult, EIGResult, FitHistory, PosteriorSample


@pytest.fixture(autouse=True)
def clean_figures():
    backend = matplotlib.get_backend()
    plt.switch_backend("Agg")
    settings = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == settings, "a plot changed matplotlib's global settings"
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # What cannot be rendered fails here.
    plt.close("all")
    plt.switch_backend(backend)


def estimate(eig, bound="lower", estimator="eig_flow", designs=None, **fields):
    eig = torch.as_tensor(eig)
    return EIGResult(
        eig=eig,
        standard_error=torch.full_like(eig, 0.05),
        bound=bound,
        estimator=estimator,
        num_simulations=100,
        num_samples=10,
        seconds=1.0,
        designs={"xi": torch.ones(3)} if designs is None else designs,
        target_labels=("theta",),
        observation_labels=("y",),
        **fields,
    )


def certificate(interval):
    """A certificate of which the plots draw the interval."""
    low, high = interval
    error, sizes = torch.zeros_like(low), (1,) * low.numel()
    return Certificate(interval, 0.95, low, error, high, error, error, True, True, sizes, sizes, sizes, 1, 1.0)


def with_companions(eig, designs=None, interval=None):
    eig = torch.as_tensor(eig)
    return estimate(
        eig,
        designs=designs,
        references=(
            estimate(eig + 0.2, "upper", "eig_marginal", designs),
            estimate(eig + 0.1, "consistent", "eig_nmc", designs),
        ),
        certificate=None if interval is None else certificate(interval),
    )


NAMES = ["eig_flow (lower bound)", "eig_marginal (upper bound)", "eig_nmc (reference)"]


def history(num_steps=100, validation=None, reduced_from=None):
    learning_rate = torch.ones(num_steps)
    if reduced_from is not None:
        learning_rate[reduced_from:] = 0.5
    return FitHistory(torch.arange(num_steps) / 10.0, learning_rate, "converged", 1.0, validation)


def design_result(path, steps):
    final = estimate(1.0, designs={name: values[-1] for name, values in path.items()})
    return DesignResult(
        final=final,
        path=path,
        path_steps=steps,
        history=history(),
        start_eigs=torch.ones(1),
        num_simulations=1,
        seconds=1.0,
    )


def posterior(num_draws=200, **shapes):
    return PosteriorSample(
        values={name: torch.randn(2, num_draws, *shape) for name, shape in shapes.items()},
        observations={},
        method="NUTS",
        seconds=1.0,
        effective_sample_size={},
    )


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def data_of(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_eig_curve_draws_the_estimates_in_order_of_the_design(shape):
    designs = {"xi": torch.tensor([2.0, 0.0, 1.0]).reshape(3, *shape)}
    ax = plot_eig(with_companions([0.7, 0.1, 0.5], designs))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("xi", "expected information gain (nats)")
    assert legend_of(ax) == NAMES
    for line, offset in zip(ax.lines, (0.0, 0.2, 0.1), strict=True):
        x, y = data_of(line)
        np.testing.assert_allclose(x, [0.0, 1.0, 2.0])
        np.testing.assert_allclose(y, np.array([0.1, 0.5, 0.7]) + offset, rtol=1e-6)
    band = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [0.1 - 0.1, 0.7 + 0.1], atol=1e-6)


def test_eig_curve_draws_the_interval_where_there_is_one():
    eig = torch.tensor([0.1, 0.5])
    result = estimate(
        eig, designs={"xi": torch.tensor([0.0, 1.0])}, certificate=certificate(torch.stack([eig - 0.3, eig + 0.4]))
    )
    ax = plot_eig(result)
    assert legend_of(ax) == ["certified interval", NAMES[0]]
    band = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [-0.2, 0.9], atol=1e-6)


@pytest.mark.parametrize("eig", [1.0, [1.0]])
def test_eig_at_one_design_puts_the_estimates_side_by_side(eig):
    ax = plot_eig(with_companions(eig, interval=torch.tensor([0.9, 1.3])))
    assert "nats" in ax.get_ylabel()
    assert [label.get_text().replace("\n", " ") for label in ax.get_xticklabels()] == NAMES
    heights = [container.lines[0].get_ydata()[0] for container in ax.containers]
    np.testing.assert_allclose(heights, [1.0, 1.2, 1.1], rtol=1e-6)
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose([low, high], [0.9, 1.1], rtol=1e-6)
    assert legend_of(ax) == ["certified interval"]


def test_eig_refuses_what_it_cannot_draw():
    several = {"xi": torch.zeros(4), "zeta": torch.zeros(4, 2)}
    result = estimate(torch.zeros(4), designs=several)
    with pytest.raises(ValueError, match=r"one-dimensional batch, got a batch of shape \(2, 2\)"):
        plot_eig(estimate(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match=r"design_label: expected one of \['xi', 'zeta'\]"):
        plot_eig(result)
    with pytest.raises(ValueError, match=r"no design called \['psi'\]"):
        plot_eig(result, "psi")
    with pytest.raises(ValueError, match=r"expected a scalar design, but each 'zeta' has shape \(2,\)"):
        plot_eig(result, "zeta")
    assert plot_eig(result, "xi").get_xlabel() == "xi"


def test_training_draws_minibatch_running_mean_validation_and_reduced_rate():
    ax = plot_training(history(validation=torch.tensor([1.0, 4.0]), reduced_from=80), smooth=3)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "bound (nats)")
    assert legend_of(ax) == ["learning rate reduced", "minibatch", "mean of the last 3 steps", "validation"]
    minibatch, running, validation = map(data_of, ax.lines)
    np.testing.assert_allclose(minibatch, [np.arange(1, 101), np.arange(100) / 10], rtol=1e-5)
    np.testing.assert_allclose(running, [np.arange(3, 101), np.arange(1, 99) / 10], rtol=1e-5)
    np.testing.assert_allclose(validation, [[50, 100], [1.0, 4.0]])
    (shaded,) = ax.patches
    assert (shaded.get_x(), shaded.get_width()) == (80.5, 20.0)


def test_training_without_reduction_or_validation_leaves_them_out():
    assert legend_of(plot_training(history())) == ["minibatch", "mean of the last 2 steps"]


def test_training_view_is_not_lost_to_the_first_steps():
    record = history(1000)
    record.bound[0] = -1e6
    assert plot_training(record).get_ylim()[0] > -20


def test_training_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="nothing was learnt"):
        plot_training(None)
    with pytest.raises(ValueError, match="smooth: expected at most the 100 steps"):
        plot_training(history(), smooth=101)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (9,)])
def test_design_path_draws_every_element_with_its_start_and_end(shape):
    steps, path = torch.tensor([0, 10, 20, 30]), torch.randn(4, *shape)
    ax = plot_design_path(design_result({"xi": path}, steps))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "design xi")
    elements = path.flatten(1).T if shape else path.unsqueeze(0)
    assert len(ax.lines) == 3 * len(elements)
    for index, element in enumerate(elements.numpy()):
        line, start, end = ax.lines[3 * index : 3 * index + 3]
        np.testing.assert_allclose(data_of(line), [steps, element], rtol=1e-6)
        np.testing.assert_allclose(data_of(start), [[0], element[:1]], rtol=1e-6)
        np.testing.assert_allclose(data_of(end), [[30], element[-1:]], rtol=1e-6)
        assert legend_of(ax)[index].endswith(f"= {element[-1]:.3g}")


def test_design_path_needs_a_label_where_there_are_several():
    result = design_result({"a": torch.zeros(2), "b": torch.zeros(2, 2)}, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"design_label: expected one of \['a', 'b'\]"):
        plot_design_path(result)
    assert plot_design_path(result, "b").get_ylabel() == "design b"


@pytest.mark.parametrize("num_curves", [1, 3])
def test_realisations_draw_outcomes_and_curves(num_curves):
    designs, outcomes = torch.tensor([1.0, 2.0]), torch.randn(3, 2)
    grid, curves = torch.linspace(0, 3, 5), torch.randn(num_curves, 5)
    ax = plot_realisations(
        designs, outcomes, curve_designs=grid, curve_values=curves, design_name="S (mM)", observation_name="v (mM/s)"
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("S (mM)", "v (mM/s)")
    for dots, outcome in zip(ax.collections, outcomes, strict=True):
        np.testing.assert_allclose(dots.get_offsets(), torch.stack([designs, outcome], 1), rtol=1e-6)
    for line, curve in zip(ax.lines, curves, strict=True):
        np.testing.assert_allclose(data_of(line), [grid, curve], rtol=1e-6)
    # A curve of each experiment shares its colour; a curve of no one experiment has none of theirs.
    shared = [to_rgba(line.get_color()) == tuple(ax.collections[0].get_facecolor()[0]) for line in ax.lines]
    assert shared == [num_curves == 3] + [False] * (num_curves - 1)


def test_realisations_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"observations: expected shape \(any, 2\), got \(4, 3\)"):
        plot_realisations(torch.zeros(2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"designs: expected shape \(any\), got \(2, 1\)"):
        plot_realisations(torch.zeros(2, 1), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="expected both or neither"):
        plot_realisations(torch.zeros(2), torch.zeros(4, 2), curve_designs=torch.zeros(5))
    with pytest.raises(ValueError, match=r"curve_values: expected shape \(any, 5\)"):
        plot_realisations(torch.zeros(2), torch.zeros(4, 2), curve_designs=torch.zeros(5), curve_values=torch.zeros(5))


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
    with pytest.raises(ValueError, match="some draws are not finite"):
        plot_posterior_pair({"flow": good / 0})
    with pytest.raises(ValueError, match="differ in every column"):
        plot_posterior_pair({"flow": torch.ones(50, 2)})
    with pytest.raises(ValueError, match="expected dimension 2 throughout, got 3 in 'prior'"):
        plot_posterior_pair({"flow": good}, prior=torch.randn(50, 3))
    with pytest.raises(ValueError, match=r"true_values: expected shape \(2\), got \(3,\)"):
        plot_posterior_pair({"flow": good}, true_values=torch.zeros(3))
    with pytest.raises(ValueError, match=r"no column called \['phi'\]"):
        plot_posterior_pair({"flow": posterior(theta=(2,))}, true_values={"phi": torch.tensor(0.0)})
    with pytest.raises(ValueError, match="rows: expected at least one outcome"):
        plot_posterior_grid([])
    with pytest.raises(ValueError, match="row_names: expected one entry for each of the 1 rows, got 2"):
        plot_posterior_grid([{"flow": good}], row_names=["a", "b"])
    with pytest.raises(ValueError, match="expected the same dimension in all"):
        plot_posterior_grid([{"flow": good}, {"flow": torch.randn(50, 3)}])


DRAWN_ON_AXES = {
    "plot_eig": lambda ax: plot_eig(with_companions([0.1, 0.2], {"xi": torch.tensor([0.0, 1.0])}), ax=ax),
    "plot_eig, one design": lambda ax: plot_eig(with_companions(0.1), ax=ax),
    "plot_training": lambda ax: plot_training(history(), ax=ax),
    "plot_design_path": lambda ax: plot_design_path(design_result({"xi": torch.zeros(2, 2)}, torch.arange(2)), ax=ax),
    "plot_realisations": lambda ax: plot_realisations(torch.zeros(2), torch.zeros(1, 2), ax=ax),
}


@pytest.mark.parametrize("draw", DRAWN_ON_AXES.values(), ids=DRAWN_ON_AXES)
def test_axes_given_are_drawn_on_and_returned(draw):
    figure, (left, right) = plt.subplots(1, 2)
    assert draw(right) is right
    assert not left.has_data()
    assert right.has_data()
    assert plt.get_fignums() == [figure.number]
    assert draw(None).figure is not figure

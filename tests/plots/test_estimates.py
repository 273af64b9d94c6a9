import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from pyro_voed.plots import plot_design_path, plot_eig, plot_realisations, plot_training
from pyro_voed.results import DesignResult, FitHistory
from tests.plots.cases import certified, data_of, estimate, extent, legend_of

NAMES = ["eig_flow (lower bound)", "eig_marginal (upper bound)", "eig_nmc (reference)"]


def with_references(eig, designs=None):
    eig = torch.as_tensor(eig)
    above, near = (
        estimate(eig + 0.2, "upper", "eig_marginal", designs),
        estimate(eig + 0.1, "consistent", "eig_nmc", designs),
    )
    return estimate(eig, designs=designs, references=(above, near))


def history(num_steps=100, validation=None, reduced_from=None):
    learning_rate = torch.ones(num_steps)
    learning_rate[reduced_from or num_steps :] = 0.5
    return FitHistory(torch.arange(num_steps) / 10.0, learning_rate, "converged", 1.0, validation)


def search(path, steps):
    return DesignResult(
        final=estimate(1.0),
        path=path,
        path_steps=steps,
        history=history(),
        start_eigs=torch.ones(1),
        num_simulations=1,
        seconds=1.0,
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_eig_curve_draws_the_estimates_in_order_of_the_design(shape):
    ax = plot_eig(with_references([0.7, 0.1, 0.5], {"xi": torch.tensor([2.0, 0.0, 1.0]).reshape(3, *shape)}))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("xi", "expected information gain (nats)")
    assert legend_of(ax) == NAMES
    for line, offset in zip(ax.lines, (0.0, 0.2, 0.1), strict=True):
        np.testing.assert_allclose(data_of(line), [[0.0, 1.0, 2.0], np.array([0.1, 0.5, 0.7]) + offset], rtol=1e-6)
    np.testing.assert_allclose(extent(ax.collections[0]), [0.1 - 0.1, 0.7 + 0.1], atol=1e-6)


def test_eig_curve_draws_the_interval_where_there_is_one():
    ax = plot_eig(certified([0.1, 0.5], {"xi": torch.tensor([0.0, 1.0])}, gap=0.2, error=0.1))
    assert legend_of(ax) == ["certified interval", NAMES[0]]
    np.testing.assert_allclose(extent(ax.collections[0]), [-0.1, 0.9], atol=1e-6)


@pytest.mark.parametrize("eig", [1.0, [1.0]])
def test_eig_at_one_design_puts_the_estimates_side_by_side(eig):
    ax = plot_eig(with_references(eig))
    assert "nats" in ax.get_ylabel()
    assert [label.get_text().replace("\n", " ") for label in ax.get_xticklabels()] == NAMES
    heights = [container.lines[0].get_ydata()[0] for container in ax.containers]
    np.testing.assert_allclose(heights, [1.0, 1.2, 1.1], rtol=1e-6)
    np.testing.assert_allclose(ax.containers[0].lines[2][0].get_segments()[0][:, 1], [0.9, 1.1], rtol=1e-6)
    assert legend_of(plot_eig(certified(eig))) == ["certified interval"]


def test_eig_refuses_what_it_cannot_draw():
    result = estimate(torch.zeros(4), designs={"xi": torch.zeros(4), "zeta": torch.zeros(4, 2)})
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
    assert legend_of(plot_training(history())) == ["minibatch", "mean of the last 2 steps"]


def test_training_view_is_not_lost_to_the_first_steps():
    record = history(1000)
    record.bound[0] = -1e6
    assert plot_training(record).get_ylim()[0] > -20


def test_training_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="nothing was learned"):
        plot_training(None)
    with pytest.raises(ValueError, match="smooth: expected at most the 100 steps"):
        plot_training(history(), smooth=101)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (9,)])
def test_design_path_draws_every_element_with_its_start_and_end(shape):
    steps, path = torch.tensor([0, 10, 20, 30]), torch.randn(4, *shape)
    ax = plot_design_path(search({"xi": path}, steps))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "design xi")
    elements = path.flatten(1).T if shape else path.unsqueeze(0)
    assert len(ax.lines) == 3 * len(elements)
    for index, element in enumerate(elements.numpy()):
        drawn = map(data_of, ax.lines[3 * index : 3 * index + 3])
        for found, wanted in zip(drawn, ([steps, element], [[0], element[:1]], [[30], element[-1:]]), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert legend_of(ax)[index].endswith(f"= {element[-1]:.3g}")


def test_design_path_needs_a_label_where_there_are_several():
    result = search({"a": torch.zeros(2), "b": torch.zeros(2, 2)}, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"design_label: expected one of \['a', 'b'\]"):
        plot_design_path(result)
    assert plot_design_path(result, "b").get_ylabel() == "design b"


@pytest.mark.parametrize("num_curves", [1, 3])
def test_realisations_draw_outcomes_and_curves(num_curves):
    designs, outcomes = torch.tensor([1.0, 2.0]), torch.randn(3, 2)
    grid, curves = torch.linspace(0, 3, 5), torch.randn(num_curves, 5)
    names = {"design_name": "S (mM)", "observation_name": "v (mM/s)"}
    ax = plot_realisations(designs, outcomes, curve_designs=grid, curve_values=curves, **names)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("S (mM)", "v (mM/s)")
    for dots, outcome in zip(ax.collections, outcomes, strict=True):
        np.testing.assert_allclose(dots.get_offsets(), torch.stack([designs, outcome], 1), rtol=1e-6)
    for line, curve in zip(ax.lines, curves, strict=True):
        np.testing.assert_allclose(data_of(line), [grid, curve], rtol=1e-6)
    # A curve of each experiment shares its colour; a curve of no one experiment has none of theirs.
    shared = [to_rgba(line.get_color()) == tuple(ax.collections[0].get_facecolor()[0]) for line in ax.lines]
    assert shared == [num_curves == 3] + [False] * (num_curves - 1)


def test_realisations_refuse_shapes_that_do_not_fit():
    zeros = torch.zeros
    for message, designs, outcomes, curves in (
        (r"observations: expected shape \(any, 2\), got \(4, 3\)", zeros(2), zeros(4, 3), {}),
        (r"designs: expected shape \(any,\), got \(2, 1\)", zeros(2, 1), zeros(4, 2), {}),
        ("expected both or neither", zeros(2), zeros(4, 2), {"curve_designs": zeros(5)}),
        (r"curve_values: .* \(any, 5\)", zeros(2), zeros(4, 2), {"curve_designs": zeros(5), "curve_values": zeros(5)}),
    ):
        with pytest.raises(ValueError, match=message):
            plot_realisations(designs, outcomes, **curves)


DRAWN_ON_AXES = {
    "plot_eig": lambda ax: plot_eig(with_references([0.1, 0.2], {"xi": torch.tensor([0.0, 1.0])}), ax=ax),
    "plot_eig, one design": lambda ax: plot_eig(with_references(0.1), ax=ax),
    "plot_training": lambda ax: plot_training(history(), ax=ax),
    "plot_design_path": lambda ax: plot_design_path(search({"xi": torch.zeros(2, 2)}, torch.arange(2)), ax=ax),
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

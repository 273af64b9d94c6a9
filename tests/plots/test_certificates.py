import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from pyro_voed.plots import plot_certificate
from pyro_voed.plots.style import BLUE, GREEN, VERMILLION
from pyro_voed.results import Certificate, EIGResult


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


def certified(lower, designs, *, gap=0.02, error=0.01, is_certified=True):
    lower = torch.as_tensor(lower)
    upper, errors = lower + gap, torch.full_like(lower, error)
    certificate = Certificate(
        interval=torch.stack([lower - 2 * error, upper + 2 * error]),
        confidence=0.95,
        lower=lower,
        lower_standard_error=errors,
        upper=upper,
        upper_standard_error=errors,
        pareto_k=torch.full_like(lower, 0.3),
        certified=is_certified,
        width_reached=True,
        num_flow_samples=(1_000,) * lower.numel(),
        num_outer_samples=(500,) * lower.numel(),
        num_inner_samples=(16,) * lower.numel(),
        num_simulations=10_000,
        seconds=1.0,
    )
    return EIGResult(
        eig=lower,
        standard_error=errors,
        bound="lower",
        estimator="eig_flow",
        num_simulations=10_000,
        num_samples=1_000,
        seconds=1.0,
        designs=designs,
        target_labels=("theta",),
        observation_labels=("y",),
        certificate=certificate,
    )


def line_of(ax, label):
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float), to_hex(line.get_color()).upper()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_interval_bounds_and_gap_against_the_design_in_order(shape):
    xi = torch.tensor([2.0, 0.0, 1.0])
    gap = torch.tensor([0.03, 0.01, 0.02])
    ax = plot_certificate(certified([0.7, 0.1, 0.5], {"xi": xi.reshape(3, *shape)}, gap=gap))
    x, lower, lower_colour = line_of(ax, "lower bound")
    _, upper, upper_colour = line_of(ax, "upper bound")
    np.testing.assert_allclose(x, [0.0, 1.0, 2.0])
    np.testing.assert_allclose(lower, [0.1, 0.5, 0.7], rtol=1e-6)
    np.testing.assert_allclose(upper, [0.11, 0.52, 0.73], rtol=1e-6)
    assert (lower_colour, upper_colour) == (BLUE, VERMILLION)
    band = ax.collections[0].get_paths()[0].vertices
    assert to_hex(ax.collections[0].get_facecolor()[0][:3]).upper() == GREEN
    for position, low, high in zip(x, [0.08, 0.48, 0.68], [0.13, 0.54, 0.75], strict=True):
        here = band[np.isclose(band[:, 0], position), 1]
        np.testing.assert_allclose([here.min(), here.max()], [low, high], rtol=1e-5)
    below = ax.figure.axes[-1]
    at, gaps, _ = line_of(below, "gap: upper - lower")
    np.testing.assert_allclose(at, [0.0, 1.0, 2.0])
    np.testing.assert_allclose(gaps, [0.01, 0.02, 0.03], atol=1e-6)
    np.testing.assert_allclose(line_of(below, "width of the interval")[1], [0.05, 0.06, 0.07], atol=1e-6)
    assert (ax.get_ylabel(), below.get_xlabel()) == ("expected information gain (nats)", "xi")
    assert below.get_xlim() == ax.get_xlim()


AXES = {
    "a new figure": lambda: None,
    "one of a grid": lambda: plt.subplots(1, 2, layout="constrained")[1][1],
    "put in by hand": lambda: plt.figure().add_axes((0.2, 0.2, 0.7, 0.7)),
}


@pytest.mark.parametrize("name", AXES)
def test_the_gap_lies_below_the_curves_and_inside_the_figure(name):
    ax = plot_certificate(certified(torch.rand(5), {"xi": torch.arange(5.0)}), ax=AXES[name]())
    ax.figure.canvas.draw()
    upper, lower = ax.get_window_extent(), ax.figure.axes[-1].get_tightbbox(ax.figure.canvas.get_renderer())
    assert lower.y1 <= upper.y0 + 1
    assert lower.y0 >= 0
    assert lower.x0 >= 0


@pytest.mark.parametrize("batch", [(), (1,)])
def test_one_design_shows_the_interval_and_both_bounds(batch):
    designs = {"xi": torch.ones(*batch, 7)}
    ax = plot_certificate(certified(torch.full(batch, 1.0), designs))
    span = ax.patches[0].get_bbox() if hasattr(ax.patches[0], "get_bbox") else ax.patches[0].get_extents()
    np.testing.assert_allclose([span.y0, span.y1], [0.98, 1.04], rtol=1e-6)
    assert [container.lines[0].get_ydata()[0] for container in ax.containers] == pytest.approx([1.0, 1.02])
    assert ax.figure.axes == [ax]


@pytest.mark.parametrize(("flag", "word"), [(True, "certified"), (False, "uncertified")])
@pytest.mark.parametrize("size", [1, 3])
def test_the_legend_says_whether_it_is_certified_and_how_sure(flag, word, size):
    ax = plot_certificate(certified(torch.ones(size), {"xi": torch.arange(float(size))}, is_certified=flag))
    first = next(text.get_text() for text in ax.get_legend().get_texts() if "interval" in text.get_text())
    assert first.startswith(f"{word} 0.95 interval")
    assert ("all together" in first) == (size > 1)


def test_it_draws_on_the_axes_given():
    _, mine = plt.subplots()
    assert plot_certificate(certified(torch.ones(3), {"xi": torch.arange(3.0)}), ax=mine) is mine
    assert len(plt.get_fignums()) == 1


def test_the_label_chooses_the_axis_among_several_designs():
    designs = {"xi": torch.arange(3.0), "gain": torch.tensor([5.0, 4.0, 3.0])}
    ax = plot_certificate(certified([0.1, 0.2, 0.3], designs), "gain")
    np.testing.assert_allclose(line_of(ax, "lower bound")[1], [0.3, 0.2, 0.1], rtol=1e-6)
    assert ax.figure.axes[-1].get_xlabel() == "gain"
    with pytest.raises(ValueError, match="several designs"):
        plot_certificate(certified([0.1, 0.2, 0.3], designs))
    with pytest.raises(ValueError, match="no design called"):
        plot_certificate(certified([0.1, 0.2, 0.3], designs), "length")


def test_what_cannot_be_drawn_is_refused():
    bare = EIGResult(torch.tensor(1.0), torch.tensor(0.1), "lower", "eig_flow", 0, 0, 0.0, {}, (), ())
    with pytest.raises(ValueError, match="no certificate"):
        plot_certificate(bare)
    with pytest.raises(ValueError, match="one-dimensional batch"):
        plot_certificate(certified(torch.ones(2, 2), {"xi": torch.ones(2, 2)}))
    with pytest.raises(ValueError, match="expected a scalar design"):
        plot_certificate(certified(torch.ones(2), {"xi": torch.ones(2, 7)}))

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from pyro_voed.plots import plot_certificate
from pyro_voed.plots.style import BLUE, GREEN, VERMILLION
from tests.plots.cases import certified, data_of, estimate, legend_of, line_of


@pytest.mark.parametrize("shape", [(), (1,)])
def test_interval_bounds_and_gap_against_the_design_in_order(shape):
    xi, gap = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.03, 0.01, 0.02])
    ax = plot_certificate(certified([0.7, 0.1, 0.5], {"xi": xi.reshape(3, *shape)}, gap=gap))
    below = ax.figure.axes[-1]
    for axes, label, values in (
        (ax, "lower bound", [0.1, 0.5, 0.7]),
        (ax, "upper bound", [0.11, 0.52, 0.73]),
        (below, "gap: upper - lower", [0.01, 0.02, 0.03]),
        (below, "width of the interval", [0.05, 0.06, 0.07]),
    ):
        np.testing.assert_allclose(data_of(line_of(axes, label)), [[0.0, 1.0, 2.0], values], atol=1e-6)
    colours = [to_hex(line_of(ax, label).get_color()).upper() for label in ("lower bound", "upper bound")]
    assert [*colours, to_hex(ax.collections[0].get_facecolor()[0][:3]).upper()] == [BLUE, VERMILLION, GREEN]
    band = ax.collections[0].get_paths()[0].vertices
    for position, low, high in zip([0.0, 1.0, 2.0], [0.08, 0.48, 0.68], [0.13, 0.54, 0.75], strict=True):
        here = band[np.isclose(band[:, 0], position), 1]
        np.testing.assert_allclose([here.min(), here.max()], [low, high], rtol=1e-5)
    assert (ax.get_ylabel(), below.get_xlabel()) == ("expected information gain (nats)", "xi")
    assert below.get_xlim() == ax.get_xlim()


AXES = {
    "a new figure": lambda: None,
    "one of a grid": lambda: plt.subplots(1, 2, layout="constrained")[1][1],
    "put in by hand": lambda: plt.figure().add_axes((0.2, 0.2, 0.7, 0.7)),
}


@pytest.mark.parametrize("name", AXES)
def test_the_gap_lies_below_the_curves_and_inside_the_figure(name):
    given = AXES[name]()
    ax = plot_certificate(certified(torch.rand(5), {"xi": torch.arange(5.0)}), ax=given)
    assert given in (None, ax)
    ax.figure.canvas.draw()
    upper, lower = ax.get_window_extent(), ax.figure.axes[-1].get_tightbbox(ax.figure.canvas.get_renderer())
    assert lower.y1 <= upper.y0 + 1
    assert min(lower.y0, lower.x0) >= 0


@pytest.mark.parametrize("batch", [(), (1,)])
def test_one_design_shows_the_interval_and_both_bounds(batch):
    ax = plot_certificate(certified(torch.full(batch, 1.0), {"xi": torch.ones(*batch, 7)}))
    span = ax.patches[0].get_bbox()
    np.testing.assert_allclose([span.y0, span.y1], [0.98, 1.04], rtol=1e-6)
    assert [container.lines[0].get_ydata()[0] for container in ax.containers] == pytest.approx([1.0, 1.02])
    assert ax.figure.axes == [ax]


@pytest.mark.parametrize(("flag", "word"), [(True, "certified"), (False, "uncertified")])
@pytest.mark.parametrize("size", [1, 3])
def test_the_legend_says_whether_it_is_certified_and_how_sure(flag, word, size):
    ax = plot_certificate(certified(torch.ones(size), {"xi": torch.arange(float(size))}, is_certified=flag))
    first = next(text for text in legend_of(ax) if "interval" in text)
    assert first.startswith(f"{word} 0.95 interval")
    assert ("all together" in first) == (size > 1)


def test_the_label_chooses_the_axis_and_what_cannot_be_drawn_is_refused():
    designs = {"xi": torch.arange(3.0), "gain": torch.tensor([5.0, 4.0, 3.0])}
    ax = plot_certificate(certified([0.1, 0.2, 0.3], designs), "gain")
    np.testing.assert_allclose(data_of(line_of(ax, "lower bound"))[1], [0.3, 0.2, 0.1], rtol=1e-6)
    assert ax.figure.axes[-1].get_xlabel() == "gain"
    with pytest.raises(ValueError, match="several designs"):
        plot_certificate(certified([0.1, 0.2, 0.3], designs))
    with pytest.raises(ValueError, match="no certificate"):
        plot_certificate(estimate(1.0))

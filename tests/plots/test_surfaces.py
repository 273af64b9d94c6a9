"""What a map of the expected information gain shows, and what it is refused for."""

import matplotlib.pyplot as plt
import pytest
import torch

from pyro_voed.plots import plot_eig_surface
from tests.plots.cases import estimate


def grid(size=5):
    values = torch.linspace(0.0, 1.0, size)
    return torch.stack(torch.meshgrid(values, 2.0 * values, indexing="ij"), -1)


def star(ax):
    (line,) = ax.get_lines()
    return line.get_xdata()[0], line.get_ydata()[0]


def test_the_largest_value_is_marked_where_it_is():
    points = grid()
    eig = -((points - torch.tensor([0.25, 1.5])) ** 2).sum(-1)
    for result in (
        estimate(eig, designs={"xi": points}),
        estimate(eig, designs={"dose": points[..., 0], "time": points[..., 1]}),
        estimate(eig.flatten(), designs={"xi": points.flatten(0, 1)}),
    ):
        ax = plot_eig_surface(result)
        assert star(ax) == (0.25, 1.5)
        assert ax.get_title() == "largest: -0.00 ± 0.10 nats"
        assert "lower bound" in ax.figure.axes[-1].get_ylabel()


def test_axes_are_the_variables_asked_for():
    points = grid()
    result = estimate(points[..., 0], designs={"xi": points, "stage": torch.zeros(())})
    assert plot_eig_surface(estimate(points[..., 0], designs={"xi": points})).get_xlabel() == "xi[0]"
    _, given = plt.subplots()
    ax = plot_eig_surface(result, ["xi[1]", "xi[0]"], given)
    assert ax is given
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("xi[1]", "xi[0]")
    assert star(ax)[1] == 1.0


def test_what_is_no_map_is_refused():
    points = grid()
    with pytest.raises(ValueError, match=r"expected two of .*'xi\[0\]'.*got"):
        plot_eig_surface(estimate(points[..., 0], designs={"xi": points, "stage": points[..., 0]}))
    with pytest.raises(ValueError, match="no design variable called"):
        plot_eig_surface(estimate(points[..., 0], designs={"xi": points}), ["xi[0]", "psi"])
    with pytest.raises(ValueError, match="at least 4 designs"):
        plot_eig_surface(estimate(torch.zeros(2), designs={"xi": torch.rand(2, 2)}))
    line = torch.linspace(0.0, 1.0, 9)
    with pytest.raises(ValueError, match="on one line"):
        plot_eig_surface(estimate(line, designs={"xi": torch.stack([line, 3.0 * line - 1.0], -1)}))
    with pytest.raises(ValueError, match="on one line"):
        plot_eig_surface(estimate(line, designs={"xi": torch.stack([line, torch.ones(9)], -1)}))

"""Every figure of these tests is rendered once and closed, and matplotlib's settings must be as they were."""

import matplotlib
import matplotlib.pyplot as plt
import pytest


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

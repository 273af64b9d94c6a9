"""Results to draw, and what to read back from the artists that were drawn."""

import numpy as np
import torch

from pyro_voed.results import Certificate, EIGResult


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


def certified(lower, designs=None, *, gap=0.02, error=0.01, is_certified=True):
    """An estimate with a certificate whose interval reaches two errors beyond its bounds."""
    lower = torch.as_tensor(lower)
    upper, errors = lower + gap, torch.full_like(lower, error)
    interval = torch.stack([lower - 2 * error, upper + 2 * error])
    certificate = Certificate(
        interval, 0.95, lower, errors, upper, errors, errors, is_certified, True, (1,), (1,), (1,), 10_000, 1.0
    )
    return estimate(lower, designs=designs, certificate=certificate)


def data_of(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def line_of(ax, label):
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return line


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def extent(artist):
    """Lowest and highest corner of a filled area."""
    corners = artist.get_paths()[0].vertices[:, 1]
    return corners.min(), corners.max()

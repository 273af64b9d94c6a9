"""Point masses in what is meant to be continuous: limits of censored readings, spikes, draws from a list of particles.

A density on the real line can rise at an atom without limit. So a posterior density learned of targets that have atoms
is scored far too high, and an outcome density learned makes an upper bound fall below the truth; conditioning on them
does no harm. Atoms show as values that occur exactly twice. Continuous draws coincide in single precision as well, but
seldom (of 10,000 uniform draws about 6) or where neighbours are as near as numbers of their size can be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.sites import Site
from pyro_voed.results import element_names

LARGEST_SHARE = 0.005
"""Share of draws that may coincide with another one."""

SMALLEST = 1e-30
"""Draws of gamma distributions and the like end near here, where those below cannot be told apart."""

_OF_TARGETS = (
    "where a density of the targets would rise without limit. Use eig_critic, which needs none, or make what decides "
    "between point and continuous value a discrete target of its own"
)
_OF_OUTCOMES = (
    "where a density of the outcome would rise without limit. Use eig_flow, which only conditions on it, or, where it "
    "states its density as pyro_voed.Censored does, eig_nmc"
)


def check_targets(experiment: Experiment, sample: JointSample) -> None:
    """Raise NotImplementedError where a continuous target has atoms, for what learns a density of the targets."""
    _check(experiment.targets, "target", sample, _OF_TARGETS)


def check_outcomes(experiment: Experiment, sample: JointSample) -> None:
    """Raise NotImplementedError where a continuous outcome has atoms, for what learns a density of the outcome."""
    _check(experiment.observations, "outcome", sample, _OF_OUTCOMES)


def _check(sites: Sequence[Site], role: str, sample: JointSample, remedy: str) -> None:
    batch = sample.theta.shape[1:-1].numel()
    for site in sites:
        # Elements of a matrix that depend on each other are rounded where correlations are strong.
        elementwise = site.transform is None or site.packed_dim == site.shape.numel()
        if site.is_discrete or not elementwise:
            continue
        # At each design by itself: a limit may be another at another.
        values = sample.values[site.name].reshape(sample.num_samples, batch, -1)
        for index, name in enumerate(element_names(site.name, site.shape)):
            if site.measured is not None and not bool(site.measured.flatten()[index]):
                continue
            for column in values[..., index].unbind(1):
                share, value = tied(column)
                if share > max(LARGEST_SHARE, 4.0 / len(column)):
                    raise NotImplementedError(
                        f"{role} {name} takes single values with positive probability: {share:.1%} of {len(column)} "
                        f"draws coincide exactly with another, most at {value:.6g}, {remedy}."
                    )


def tied(values: Float[Tensor, " num_samples"]) -> tuple[float, float]:
    """Return the share of draws that coincide with another one, and where most do, what rounding explains left out."""
    found, counts = values.unique(return_counts=True)
    if len(found) == 1:
        return 0.0, float(found[0])
    # Not the next value, which may lie near by chance.
    steps = min(3, len(found) - 1)
    gaps, beyond = found[steps:] - found[:-steps], found.new_full((steps,), torch.inf)
    nearest = torch.minimum(torch.cat([gaps, beyond]), torch.cat([beyond, gaps]))
    # Numbers of this size cannot be much nearer to each other, or are as small as they can be.
    rounded = (nearest < 50.0 * torch.finfo(values.dtype).eps * found.abs()) | ((found.abs() < SMALLEST) & (found != 0))
    counts = torch.where(rounded | (counts == 1), 0, counts)
    return float(counts.sum()) / len(values), float(found[counts.argmax()])

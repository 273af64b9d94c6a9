"""Point masses in what is meant to be continuous: limits of censored readings, spikes, draws from a list of particles.

A density on the real line can rise at an atom without limit. So a posterior density learned of targets that have atoms
is scored far too high, and an outcome density learned makes an upper bound fall below the truth; conditioning on them
does no harm. Atoms show as values that occur exactly twice. Continuous draws coincide in single precision as well, but
seldom (of 10,000 uniform draws about 6) or everywhere, where the spread is near the resolution of the numbers.
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
        if site.is_discrete or site.name not in sample.values:
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
    """Return the share of draws that coincide with another one, and where most do; 0 where all are on a coarse grid."""
    found, counts = values.unique(return_counts=True)
    share = float(counts[counts > 1].sum()) / len(values)
    if share == 0.0 or len(found) < 3:
        constant = len(found) == 1
        return (0.0 if constant else share), float(found[counts.argmax()])
    # Neighbours as near to each other as numbers of this size can be.
    resolution = torch.finfo(values.dtype).eps * found.abs().median()
    coarse = found.diff().median() < 8.0 * resolution
    return (0.0 if bool(coarse) else share), float(found[counts.argmax()])

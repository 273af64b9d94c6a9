"""Runs that fail: values that are not finite, what is told of them, and draws without them.

Where failures are left out, draws go on until each design has as many valid runs as were asked for. Their terms are
those of the information given that a run is valid, which the driver multiplies by the share of valid runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.designs import unpack_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample, combine
from pyro_voed.experiment.sites import Site
from pyro_voed.results import element_names

MOST_ATTEMPTS = 100
"""Runs for each valid one after which drawing gives up."""

LARGEST_COUNT = 2.0**53

REMEDY = (
    'Look at the model there, or say what such runs are: Experiment(..., failures="outcome") where a failure tells '
    'something, failures="ignore" where nothing comes of it.'
)


def non_finite_sites(experiment: Experiment, sample: JointSample) -> str:
    """Return which sites of a sample hold values that are not finite, in which runs, or an empty string."""
    packed = {name: getattr(sample, name) for name in ("theta", "y", "log_prior", "log_likelihood")}
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in packed.items() if tensor is not None}
    counted = [sample.values[site.name] for site in experiment.observations if site.is_discrete]
    overflown = any(bool(_overflown(value).any()) for value in counted)
    if not any(counts.values()) and not overflown:
        return ""
    dims = sample.theta.dim() - 1
    values = {name: value.flatten(0, dims - 1) for name, value in sample.values.items()}
    if sample.designs is not None:
        own = sample.designs.expand(*sample.theta.shape[:-1], -1).flatten(0, dims - 1)
        values |= unpack_designs(experiment, own)
    found = failed_runs(experiment, values)
    if found:
        return found
    return "; ".join(
        f"{name} has {bad} of {getattr(sample, name).numel()} values not finite" for name, bad in counts.items() if bad
    )


def failed_runs(experiment: Experiment, values: Mapping[str, Tensor]) -> str:
    """Say of values of sites and designs, `(num_runs, *shape)`, where they are not finite, or nothing."""
    told = []
    for site in (*experiment.targets, *experiment.observations):
        value = values[site.name]
        bad = ~torch.isfinite(value)
        if site.is_discrete:
            bad = bad | _overflown(value)
        bad = bad if site.measured is None else bad & site.measured
        if bool(bad.any()):
            runs = bad.reshape(len(bad), -1).any(-1)
            told.append(
                f"site '{site.name}' has {int(bad.sum())} of {bad.numel()} values not finite{_of_rates(site)}, in "
                f"{int(runs.sum())} of {len(runs)} runs ({float(runs.double().mean()):.2g} of them)"
                f"{_region(experiment, values, runs)}"
            )
    return f"{'; '.join(told)}. {REMEDY}" if told else ""


def _overflown(value: Tensor) -> Tensor:
    """Return which counts came of a rate beyond all counting, for which torch draws the least integer."""
    return value.abs() >= LARGEST_COUNT


def _of_rates(site: Site) -> str:
    return " or beyond all counting: look at its rate" if site.is_discrete else ""


def _region(experiment: Experiment, values: Mapping[str, Tensor], failed: Tensor) -> str:
    """Return where failed runs lie, by the two elements of targets and designs that tell most of it."""
    if bool(failed.all()):
        return ""
    told = []
    for label in (*experiment.target_labels, *experiment.design_labels):
        if label not in values or not bool(torch.isfinite(values[label]).all()):
            continue
        flat = values[label].reshape(len(failed), -1).double()
        for name, column in zip(element_names(label, values[label].shape[1:]), flat.T, strict=True):
            told.append((_separation(column, failed), name, column))
    told.sort(key=lambda one: -one[0])
    ranges = [
        f"{name} in [{column[failed].min():.4g}, {column[failed].max():.4g}] (valid runs: "
        f"[{column[~failed].min():.4g}, {column[~failed].max():.4g}])"
        for separation, name, column in told[:2]
        if separation > 0.2
    ]
    return f", those with {' and '.join(ranges)}" if ranges else ""


def _separation(column: Tensor, failed: Tensor) -> float:
    """Return how well a number tells failed runs from others: 0 not at all, 0.5 wholly, wherever between they lie."""
    rank = column.argsort().argsort().double()
    # Failed runs may also lie between or around the others.
    places = (rank, (rank - rank[failed].median()).abs().argsort().argsort().double())
    num, others = int(failed.sum()), int((~failed).sum())
    return max(abs(float((r[failed].mean() - 0.5 * (num - 1)) / others) - 0.5) for r in places)


def average_share(shares: Sequence[Tensor | None]) -> Tensor | None:
    """Return the share of failed runs over parts of equal size, None where none may fail."""
    known = [share for share in shares if share is not None]
    return torch.stack(known).mean(0) if known else None


def valid_runs(draw: Callable[[int], JointSample], num_samples: int) -> JointSample:
    """Return runs that did not fail, `num_samples` at each design, from draws of a number of runs."""
    parts, have, drawn, size = [], 0, 0, num_samples
    while have < num_samples:
        if drawn >= MOST_ATTEMPTS * max(num_samples, 10):
            raise ArithmeticError(
                f"of {drawn} runs at a design {have} did not fail, and {num_samples} are needed. Leave out designs at "
                'which nearly all runs fail, or use failures="outcome".'
            )
        parts.append(draw(size))
        drawn += size
        failed = torch.cat([_of(part) for part in parts])
        have = int((failed == 0).sum(0).min())
        share = max(have / drawn, 1.0 / MOST_ATTEMPTS)
        size = max(8, int((num_samples - have) / share) + 1)
    whole = parts[0] if len(parts) == 1 else combine(parts, torch.cat, parts[0].designs)
    # Valid runs first, in the order in which they came.
    rows = failed.sort(dim=0, stable=True).indices[:num_samples]
    before = torch.cat([rows.new_full((1, *rows.shape[1:]), -1), rows[:-1]])
    taken = combine([whole], lambda tensors: _take(tensors[0], rows), whole.designs)
    return replace(
        taken,
        failed=(rows - before - 1).to(whole.theta.dtype),
        # Of expectation zero over all runs, not over those that did not fail.
        controls=None if taken.controls is None else taken.controls[..., :0],
        redraw=None,
    )


def failed_share(sample: JointSample, *, left_out: bool) -> Float[Tensor, "*design_batch"] | None:
    """Return the share of runs that failed, None where none may; `left_out` says that the sample is without them."""
    if sample.failed is None:
        return None
    count = sample.failed.sum(0)
    return count / (count + sample.num_samples) if left_out else count / sample.num_samples


def _of(sample: JointSample) -> Tensor:
    assert sample.failed is not None  # simulations are allowed to fail
    return sample.failed


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    index = rows.reshape(*rows.shape, *(1,) * (tensor.dim() - rows.dim()))
    return torch.take_along_dim(tensor, index.expand(*rows.shape, *tensor.shape[rows.dim() :]), 0)

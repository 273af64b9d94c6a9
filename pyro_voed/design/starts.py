"""Where searches start, and where they leave the best design."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.checks import check_known, warn
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.results import element_names

MAX_UNCONSTRAINED = 6.0
"""A design whose sigmoid-like map is this far out hardly moves any more: it is nudged back inside."""


EDGE = 0.02
"""Share of an interval at either end where no start is drawn."""


def rows_of_designs(values: Any, argument: str) -> dict[str, Tensor]:
    """Return values of designs that a user gave as tensors, `(num_rows, *shape)` for each label, at least one row."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{argument}: expected a dict from design labels to values (num_rows, *shape of the design), got "
            f"{type(values).__name__}."
        )
    if not values:
        raise ValueError(f"{argument}: expected a dict with the values of one design at least, got an empty one.")
    rows = {}
    for name, given in values.items():
        try:
            rows[name] = torch.as_tensor(given).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{argument}['{name}']: expected numbers, got {given!r}.") from error
        if rows[name].dim() == 0 or len(rows[name]) == 0:
            raise ValueError(
                f"{argument}['{name}']: expected shape (num_rows, *shape of the design) with one row at least, got "
                f"{tuple(rows[name].shape)}."
            )
    return rows


def equally_many(rows: Mapping[str, Tensor], argument: str) -> int:
    """Return how many rows each label has, equally many."""
    counts = {name: len(value) for name, value in rows.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{argument}: expected equally many for each design, got {counts}.")
    return next(iter(counts.values()))


def given_starts(sites: Sequence[DesignSite], starts: Any) -> dict[str, Tensor]:
    """Return starts that a user gave, `(num_starts, *shape)` for every label; those left out stay where they are."""
    rows = rows_of_designs(starts, "starts")
    check_known(rows, [site.name for site in sites], "starts", "design")
    count = equally_many(rows, "starts")
    full = {}
    for site in sites:
        value = rows.get(site.name, site.value.expand(count, *site.value.shape)).to(site.value)
        if value.shape[1:] != site.value.shape:
            expected = ", ".join(["num_starts", *map(str, site.value.shape)])
            raise ValueError(f"starts['{site.name}']: expected shape ({expected}), got {tuple(value.shape)}.")
        if not site.constraint.check(value).all():
            raise ValueError(f"starts['{site.name}']: expected values inside {site.constraint}, got {value.tolist()}.")
        full[site.name] = value
    return full


def perturbed(sites: Sequence[DesignSite]) -> dict[str, Tensor]:
    """Draw a start next to the stored one: N(0, 1) is added in unconstrained coordinates."""
    moved = {}
    for site in sites:
        coordinates = unconstrained(site, site.value)
        moved[site.name] = site.transform(coordinates + torch.randn_like(coordinates))
    return moved


def elsewhere(sites: Sequence[DesignSite]) -> dict[str, Tensor]:
    """Draw a start far from the stored one: uniform in intervals, but for their edges, and as `perturbed` without."""
    drawn = perturbed(sites)
    for site in sites:
        if site.interval_ends is not None:
            low, high = site.interval_ends
            drawn[site.name] = low + (high - low) * (EDGE + (1.0 - 2.0 * EDGE) * torch.rand_like(site.value))
    return drawn


def unconstrained(site: DesignSite, value: Tensor) -> Tensor:
    """Return a design's unconstrained coordinates, detached."""
    return site.transform.inv(value).detach().clone()


def nudged(site: DesignSite, value: Tensor) -> Tensor:
    """Return unconstrained coordinates, moved inside where the constraint's map is flat."""
    coordinates = unconstrained(site, value)
    probe = coordinates.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(site.transform(probe).sum(), probe)
    # Near a bound the map is flat (a sigmoid's slope is below 0.0025 beyond 6) and no gradient gets through; a real
    # line or a positive value has slopes of its own size, however far out.
    flat = (coordinates.abs() > MAX_UNCONSTRAINED) & (slope.abs() < 1e-3 * (1 + value.detach().abs().max()))
    if value.shape == coordinates.shape and flat.any():
        elements = zip(element_names(site.name, value.shape), flat.flatten().tolist(), strict=True)
        names = [name for name, is_flat in elements if is_flat]
        coordinates = torch.where(flat, coordinates.sign() * 4.0, coordinates)
        warn(
            f"design {', '.join(names[:8])} starts at a bound of {site.constraint}, where no gradient moves it: nudged "
            "inside. Start it further from the bound."
        )
    return coordinates


def store_designs(experiment: Experiment, designs: Mapping[str, Tensor]) -> None:
    """Leave the best design where Pyro users look for it: in the parameter store, or in the module that owns it."""
    store = pyro.get_param_store()
    with torch.no_grad():
        for site in experiment.designs:
            if site.leaf is not None:
                # In place, so that a module or an optimiser that holds the leaf sees the new value.
                site.leaf.copy_(site.transform.inv(designs[site.name]))
            if site.in_store and site.name not in store:
                store.setdefault(site.name, designs[site.name].clone(), site.constraint)

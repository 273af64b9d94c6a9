"""Designs: one or a batch of them, side by side for densities, one after the other for estimators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sites import check_designs, flat_values, leading_shape

Found = TypeVar("Found")


def at_each_design(
    experiment: Experiment, designs: Mapping[str, Tensor], compute: Callable[[dict[str, Tensor]], Found]
) -> list[Found]:
    """Return what a function finds at each design of a batch, without gradients, on common random numbers."""
    members = flat_designs(experiment, designs)
    seed = int(torch.randint(2**31 - 1, ()).item())
    found = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for member in range(batch_shape(experiment, designs).numel()):
            with common_stream(seed):
                found.append(compute({name: value[member] for name, value in members.items()}))
    return found


def design_batch_shape(experiment: Experiment, designs: Mapping[str, Tensor]) -> torch.Size:
    """Return the batch shape of designs, `()` for one design; see `sites.check_designs`."""
    return check_designs(experiment.designs, designs)


def batch_shape(experiment: Experiment, designs: Mapping[str, Tensor]) -> torch.Size:
    """Return the batch shape of designs that are known to be right; nothing waits for the device."""
    return leading_shape(experiment.designs, designs)


def flat_designs(experiment: Experiment, designs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every design's values with the batch in one dimension, `(num_members, *shape)`."""
    return flat_values(experiment.designs, designs)


def pack_designs(experiment: Experiment, designs: Mapping[str, Tensor]) -> Tensor:
    """Return what densities see of designs, side by side, `(*design_batch, design_dim)`.

    Values in an interval come as their place `u` in [0, 1] and as the angle `arcsin(2 u - 1)`, which resolves what
    happens near the ends; others in unconstrained coordinates, which would be infinite there.
    """
    batch = batch_shape(experiment, designs)
    packed = []
    for site in experiment.designs:
        value = designs[site.name].expand(batch + site.value.shape)
        ends = site.interval_ends
        if ends is None:
            packed.append(site.transform.inv(value).reshape(*batch, -1))
        else:
            place = ((value - ends[0]) / (ends[1] - ends[0])).expand(value.shape).reshape(*batch, -1)
            packed += [place, torch.asin((2.0 * place - 1.0).clamp(-1.0, 1.0))]
    return torch.cat(packed, dim=-1).to(experiment.dtype)


def unpack_designs(experiment: Experiment, packed: Float[Tensor, "num_members design_dim"]) -> dict[str, Tensor]:
    """Return design values `(num_members, *shape)` from what `pack_designs` made of them."""
    sizes = [
        site.transform.inv(site.value).numel() * (1 if site.interval_ends is None else 2) for site in experiment.designs
    ]
    values = {}
    for site, piece in zip(experiment.designs, packed.split(sizes, -1), strict=True):
        ends = site.interval_ends
        if ends is None:
            shape = site.transform.inv(site.value).shape
            values[site.name] = site.transform(piece.reshape(-1, *shape))
        else:
            place = piece[:, : piece.shape[-1] // 2].reshape(-1, *site.value.shape)
            values[site.name] = ends[0] + (ends[1] - ends[0]) * place
    return values

"""A look at the first simulations: values that are not finite, and elements that hardly vary."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.failures import non_finite_sites
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.sites import Site
from pyro_voed.results import element_names


def check_pilot(experiment: Experiment, pilot: JointSample) -> None:
    """Warn of target and outcome elements that hardly vary in the pilot; raise where a value is not finite."""
    broken = non_finite_sites(experiment, pilot)
    if broken:
        raise ArithmeticError(f"in {pilot.num_samples} simulations before training {broken}")
    for role, members in (("target", experiment.targets), ("outcome", experiment.observations)):
        for site in members:
            constant = _constant_elements(site, pilot.values[site.name].flatten(0, pilot.theta.dim() - 2))
            if constant:
                consequence = "nothing can be learnt about it" if role == "target" else "it tells nothing"
                warn(
                    f"{role} {', '.join(constant[:8])}{' ...' if len(constant) > 8 else ''} is constant or nearly so "
                    f"in {pilot.num_samples} simulations: {consequence}. Leave it out, or check the model and its "
                    "units."
                )


def _constant_elements(site: Site, values: Tensor) -> list[str]:
    flat = values.reshape(values.shape[0], -1)
    if site.fill is not None:
        # What comes and goes is no constant, and what is there may well be one.
        return []
    if site.measured is not None:
        flat = torch.where(site.measured.flatten(), flat, torch.arange(flat.shape[0]).to(flat).unsqueeze(-1))
    spread = flat.to(torch.float64).std(0)
    # Relative to its size, a spread below the resolution of single precision carries no information.
    constant = spread <= 1e-6 * flat.to(torch.float64).abs().mean(0)
    if site.transform is not None and site.packed_dim < site.shape.numel():
        constant &= _free_elements(site, values)
    return [name for name, flag in zip(element_names(site.name, site.shape), constant.tolist(), strict=True) if flag]


def _free_elements(site: Site, values: Tensor) -> Tensor:
    """Return which elements move with the coordinates; those of a triangular matrix above the diagonal do not."""
    assert site.transform is not None
    coordinates = torch.linspace(0.3, 1.0, site.packed_dim, dtype=values.dtype, device=values.device)
    coordinates = coordinates.reshape(site.transform.inverse_shape(site.shape))
    return (site.transform(coordinates) - site.transform(2.0 * coordinates)).abs().flatten() > 1e-5

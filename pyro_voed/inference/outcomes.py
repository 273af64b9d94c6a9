"""The outcome in hand: checked at the door, packed as the simulator packs it, exported along with the draws.

A flow has only ever seen packed outcomes, so an outcome must go through the very packing of the simulations: it is put
into a run of one experiment at the design in question, and that run is packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import as_site_values
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import filled, pack_outcomes
from pyro_voed.experiment.programs import ProgramRun, run_rows
from pyro_voed.experiment.sites import Site
from pyro_voed.experiment.supports import support_of
from pyro_voed.results import element_names


def check_outcome(experiment: Experiment, observations: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the outcome as detached tensors of the model's dtype and device.

    Elements that the model masks as not measured may hold anything, and where failures are outcomes those that failed
    too; every other error of name, shape or value is told.
    """
    given = as_site_values(observations, experiment.observation_labels, "observations")
    return {site.name: _check_site(site, given[site.name].detach(), experiment) for site in experiment.observations}


def _check_site(site: Site, value: Tensor, experiment: Experiment) -> Tensor:
    if value.shape != site.shape:
        raise ValueError(
            f"observations['{site.name}']: expected one experiment's shape {tuple(site.shape)}, got "
            f"{tuple(value.shape)}. For several outcomes call once for each."
        )
    value = value.to(experiment.device) if site.is_discrete else value.to(experiment.device, experiment.dtype)
    measured = _measured(site, value)
    if site.fill is not None:
        measured = measured[torch.isfinite(measured)]  # the rest is looked at where the mask is known
    if bad := int((~torch.isfinite(measured)).sum()):
        raise ValueError(
            f"observations['{site.name}']: {bad} of {measured.numel()} values are not finite. An element that was not "
            "measured must be masked in the model."
        )
    if site.is_discrete and value.dtype.is_floating_point and (measured != measured.round()).any():
        raise ValueError(f"observations['{site.name}']: the site is discrete, but {measured.tolist()[:8]} came.")
    return value


def pack_outcome(
    experiment: Experiment, values: Mapping[str, Tensor], designs: Mapping[str, Tensor]
) -> Float[Tensor, " y_dim"]:
    """Return the packed outcome of one experiment.

    The model is run only for outcome sites whose packed coordinates are not their values: bijections and masks may
    depend on the design. So an outcome of an expensive simulator costs no further simulation.
    """
    transformed = [site.name for site in experiment.observations if site.transform is not None]
    masked = [site for site in experiment.observations if site.fill is not None and not site.is_deterministic]
    if not transformed and not masked:
        plain = [_packed_as_it_is(site, values[site.name]) for site in experiment.observations]
        return torch.cat([piece.to(experiment.dtype) for piece in plain])
    with torch.no_grad(), pyro.validation_enabled(False):
        rows = {name: values[name].unsqueeze(0) for name in transformed}
        run = run_rows(experiment.program, 1, experiment.shapes, designs=designs, row_values=rows)
        check_supports(experiment, run, values)
        # Deterministic, discrete and masked sites hold what this run happened to compute or draw.
        for site in experiment.observations:
            if site.transform is None:
                run.traces[0].nodes[site.name]["value"] = values[site.name]
        for site in masked if experiment.failures == "error" else ():
            _check_measured(site, values[site.name], run)
        packed, _ = pack_outcomes(experiment, run)
    return packed[0]


def _packed_as_it_is(site: Site, value: Tensor) -> Tensor:
    return _measured(site, value) if site.fill is None else filled(site, value.unsqueeze(0), None)[0]


def _check_measured(site: Site, value: Tensor, run: ProgramRun) -> None:
    measured = run.measured(site.name)
    there = value if measured is None else value[measured[0]]
    if bad := int((~torch.isfinite(there)).sum()):
        raise ValueError(
            f"observations['{site.name}']: {bad} of {there.numel()} values measured at this design are not finite. An "
            "element that was not measured must be masked in the model."
        )


def check_supports(experiment: Experiment, run: ProgramRun, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError where an outcome lies outside its site's support, for the supports that no latent moves."""
    for site in experiment.observations:
        if site.transform is None:
            continue
        node = run.traces[0].nodes[site.name]
        support = support_of(node["fn"])
        if not support.check(values[site.name].reshape(node["value"].shape)).all():
            raise ValueError(f"observations['{site.name}'] lies outside the site's support {support}.")


def like_simulated(experiment: Experiment, run: ProgramRun, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outcome in the dtype of a run at its design, simulated values standing where nothing was measured."""
    check_supports(experiment, run, values)
    conditioned = {}
    for site in experiment.observations:
        simulated = run.value(site.name)[0]
        value = values[site.name].to(simulated)
        # A NaN there would pass the mask of the log density but not that of its gradient.
        measured = run.measured(site.name)
        conditioned[site.name] = value if measured is None else torch.where(measured[0], value, simulated)
    return conditioned


def packed_names(experiment: Experiment) -> list[str]:
    """Return a name for every packed outcome coordinate: the element's, or the site's where elements are mixed."""
    names = []
    for site in experiment.observations:
        elements = element_names(site.name, site.shape)
        if site.measured is not None:
            elements = [name for name, seen in zip(elements, site.measured.flatten().tolist(), strict=True) if seen]
        if site.fill is not None:
            elements = [*elements, *(f"whether {name} is there" for name in elements)]
        # A simplex of three has two coordinates, neither of which belongs to one element.
        names += elements if len(elements) == site.packed_dim else [site.name] * site.packed_dim
    return names


def to_inference_data(
    values: Mapping[str, Tensor], observations: Mapping[str, Tensor], diverging: Tensor | None = None
) -> Any:
    """Return draws `(num_chains, num_draws, *shape)` and outcome as an ArviZ `InferenceData`.

    `az.from_pyro` is not used, for three reasons: it reads one MCMC object and so knows no deterministic targets and
    shows the sampler's own coordinates; it runs the model again at the store's designs; and there is none for a flow.
    Made here, the posterior of every method has the same variables and dimensions.
    """
    import arviz  # here, because it takes seconds that not every user of the library should pay

    return arviz.from_dict(
        posterior={name: draws.detach().cpu().numpy() for name, draws in values.items()},
        observed_data={name: value.detach().cpu().numpy() for name, value in observations.items()},
        sample_stats=None if diverging is None else {"diverging": diverging.cpu().numpy()},
    )


def _measured(site: Site, value: Tensor) -> Tensor:
    return value.flatten() if site.measured is None else value[site.measured]

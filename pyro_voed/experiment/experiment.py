"""An experiment: a Pyro program that was read, probed and checked once.

By default the outcomes are the sites given with `obs=` (their data are released), the targets all other latent sites,
unless the outcome is deterministic, where all of them together would make the information infinite.

Continuous sites are packed into vectors of unconstrained coordinates, `theta` for targets and `y` for outcomes, so that
densities live on a plain Euclidean space; Jacobians cancel in every difference of log densities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import pyro
import torch
from torch import Tensor

from pyro_voed.checks import Labels, as_labels, check_callable, check_picklable
from pyro_voed.experiment.caller_state import common_stream, isolated
from pyro_voed.experiment.elsewhere import facts_at
from pyro_voed.experiment.programs import Program
from pyro_voed.experiment.reading import read
from pyro_voed.experiment.sites import DesignSite, Failures, Site, flat_values, given_designs
from pyro_voed.experiment.vectorisation import lay_out_designs


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Experiment:
    """A model of one experiment, what its sites are, and how it is run; accepted wherever a model is.

    Args:
        model: A Pyro program of one experiment.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about; default: all other latent sites. Required for deterministic outcomes.
        design_labels: Design sites; default: the explicit `pyro.param` / `PyroParam` sites. Required where weights
            of a network are traced too.
        model_args, model_kwargs: Arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior, such as the posterior of earlier
            experiments. Called with the model's arguments.
        prior_entropy: Differential entropy of the targets in nats, in their own coordinates, for targets whose density
            the model does not state (deterministic ones, or ones drawn given a nuisance site, whose density is else
            an average over draws of it). Without effect where the model states it.
        vectorize: Run experiments together in an outer plate. The result is checked draw by draw against single
            runs; False runs them one by one, which works for any model.
        failures: What a run is whose outcome is NaN or infinite where it is measured. "error": a mistake, and the call
            ends with an error. "outcome": an outcome like others, from which one learns; densities get flags beside the
            values. "ignore": nothing, so what is reported is the information of the valid runs times their share. The
            share of runs that failed is part of the result.
        seed: Seed of the probe runs; None draws one from the global generator.

    Attributes:
        others: Nuisance, auxiliary and history sites.
        leaking_nuisance: For each target whose distribution depends on nuisance sites: one of the nuisance sites.
        joined_targets: Whether, where targets are drawn given nuisance sites, they also hang on other targets' values.
        nuisance_follows_targets: Whether a nuisance site's distribution depends on a target.
        prior_follows_design: Whether the targets' prior may depend on a design, by nuisance sites that it is given.
        linked_outcomes: Whether an outcome site's distribution depends on another outcome's value.
        redrawable: Whether outcomes can be drawn anew given all else without running the model again: they are a
            forward map plus explicit noise.
        surveyed_at: Designs at which something was found to be other than as first read; None where nothing was.
        unchecked: Sites without density or determinism, whose vectorisation could not be checked.

    Raises:
        ValueError: If labels are unknown or overlap; if the model holds what makes the information undefined
            (factors, scales, subsampling plates, masks off the outcome, improper priors); if vectorised and single
            runs disagree.
        NotImplementedError: If a target's support has no bijection, or depends on a nuisance site.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> print(Experiment(linear_gaussian(), "y"))
        designs:  xi (3, 2) in Real()
        targets:  theta (2,)
        outcomes: y (3,)
        nuisance: none
        run:      together in one outer plate
    """

    model: Callable[..., Any]
    model_args: tuple[Any, ...]
    model_kwargs: Mapping[str, Any]
    prior: Callable[..., Any] | None
    prior_entropy: float | None
    failures: Failures
    program: Program
    targets: tuple[Site, ...]
    observations: tuple[Site, ...]
    others: tuple[Site, ...]
    designs: tuple[DesignSite, ...]
    leaking_nuisance: Mapping[str, str]
    joined_targets: bool
    nuisance_follows_targets: bool
    design_dependent_targets: tuple[str, ...]
    prior_follows_design: bool
    linked_outcomes: bool
    redrawable: bool
    unchecked: tuple[str, ...]
    surveyed_at: Mapping[str, Tensor] | None
    bytes_per_row: int
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self,
        model: Callable[..., Any],
        observation_labels: Labels = None,
        target_labels: Labels = None,
        *,
        design_labels: Labels = None,
        model_args: Sequence[Any] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        prior: Callable[..., Any] | None = None,
        prior_entropy: float | None = None,
        vectorize: bool = True,
        failures: str = "error",
        seed: int | None = None,
    ) -> None:
        check_callable(model)
        if prior is not None:
            check_callable(prior, "prior")
        if prior_entropy is not None and not math.isfinite(prior_entropy):
            raise ValueError(f"prior_entropy: expected a finite number of nats, got {prior_entropy!r}.")
        if failures not in get_args(Failures):
            raise ValueError(f"failures: expected one of {list(get_args(Failures))}, got {failures!r}.")
        if failures == "ignore" and prior_entropy is not None:
            raise ValueError(
                'prior_entropy: with failures="ignore" the targets are those of the valid runs, which have another '
                "entropy than all have. Leave it out."
            )
        observations = as_labels(observation_labels, "observation_labels")
        targets = as_labels(target_labels, "target_labels")
        designs = as_labels(design_labels, "design_labels")
        call = partial(model, *model_args, **(model_kwargs or {}))
        own_prior = None if prior is None else partial(prior, *model_args, **(model_kwargs or {}))
        with isolated(seed):
            found = read(
                call,
                observations,
                targets,
                designs,
                own_prior,
                vectorize=vectorize,
                failures=cast("Failures", failures),
            )
        found |= {"model": model, "model_args": tuple(model_args), "model_kwargs": dict(model_kwargs or {})}
        vars(self).update(found, prior=prior, prior_entropy=prior_entropy, failures=failures)

    def __getstate__(self) -> dict[str, Any]:
        for name in ("model", "prior", "model_args", "model_kwargs"):
            check_picklable(getattr(self, name), name)
        return dict(vars(self))

    def __copy__(self) -> Experiment:
        # As without `__getstate__`: what is copied need not be fit for pickling.
        return self._with()

    def __deepcopy__(self, memo: dict[int, Any]) -> Experiment:
        memo[id(self)] = other = self._with()
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __repr__(self) -> str:
        name = getattr(self.model, "__qualname__", type(self.model).__name__)
        return f"Experiment({name}, {list(self.observation_labels)}, {list(self.target_labels)})"

    def __str__(self) -> str:
        designs = ", ".join(f"{site.name} {tuple(site.value.shape)} in {site.constraint}" for site in self.designs)
        lines = [f"designs:  {designs or 'none'}"]
        for title, sites in (("targets", self.targets), ("outcomes", self.observations), ("nuisance", self.nuisance)):
            lines.append(f"{title + ':':<10}" + (", ".join(map(str, sites)) or "none"))
        lines.append("run:      " + ("together in one outer plate" if self.runs_together else "one by one"))
        if self.failures != "error":
            means = {"outcome": "are outcomes like others", "ignore": "are left out"}
            lines.append(f"failures: runs whose outcome is not finite {means[self.failures]}")
        if self.unchecked:
            lines.append(f"vectorisation could not be checked at {list(self.unchecked)}, which state no density")
        return "\n".join(lines)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Single-experiment shape of every site."""
        return {site.name: site.shape for site in (*self.targets, *self.observations, *self.others)}

    @property
    def target_labels(self) -> tuple[str, ...]:
        """Names of the targets."""
        return tuple(site.name for site in self.targets)

    @property
    def observation_labels(self) -> tuple[str, ...]:
        """Names of the outcome sites."""
        return tuple(site.name for site in self.observations)

    @property
    def nuisance(self) -> tuple[Site, ...]:
        """Random sites that are neither target nor outcome."""
        return tuple(site for site in self.others if site.role == "nuisance")

    @property
    def design_labels(self) -> tuple[str, ...]:
        """Names of the designs."""
        return tuple(site.name for site in self.designs)

    @property
    def design_values(self) -> dict[str, Tensor]:
        """Design values, from the store or the model."""
        return {site.name: site.value for site in self.designs}

    @property
    def theta_dim(self) -> int:
        """Number of packed target coordinates."""
        return sum(site.packed_dim for site in self.targets)

    @property
    def y_dim(self) -> int:
        """Number of packed outcome coordinates."""
        return sum(site.packed_dim for site in self.observations)

    @property
    def runs_together(self) -> bool:
        """Whether experiments are run together, so that simulations are cheap."""
        return self.program.vectorised

    @property
    def takes_design_rows(self) -> bool:
        """Whether every experiment of a run can have a design of its own."""
        # Where the targets' density is an average over rows, these must have one prior.
        apart = self.averages_prior and self.prior_follows_design
        return self.program.design_singletons is not None and not apart

    @property
    def is_explicit(self) -> bool:
        """Whether every outcome site has a density."""
        return all(site.has_density for site in self.observations)

    @property
    def has_log_prior(self) -> bool:
        """Whether the model states the density of the targets."""
        # A guide's auxiliary sites carry the density of all latents together, not of some of them.
        shared = bool(self.nuisance) and self.has_auxiliary_density
        # Targets of the runs that did not fail are distributed otherwise than all are.
        stated = all(site.has_density for site in self.targets) and self.failures != "ignore"
        return stated and not self.leaking_nuisance and not shared

    @property
    def averages_prior(self) -> bool:
        """Whether the density of the targets is an average over nuisance sites that they are drawn given."""
        stated = all(site.has_density for site in self.targets) and not self.has_auxiliary_density
        return bool(self.leaking_nuisance) and stated and self.prior_entropy is None and self.failures != "ignore"

    @property
    def has_auxiliary_density(self) -> bool:
        """Whether auxiliary sites of a replaced prior carry density."""
        return any(site.role == "auxiliary" and site.has_density for site in self.others)

    @property
    def num_calls(self) -> int:
        """Number of experiments simulated so far."""
        return self.program.meter.num_calls

    def at_stored_designs(self) -> Experiment:
        """Return the experiment at the designs that the parameter store, or the module that owns them, holds now."""
        store = pyro.get_param_store()
        sites = []
        for site in self.designs:
            if site.in_store and site.name in store:
                # By its name: what a PyroParam reads from the store is not the value that the store holds.
                value = store[site.name]
                site = replace(site, value=value.detach().clone(), leaf=store._params[site.name])
            elif site.leaf is not None and not site.in_store:
                site = replace(site, value=site.transform(site.leaf.detach()).clone())
            sites.append(site)
        return self._with(designs=tuple(sites))

    def at_designs(self, designs: Mapping[str, Tensor]) -> Experiment:
        """Return the experiment at other values of its designs."""
        own = (replace(site, value=designs[site.name]) for site in self.designs)
        return self._with(designs=tuple(own))

    def laid_out(self, designs: Mapping[str, Tensor]) -> Experiment:
        """Return the experiment ready to be run at many designs at once, as these are, where its program allows it."""
        if not designs or self.program.design_singletons is not None:
            return self
        return self._with(program=lay_out_designs(self.program, self.shapes, self.designs, designs))

    def surveyed(self, designs: Mapping[str, Tensor], *, certain: bool = True) -> Experiment:
        """Return the experiment as it is at designs `(num_designs, *shape)`, where it may be other (`elsewhere`)."""
        with common_stream(0):
            found = facts_at(self, designs, certain=certain)
        return self._with(**found, surveyed_at=designs) if found else self

    def in_layout(self, design_singletons: Mapping[str, int] | None, fills: Mapping[str, Tensor]) -> Experiment:
        """Return the experiment in a layout of designs and outcomes found before (`Program.design_singletons`)."""
        own = (replace(s, fill=fills[s.name]) if s.name in fills else s for s in self.observations)
        return self._with(program=replace(self.program, design_singletons=design_singletons), observations=tuple(own))

    def run_by(self, other: Experiment) -> Experiment:
        """Return the experiment run by the program of another reading of its model, at the designs of that."""
        return self._with(program=other.program, observations=other.observations, designs=other.designs)

    def _with(self, **changes: Any) -> Experiment:
        other = object.__new__(type(self))
        vars(other).update(vars(self) | changes)
        return other


def as_experiment(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    designs: Mapping[str, Any] | None = None,
    *,
    vectorize: bool = True,
) -> tuple[Experiment, dict[str, Tensor]]:
    """Return the experiment of a model, ready for candidate designs, and these as tensors; inside `isolated`.

    An `Experiment` has its own labels and way to run, and is taken at the designs that the parameter store holds now.
    Designs `(*design_batch, *shape)` that are left out are at their stored values.
    """
    # Drawn in both cases, so that a model and its experiment are answered with equal numbers.
    seed = int(torch.randint(2**31 - 1, ()).item())
    if isinstance(model, Experiment):
        experiment = model.at_stored_designs()
        for argument, given, own in (
            ("observation_labels", as_labels(observation_labels, "observation_labels"), model.observation_labels),
            ("target_labels", as_labels(target_labels, "target_labels"), model.target_labels),
        ):
            if given is not None and given != own:
                raise ValueError(
                    f"{argument}: the experiment was read with {list(own)}, got {list(given)}. Leave the labels out, "
                    "or make another Experiment of the model."
                )
    else:
        experiment = Experiment(model, observation_labels, target_labels, vectorize=vectorize, seed=seed)
    candidates = given_designs(experiment.designs, designs)
    experiment = experiment.laid_out(candidates)
    values = {**experiment.design_values, **candidates}
    if experiment.designs and (candidates or _moved_since(model, experiment)):
        experiment = experiment.surveyed(flat_values(experiment.designs, values))
    return experiment, values


def _moved_since(model: Any, experiment: Experiment) -> bool:
    """Whether the parameter store holds other designs than when the model was read."""
    before = model.design_values if isinstance(model, Experiment) else experiment.design_values
    return any(not torch.equal(value, before[name]) for name, value in experiment.design_values.items())

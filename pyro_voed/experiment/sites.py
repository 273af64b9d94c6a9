"""What a model's sites are: targets, outcomes, nuisance and designs, with their shapes and supports.

Continuous sites are packed into vectors of unconstrained coordinates, `theta` for targets and `y` for outcomes, so
that densities live on a plain Euclidean space; Jacobians cancel in every difference of log densities. `Experiment` is made
by `resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform

from pyro_voed.experiment.programs import (
    Program,
    base_distribution,
    has_discrete_support,
    is_deterministic,
    support_transform,
)

Role = Literal["target", "observation", "nuisance", "auxiliary", "history"]


@dataclass(frozen=True)
class Site:
    """A random or deterministic site of one experiment.

    Attributes:
        name: Its name in the model.
        role: What it is to the experiment.
        shape: Shape of its value in one experiment.
        is_deterministic: Made with `pyro.deterministic`.
        is_discrete: Its values are discrete.
        has_density: Its distribution has a `log_prob`.
        has_rsample: Its draws carry gradients.
        transform: Bijection from unconstrained coordinates to its support; None where its packed coordinates are its
            values (deterministic and discrete sites, outcomes whose support depends on latents).
        dependent_support: Its support depends on other latents, so the bijection is rebuilt for every draw.
        packed_dim: Number of its packed coordinates.
        dtype: Type of its values.
        support_values: Values that each element of a discrete site can take, where they are finitely many.
        measured: For a masked outcome, which elements are measured, of the site's shape.
    """

    name: str
    role: Role
    shape: torch.Size
    is_deterministic: bool
    is_discrete: bool
    has_density: bool
    has_rsample: bool
    transform: Transform | None
    dependent_support: bool
    packed_dim: int
    dtype: torch.dtype
    support_values: Tensor | None = None
    measured: Tensor | None = None


@dataclass(frozen=True)
class DesignSite:
    """A design: a `pyro.param` site that the experimenter sets.

    Attributes:
        name: Its name in the model and the parameter store.
        value: Stored value, else the model's initial one, detached.
        constraint: Its constraint.
        leaf: The unconstrained tensor that holds it in the store or module, if there is one.
        in_store: Whether the parameter store holds such designs (not so under `module_local_params`).
    """

    name: str
    value: Tensor
    constraint: constraints.Constraint
    leaf: Tensor | None
    in_store: bool

    @property
    def transform(self) -> Transform:
        """Map from unconstrained coordinates to the constraint."""
        return transform_to(self.constraint)

    @cached_property
    def interval_ends(self) -> tuple[Tensor, Tensor] | None:
        """Ends of the interval that the values lie in, None where the constraint is another."""
        constraint: Any = self.constraint
        while hasattr(constraint, "base_constraint"):
            constraint = constraint.base_constraint
        if not (hasattr(constraint, "lower_bound") and hasattr(constraint, "upper_bound")):
            return None
        lower, upper = (torch.as_tensor(end).to(self.value) for end in (constraint.lower_bound, constraint.upper_bound))
        return (lower, upper) if bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()) else None


@dataclass(frozen=True)
class Experiment:
    """A resolved experiment: the released program and what its sites are.

    Attributes:
        program: The released program, and how it is run for many experiments at once.
        targets: Sites the information is about, in the order of the model.
        observations: Sites that are observed.
        others: Nuisance, auxiliary and history sites.
        designs: Design sites.
        leaking_nuisance: For each target whose distribution depends on nuisance sites: one of the nuisance sites.
        design_dependent_targets: Targets whose distribution depends on a design.
        linked_outcomes: Whether an outcome site's distribution depends on another outcome's value.
        redrawable: Whether outcomes can be drawn anew given all else without running the model again: they are a
            forward map plus explicit noise.
        unchecked: Sites without density or determinism, whose vectorisation could not be checked.
        bytes_per_row: Memory of all site values of one experiment.
        dtype: Floating type of the packed vectors.
        device: Device of the model's tensors.
    """

    program: Program
    targets: tuple[Site, ...]
    observations: tuple[Site, ...]
    others: tuple[Site, ...]
    designs: tuple[DesignSite, ...]
    leaking_nuisance: Mapping[str, str]
    design_dependent_targets: tuple[str, ...]
    linked_outcomes: bool
    redrawable: bool
    unchecked: tuple[str, ...]
    bytes_per_row: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        def shown(site: Site) -> str:
            kind = ", ".join(
                word
                for word, holds in (
                    ("discrete", site.is_discrete),
                    ("deterministic", site.is_deterministic),
                    ("without density", not site.has_density and not site.is_deterministic),
                    ("partly measured", site.measured is not None),
                )
                if holds
            )
            return f"{site.name} {tuple(site.shape)}" + (f" ({kind})" if kind else "")

        designs = ", ".join(f"{site.name} {tuple(site.value.shape)} in {site.constraint}" for site in self.designs)
        lines = [f"designs:  {designs or 'none'}"]
        for title, experiment in (
            ("targets", self.targets),
            ("outcomes", self.observations),
            ("nuisance", self.nuisance),
        ):
            lines.append(f"{title + ':':<10}" + (", ".join(map(shown, experiment)) or "none"))
        lines.append("run:      " + ("together in one outer plate" if self.program.vectorised else "one by one"))
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
        """Design values resolved from the store or the model."""
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
    def is_explicit(self) -> bool:
        """Whether every outcome site has a density."""
        return all(site.has_density for site in self.observations)

    @property
    def has_log_prior(self) -> bool:
        """Whether the model states the density of the targets."""
        # A guide's auxiliary sites carry the density of all latents together, not of some of them.
        shared = bool(self.nuisance) and self.has_auxiliary_density
        return all(site.has_density for site in self.targets) and not self.leaking_nuisance and not shared

    @property
    def has_auxiliary_density(self) -> bool:
        """Whether auxiliary sites of a replaced prior carry density."""
        return any(site.role == "auxiliary" and site.has_density for site in self.others)


def site_transform(
    name: str, role: Role, node: Mapping[str, Any], own_node: Mapping[str, Any] | None
) -> Transform | None:
    """Return the bijection onto a continuous sample site's support, None where its values are packed as they are.

    Raises:
        ValueError: If a target is degenerate.
        NotImplementedError: If a target's support has no registered bijection.
    """
    base = base_distribution(node["fn"])
    if isinstance(base, dist.Delta) and not is_deterministic(node) and own_node is not None:
        # Guides hand on their draws as Delta sites; the support is the model's.
        node, base = own_node, base_distribution(own_node["fn"])
    if is_deterministic(node) or has_discrete_support(base):
        return None
    if isinstance(base, dist.Delta):
        if role == "target":
            raise ValueError(
                f"target '{name}' is a Delta site: it has no density to learn. Leave it out of the targets."
            )
        return None
    try:
        return support_transform(node["fn"])
    except NotImplementedError as error:
        if role != "target":
            return None
        raise NotImplementedError(
            f"target '{name}': no bijection is known onto its support {base.support}. Reparametrise the site, for "
            "example by a site on the real line and a pyro.deterministic function of it."
        ) from error


def check_designs(sites: tuple[DesignSite, ...], designs: Mapping[str, Tensor]) -> torch.Size:
    """Return the batch shape of designs, `()` for one design.

    Raises:
        ValueError: If a label is unknown, a shape does not end in the design's own, batch shapes differ, or a value
            violates the constraint.
    """
    own = {site.name: site for site in sites}
    unknown = sorted(set(designs) - set(own))
    if unknown:
        raise ValueError(f"designs: the model has no design called {unknown}. It has {list(own)}.")
    batches = {}
    for name, value in designs.items():
        shape = own[name].value.shape
        leading = value.dim() - len(shape)
        if leading < 0 or value.shape[leading:] != shape:
            expected = ", ".join(["*batch", *map(str, shape)])
            raise ValueError(f"designs['{name}']: expected shape ({expected}), got {tuple(value.shape)}.")
        batches[name] = value.shape[:leading]
        if not own[name].constraint.check(value.detach()).all():
            raise ValueError(f"designs['{name}'] violates its constraint {own[name].constraint}. Stay inside it.")
    shapes = set(batches.values()) - {torch.Size()}
    if len(shapes) > 1:
        raise ValueError(f"designs: expected one batch shape for all labels, got {dict(batches)}.")
    return shapes.pop() if shapes else torch.Size()


def given_designs(sites: tuple[DesignSite, ...], designs: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return the designs a user gave as tensors of the designs' own type, detached and checked."""
    own = {site.name: site.value for site in sites}
    given = {name: torch.as_tensor(value).detach() for name, value in (designs or {}).items()}
    given = {name: value.to(own[name]) if name in own else value for name, value in given.items()}
    check_designs(sites, given)
    return given

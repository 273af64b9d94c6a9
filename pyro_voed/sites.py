"""What a model's sites are: targets, outcomes, nuisance and designs, with their shapes and supports.

Continuous sites are packed into vectors of unconstrained coordinates, `theta` for targets and `y` for outcomes, so
that densities live on a plain Euclidean space; Jacobians cancel in every difference of log densities. `Sites` is made
by `resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform

from pyro_voed.programs import Program, base_distribution, is_deterministic, support_transform

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


@dataclass(frozen=True)
class Sites:
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
    unchecked: tuple[str, ...]
    bytes_per_row: int
    dtype: torch.dtype
    device: torch.device

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
        return all(site.has_density for site in self.targets) and not self.leaking_nuisance


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
    if is_deterministic(node) or base.support.is_discrete:
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

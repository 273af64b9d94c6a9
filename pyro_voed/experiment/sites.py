"""What a model's sites are: targets, outcomes, nuisance and designs, with their shapes and supports."""

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

    def __str__(self) -> str:
        traits = {
            "discrete": self.is_discrete,
            "deterministic": self.is_deterministic,
            "without density": not self.has_density and not self.is_deterministic,
            "partly measured": self.measured is not None,
        }
        kind = ", ".join(word for word, holds in traits.items() if holds)
        return f"{self.name} {tuple(self.shape)}" + (f" ({kind})" if kind else "")


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

"""What a model's sites are: targets, outcomes, nuisance and designs, with their shapes and supports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform

from pyro_voed.checks import check_known
from pyro_voed.experiment.programs import base_distribution, has_discrete_support, is_deterministic, support_transform
from pyro_voed.printing import shortened

Role = Literal["target", "observation", "nuisance", "auxiliary", "history"]

Failures = Literal["error", "outcome", "ignore"]
"""What a run is whose outcome is not finite: a mistake in the model, an outcome like others, or nothing at all."""


@dataclass(frozen=True)
class Site:
    """A random or deterministic site of one experiment.

    Attributes:
        role: What it is to the experiment.
        shape: Shape of its value in one experiment.
        is_deterministic: Made with `pyro.deterministic`.
        transform: Bijection from unconstrained coordinates to its support; None where its packed coordinates are its
            values (deterministic and discrete sites, outcomes whose support depends on latents).
        dependent_support: Its support depends on other latents, so the bijection is rebuilt for every draw.
        support: Its support in words, without the numbers where these move with other sites or designs.
        support_values: Values that each element of a discrete site can take, where they are finitely many.
        measured: For a masked outcome, which elements are measured, of the site's shape.
        fill: For an outcome whose elements are there in some runs or at some designs alone: what stands for those that
            are not, of the site's shape. Its packed coordinates are its values, then a flag for each, 1 where there.
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
    support: str
    support_values: Tensor | None = None
    measured: Tensor | None = None
    fill: Tensor | None = None

    def __str__(self) -> str:
        traits = {
            "discrete": self.is_discrete,
            "deterministic": self.is_deterministic,
            "without density": not self.has_density and not self.is_deterministic,
            "partly measured": self.measured is not None or self.fill is not None,
        }
        kind = ", ".join(word for word, holds in traits.items() if holds)
        return f"{self.name} {tuple(self.shape)}" + (f" ({kind})" if kind else "")


@dataclass(frozen=True)
class DesignSite:
    """A design: a `pyro.param` site that the experimenter sets.

    `value` is the stored value, else the model's initial one; `leaf` the unconstrained tensor that holds it in the
    store or a module, if any; `in_store` whether the store holds such designs (not so under `module_local_params`).
    """

    name: str
    value: Tensor
    constraint: constraints.Constraint
    leaf: Tensor | None
    in_store: bool

    def __getstate__(self) -> dict[str, Any]:
        # A module's parameter goes with the module. Another process has a store of its own, and reads its leaf anew.
        kept = self.leaf if isinstance(self.leaf, torch.nn.Parameter) else None
        return {**vars(self), "leaf": kept}

    @property
    def support(self) -> str:
        """The constraint in words."""
        return in_words(self.constraint)

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


def in_words(constraint: constraints.Constraint) -> str:
    """Return a constraint as text that is the same on every device."""
    return " ".join(re.sub(r", device='[^']*'", "", str(constraint)).split())


def site_transform(
    name: str, role: Role, node: Mapping[str, Any], own_node: Mapping[str, Any] | None
) -> Transform | None:
    """Return the bijection onto a continuous sample site's support, None where its values are packed as they are."""
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
    """Return the batch shape of designs, `()` for one design; raise ValueError where they do not fit."""
    own = {site.name: site for site in sites}
    check_known(designs, own, "designs", "design")
    batches = {}
    for name, value in designs.items():
        shape = own[name].value.shape
        leading = value.dim() - len(shape)
        if leading < 0 or value.shape[leading:] != shape:
            raise ValueError(f"designs['{name}']: expected shape {_shape_of(own[name])}, got {tuple(value.shape)}.")
        batches[name] = value.shape[:leading]
        _check_values(own[name], value.detach())
    shapes = set(batches.values()) - {torch.Size()}
    if len(shapes) > 1:
        got = {name: tuple(batch) for name, batch in batches.items()}
        raise ValueError(
            f"designs: expected one batch shape for all labels, got {got}. Give each label as many values as the "
            "others, or one for all."
        )
    return shapes.pop() if shapes else torch.Size()


def leading_shape(sites: tuple[DesignSite, ...], designs: Mapping[str, Tensor]) -> torch.Size:
    """Return the batch shape of designs that are known to be right."""
    given = [(designs[site.name].shape, site.value.dim()) for site in sites if site.name in designs]
    leading = (shape[: len(shape) - own] for shape, own in given)
    return next((shape for shape in leading if shape), torch.Size())


def flat_values(sites: tuple[DesignSite, ...], designs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every design's values with the batch in one dimension, `(num_members, *shape)`."""
    batch = leading_shape(sites, designs)
    return {
        site.name: designs[site.name].expand(batch + site.value.shape).reshape(-1, *site.value.shape) for site in sites
    }


def _check_values(site: DesignSite, value: Tensor) -> None:
    broken = ~torch.isfinite(value)
    if broken.any():
        raise ValueError(
            f"designs['{site.name}']: expected finite numbers, got {value[broken][0].item()} in {int(broken.sum())} of "
            f"{value.numel()} places. Look where the values are computed."
        )
    outside = ~site.constraint.check(value)
    if outside.any():
        raise ValueError(
            f"designs['{site.name}'] violates its constraint {site.constraint} in {int(outside.sum())} of "
            f"{outside.numel()} places: {shortened(value[outside][0])}. Stay inside it, or widen it in the model."
        )


def _shape_of(site: DesignSite) -> str:
    return f"({', '.join(['*batch', *map(str, site.value.shape)])})"


def given_designs(sites: tuple[DesignSite, ...], designs: Any) -> dict[str, Tensor]:
    """Return the designs a user gave as tensors of the designs' own type, detached and checked."""
    own = {site.name: site for site in sites}
    designs = {} if designs is None else designs
    if not isinstance(designs, Mapping):
        shown = f"a Tensor of shape {tuple(designs.shape)}" if isinstance(designs, Tensor) else repr(designs)
        raise TypeError(
            f"designs: expected a dict from labels to values, such as {dict.fromkeys(own, 'values')}, got {shown}."
        )
    check_known(designs, own, "designs", "design")
    given = {}
    for name, value in designs.items():
        try:
            given[name] = torch.as_tensor(value).detach().to(own[name].value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"designs['{name}']: expected numbers of shape {_shape_of(own[name])}, got {value!r}. Leave a design "
                "out to have it at its stored value."
            ) from error
    check_designs(sites, given)
    return given

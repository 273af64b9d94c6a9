"""What each site of a model is: its support and bijection, its density, and the size it is packed into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro import distributions as dist
from torch import Tensor

from pyro_voed.experiment.dependence import Dependence
from pyro_voed.experiment.programs import base_distribution, has_discrete_support, is_deterministic
from pyro_voed.experiment.sites import Role, Site, in_words, site_transform
from pyro_voed.experiment.supports import support_of


def describe(
    name: str,
    role: Role,
    node: Mapping[str, Any],
    own_node: Mapping[str, Any] | None,
    measured: Tensor | None,
    dependence: Dependence,
) -> Site:
    """Return what a site is; `own_node` is what a run of the model with its own prior recorded of it."""
    fn, value = node["fn"], node["value"]
    deterministic = is_deterministic(node)
    transform = site_transform(name, role, node, own_node) if role in ("target", "observation") else None
    dependent = transform is not None and own_node is node and dependence.support_moves(name)
    if dependent and role == "observation":
        # Bounds that move with the latents would carry them into the packed outcome; its raw values do not.
        transform, dependent = None, False
    try:
        fn.log_prob(value)
        has_density = not deterministic
    except NotImplementedError:
        has_density = False
    discrete = not value.dtype.is_floating_point or (not deterministic and has_discrete_support(fn))
    dim = value.numel() if transform is None else transform.inv(value).numel()
    if measured is not None:
        transform, dim = None, int(measured.sum())
    return Site(
        name=name,
        role=role,
        shape=value.shape,
        is_deterministic=deterministic,
        is_discrete=discrete,
        has_density=has_density,
        has_rsample=deterministic or bool(getattr(fn, "has_rsample", False)),
        transform=transform,
        dependent_support=dependent,
        packed_dim=dim,
        dtype=value.dtype,
        support=_support(node, own_node, discrete=discrete, moves=dependence.moves_support(name)),
        support_values=_support_values(fn) if discrete else None,
        measured=measured,
    )


def _support(node: Mapping[str, Any], own_node: Mapping[str, Any] | None, *, discrete: bool, moves: bool) -> str:
    if is_deterministic(node):
        return "what it is computed from"
    base = base_distribution(node["fn"])
    if isinstance(base, dist.Delta) and own_node is not None:
        # Guides hand on their draws as Delta sites; the support is the model's.
        base = base_distribution(own_node["fn"])
    try:
        support = support_of(base)
    except (NotImplementedError, AttributeError):
        return "a support that is not stated"
    kind = type(support).__name__.removeprefix("_")
    # The values of a discrete site stand beside, where they are finitely many.
    return kind if discrete else f"{kind} that moves" if moves else in_words(support)


def _support_values(fn: Any) -> Tensor | None:
    base = base_distribution(fn)
    if not getattr(base, "has_enumerate_support", False) or base.event_shape:
        return None
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError:  # sizes that differ between elements
        return None
    return values.flatten() if values.numel() == values.shape[0] else None

"""What each site of a model is: its support and bijection, its density, and the size it is packed into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_voed.experiment.dependence import Dependence
from pyro_voed.experiment.programs import ProgramRun, base_distribution, has_discrete_support, is_deterministic
from pyro_voed.experiment.sites import Role, Site, in_words, site_transform
from pyro_voed.experiment.supports import support_of


def describe(
    name: str,
    role: Role,
    node: Mapping[str, Any],
    own_node: Mapping[str, Any] | None,
    measured: Tensor | None,
    dependence: Dependence,
    *,
    fails: bool,
) -> Site:
    """Return what a site is; `own_node` is what a run of the model with its own prior recorded of it.

    `fails` says of an outcome that values which are not finite are part of it.
    """
    fn, value = node["fn"], node["value"]
    deterministic = is_deterministic(node)
    transform = site_transform(name, role, node, own_node) if role in ("target", "observation") else None
    dependent = transform is not None and own_node is node and dependence.support_moves(name)
    if dependent and role == "observation":
        # Bounds that move with the latents would carry them into the packed outcome; its raw values do not.
        transform, dependent = None, False
    try:
        fn.log_prob(value)
        has_density = not deterministic and not _adds_mass_to_density(fn)
    except NotImplementedError:
        has_density = False
    discrete = not value.dtype.is_floating_point or (not deterministic and has_discrete_support(fn))
    dim = value.numel() if transform is None else transform.inv(value).numel()
    if measured is not None:
        transform, dim = None, int(measured.sum())
    site = Site(
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
        support_values=support_values(fn) if discrete else None,
        measured=measured,
    )
    return flagged(site, dependence.base) if fails and value.dtype.is_floating_point else site


def flagged(site: Site, run: ProgramRun) -> Site:
    """Return an outcome site whose elements may be missing, with a usual value, as in the run, to stand for them."""
    values, measured = run.value(site.name), run.measured(site.name)
    present = torch.isfinite(values)
    present = present if measured is None else present & measured
    # Any number is right; one among the others leaves their scale as it is.
    total = torch.where(present, values, torch.zeros_like(values)).double().sum(0)
    fill = (total / present.sum(0).clamp(min=1)).to(values.dtype)
    return replace(site, measured=None, fill=fill, transform=None, packed_dim=2 * site.shape.numel())


def _adds_mass_to_density(fn: Any) -> bool:
    """Whether a distribution adds up the probability of zero and a density, which is neither's logarithm."""
    base = base_distribution(fn)
    return isinstance(base, dist.ZeroInflatedDistribution) and not has_discrete_support(base.base_dist)


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


def support_values(fn: Any) -> Tensor | None:
    """Return the values that each element of a discrete distribution can take, where they are few and known."""
    base = base_distribution(fn)
    if not getattr(base, "has_enumerate_support", False) or base.event_shape:
        return None
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError:  # sizes that differ between elements
        return None
    return values.flatten() if values.numel() == values.shape[0] else None

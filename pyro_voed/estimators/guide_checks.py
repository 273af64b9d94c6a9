"""Checks of a Pyro guide against the model whose sites it samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.experiment.programs import base_distribution, support_transform
from pyro_voed.experiment.sites import Site


def check_sites(nodes: Mapping[str, Any], scored: Sequence[Site], of_targets: bool) -> None:
    """Raise where the sites that a guide samples are not those to be scored, or of another shape or kind."""
    role = "target" if of_targets else "outcome"
    names = [site.name for site in scored]
    if set(nodes) != set(names):
        raise ValueError(
            f"guide: expected it to sample the {role} sites {names} and nothing else, it samples {list(nodes)}."
        )
    for site in scored:
        fn, value = nodes[site.name]["fn"], nodes[site.name]["value"]
        # A guide may need singletons where the model has none, to get a latent out of a plate's values.
        if [size for size in value.shape if size != 1] != [size for size in site.shape if size != 1]:
            raise ValueError(
                f"guide: site '{site.name}' has shape {tuple(value.shape)}, in the model {tuple(site.shape)}."
            )
        is_discrete = bool(base_distribution(fn).support.is_discrete)
        if is_discrete != site.is_discrete:
            kinds = ("discrete", "continuous") if is_discrete else ("continuous", "discrete")
            raise ValueError(
                f"guide: site '{site.name}' is {kinds[0]} in the guide and {kinds[1]} in the model, so mass and "
                "density would be compared. Change the guide's family."
            )
        if site.transform is not None and _free_dim(fn, value) not in (None, site.packed_dim):
            raise ValueError(
                f"guide: site '{site.name}' has {_free_dim(fn, value)} free coordinates in the guide and "
                f"{site.packed_dim} in the model (a simplex has one less than entries), so their densities cannot be "
                "compared. Change the guide's family."
            )


def _free_dim(fn: Any, value: Tensor) -> int | None:
    try:
        return support_transform(fn).inv(value).numel()
    except NotImplementedError:
        return None


def warn_unregistered(score: Tensor, registered: Iterable[Tensor]) -> None:
    """Warn of tensors behind a guide's score that ask for gradients and are not among the registered, trained ones."""
    known = {id(parameter) for parameter in registered}
    unknown = [leaf for leaf in _leaves(score) if id(leaf) not in known]
    if unknown:
        warn(
            f"guide: {len(unknown)} tensors with requires_grad (shapes {[tuple(x.shape) for x in unknown[:4]]}) are "
            "used but not registered, so they are not trained. Register networks by pyro.module, other tensors by "
            "pyro.param."
        )


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that a result was computed from."""
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [parent for parent, _ in node.next_functions]

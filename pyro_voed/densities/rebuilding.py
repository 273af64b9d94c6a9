"""Modules as plain data, so that a saved result holds numbers and no code.

`describe` writes how a module was built as nested dicts, lists, strings, numbers and tensors, which
`torch.load(weights_only=True)` accepts. `rebuild` builds it again with new weights, and `load_state_dict` then makes it
the same. The decorator `rebuildable` lets a class take part: it keeps the arguments of the constructor, except modules,
which are found under the arguments' names or by a method `constructor_arguments`. The most common layers of `torch.nn`
take part too, because users make summaries of them.

A module of any other class is *foreign*: only its name is described, and `rebuild` must be given the module.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_voed.densities.contract import AdaptedDensity, as_density, fulfils_contract

Module = TypeVar("Module", bound=nn.Module)

_CLASSES: dict[str, type[nn.Module]] = {}

_LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        *(nn.Linear, nn.Conv1d, nn.Flatten, nn.Unflatten, nn.Identity),
        *(nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.Dropout),
        *(nn.ReLU, nn.SiLU, nn.Tanh, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Sigmoid, nn.SELU, nn.Mish),
    )
}
"""Layers whose attributes are the arguments of their constructors."""

_CELLS: dict[str, type[nn.Module]] = {"LSTM": nn.LSTM, "GRU": nn.GRU}
"""Classes that are arguments themselves."""


def rebuildable(cls: type[Module]) -> type[Module]:
    """Let modules of a class be described and rebuilt; a class decorator."""
    construct = cls.__init__
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def construct_and_keep(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        # A subclass with a constructor of its own calls this one too, with other arguments than it was given.
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            _, *arguments = bound.arguments.items()
            held = _held(self)
            vars(self)["_built_from"] = {
                name: _plain(value)
                for name, value in arguments
                if name not in held and not isinstance(getattr(self, name, None), nn.Module)
            }

    cls.__init__ = construct_and_keep  # type: ignore[method-assign]
    _CLASSES[cls.__name__] = cls
    return cls


def describe(module: nn.Module) -> dict[str, Any]:
    """Return how a density, critic or summary was built, as plain data without its weights.

    Example:
        >>> from pyro_voed.densities import AffineCouplingFlow
        >>> flow = AffineCouplingFlow(2, 3, hidden_dim=16).double()
        >>> again = rebuild(describe(flow))
        >>> again.load_state_dict(flow.state_dict())
        <All keys matched successfully>
    """
    frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
    return {"module": _described(module), "training": module.training, "frozen": frozen}


def rebuild(description: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a module built as described, on the CPU, for `load_state_dict` to fill; the random stream stays put.

    Args:
        description: From `describe`.
        given: The foreign modules by argument name, "density", "summary" or "critic", or by the path to it, such as
            "summary.parts.1": modules, used as copies; for densities also factories `(theta_dim, context_dim) ->
            density`. ValueError where one is missing.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        module = _rebuilt(description["module"], (), given or {})
    for name in description["frozen"]:
        module.get_parameter(name).requires_grad_(False)
    return module.train(description["training"])


def _plain(value: Any) -> Any:
    """Return an argument that is not a module as plain data."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if callable(value):
        known = isinstance(value, type) and _CELLS.get(value.__name__) is value
        return {"cell": value.__name__} if known else {"makes": _described(value())}
    return value.item() if hasattr(value, "item") else value  # NumPy's numbers


def _described(part: Any) -> Any:
    """Return a module, or several, as plain data."""
    if isinstance(part, list | nn.ModuleList):
        if len(part) > 1 and all(other is part[0] for other in part):
            return {"times": len(part), "item": _described(part[0])}
        return [_described(own) for own in part]
    dtypes = (value.dtype for value in chain(part.parameters(), part.buffers()) if value.is_floating_point())
    common = {"dtype": str(next(dtypes, "")).removeprefix("torch.")}
    name = type(part).__name__
    if _CLASSES.get(name) is type(part):
        return {"class": name, "arguments": _arguments(part), **common}
    if _LAYERS.get(name) is type(part):
        return {"class": name, "arguments": _layer_arguments(part), **common}
    if type(part) is nn.Sequential:
        return {"class": name, "arguments": {name: _described(own) for name, own in part.named_children()}, **common}
    source = type(part.source if isinstance(part, AdaptedDensity) else part)
    dims = [part.theta_dim, part.context_dim] if fulfils_contract(part) else None
    return {"foreign": f"{source.__module__}.{source.__qualname__}", "dims": dims, **common}


def _arguments(module: Any) -> dict[str, Any]:
    held = _held(module)
    return {
        name: _on_cpu(module._built_from[name])
        if name in module._built_from
        else _described(held[name] if name in held else getattr(module, name))
        for name in inspect.signature(type(module)).parameters
    }


def _held(module: Any) -> dict[str, Any]:
    """Return the arguments that a module says it holds under other names."""
    return getattr(module, "constructor_arguments", dict)()


def _layer_arguments(layer: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(layer)).parameters.values()
    names = [own.name for own in parameters if own.kind not in (own.VAR_POSITIONAL, own.VAR_KEYWORD)]
    values = {name: getattr(layer, name) for name in names if name not in ("device", "dtype")}
    # The constructor asks whether there is a bias; the layer keeps the bias itself.
    return {name: value is not None if name == "bias" else _plain(value) for name, value in values.items()}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [_on_cpu(entry) for entry in value]
    return value.cpu() if isinstance(value, Tensor) else value


def _rebuilt(value: Any, path: tuple[str, ...], given: Mapping[str, Any]) -> Any:
    """Return what plain data describe: a module, several, or an argument as it is."""
    if isinstance(value, list):
        return [_rebuilt(entry, (*path, str(number)), given) for number, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "cell" in value:
        return _CELLS[value["cell"]]
    if "makes" in value:
        return functools.partial(_rebuilt, value["makes"], path, given)
    if "times" in value:
        return [_rebuilt(value["item"], path, given)] * value["times"]
    if "foreign" in value:
        made = _foreign(value, path, given)
    else:
        arguments = {name: _rebuilt(own, (*path, name), given) for name, own in value["arguments"].items()}
        if value["class"] == "Sequential":
            return nn.Sequential(OrderedDict(arguments))
        made = (_CLASSES | _LAYERS)[value["class"]](**arguments)
    return made.to(getattr(torch, value["dtype"])) if value["dtype"] else made


def _foreign(value: Mapping[str, Any], path: tuple[str, ...], given: Mapping[str, Any]) -> nn.Module:
    where, name = ".".join(path) or "density", path[-1] if path else "density"
    found = given.get(where, given.get(name))
    if found is None:
        argument = "factory" if name == "density" else f"{{'{where}': factory}}"
        raise ValueError(
            f"{where}: expected a {value['foreign']}, got nothing. It is not a class of this library, so how to build "
            f"it is not saved: give the module, or the factory that made it, as in load(..., density={argument})."
        )
    ready = isinstance(found, nn.Module) or (hasattr(found, "condition") and not isinstance(found, type))
    if value["dims"] is None:
        return copy.deepcopy(found) if ready else found()
    return as_density(copy.deepcopy(found) if ready else found(*value["dims"]), *value["dims"])

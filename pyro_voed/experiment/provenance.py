"""Which sites' values flow into which sites: a record kept of one run, operation by operation.

Every random site's value carries the site's name, and the result of a torch operation carries the names of all its
operands. A site's *parents* are the names that its log density (a deterministic site: its value) carries besides its
own. Names begin anew at each random site, so parents are direct; through deterministic sites they pass on.

The record sees branches that this run did not take by their tensors (`5 * (n > 1.5)` carries n at any n). It errs on
one side: what flows in without effect (`0 * n`) is a parent too. Operations that take no more than shape and type of an
operand (`zeros_like(n)`) carry nothing of it. It does not see values that leave torch: NumPy, `.item()`, `if n > 1.5`,
scripted functions, `torch.func` transforms.

`pyro.infer.inspect.get_dependencies` wraps values in a tensor subclass instead. It loses what is written into a tensor
in place and fails where code asks for plain tensors; here tensors stay what they are, and the overhead is a fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_voed.experiment.programs import ProgramRun, is_deterministic, is_plate, masks, support_transform
from pyro_voed.experiment.statements import statement

Names = frozenset[str]

NOTHING: Names = frozenset()

_SHAPE_OF_FIRST = frozenset(
    f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")
) | frozenset(f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "tensor"))
"""Operations that take shape and type of their first operand, not its values."""

_VALUES_OF_FIRST = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""Operations that take values of their first operand alone."""

_WRITES = frozenset({"__setitem__", "__set__"})
"""Operations that write into their first operand and return nothing."""


class Provenance(TorchFunctionMode):
    """Records the names that tensors carry while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._names: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "")
        if kind == "broadcast_tensors":
            for operand, part in zip(args, result, strict=False):
                self.mark(part, self.carried(operand))
            return result
        operands = args[1:] if kind in _SHAPE_OF_FIRST else args[:1] if kind in _VALUES_OF_FIRST else args
        names = self.carried((*operands, *(kwargs or {}).values()))
        if names:
            written = args[0] if kind in _WRITES else result
            self.mark(written, names)
            if args and written is args[0] and isinstance(written, Tensor) and written._base is not None:
                self.mark(written._base, names)
        return result

    def carried(self, value: Any) -> Names:
        """Return the names that a tensor, or any in a sequence, carries."""
        if isinstance(value, Tensor):
            return self._names.get(value, NOTHING)
        if isinstance(value, (tuple, list)):
            return NOTHING.union(*map(self.carried, value))
        return NOTHING

    def mark(self, value: Any, names: Names) -> None:
        """Add names to those that a tensor, or each in a sequence, carries."""
        if isinstance(value, Tensor):
            self._names[value] = self._names.get(value, NOTHING) | names
        elif isinstance(value, (tuple, list)):
            for part in value:
                self.mark(part, names)

    def begin(self, value: Tensor, name: str) -> None:
        """Let a tensor carry one name and no other."""
        self._names[value] = frozenset({name})


class _NameValues(Messenger):
    def __init__(self, record: Provenance, designs: Iterable[str]):
        super().__init__()
        self.record, self.designs = record, frozenset(designs)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (is_deterministic(msg) or is_plate(msg)):
            self.record.begin(msg["value"], msg["name"])

    def _pyro_post_param(self, msg: Any) -> None:
        if msg["name"] in self.designs:
            self.record.begin(msg["value"], msg["name"])


@dataclass(frozen=True)
class Parents:
    """Names of random sites and designs whose values flow into a site's statement, its bijection and its masks."""

    of_site: Mapping[str, Names] = field(default_factory=dict)
    of_support: Mapping[str, Names] = field(default_factory=dict)
    of_mask: Mapping[str, Names] = field(default_factory=dict)

    def reached_from(self, name: str, stop: Iterable[str]) -> set[str]:
        """Return the sites that a site's values flow into, also by way of others, but not by way of `stop`."""
        reached: set[str] = set()
        front = {name}
        while front:
            front = {site for site, parents in self.of_site.items() if parents & front} - reached
            reached |= front
            front -= set(stop)
        return reached


def run_recorded(
    run: Callable[[], ProgramRun], names: Iterable[str], designs: Iterable[str]
) -> tuple[ProgramRun, Parents]:
    """Make a run and record what flows where; no parents are known where the record gets in the program's way."""
    names = list(names)
    record = Provenance()
    try:
        with record:
            with _NameValues(record, designs):
                made = run()
            of_site = {name: record.carried(statement(made, name)) - {name} for name in names}
            of_support = {name: record.carried(supports_at_zero(made, name)) for name in names}
            nodes = [trace.nodes for trace in made.traces]
            of_mask = {name: record.carried([mask for own in nodes for mask, _ in masks(own[name])]) for name in names}
    except Exception:  # what a program raises because its operations are watched; anything else it raises again
        return run(), Parents()
    return made, Parents(of_site, of_support, of_mask)


def supports_at_zero(run: ProgramRun, name: str) -> Tensor | None:
    """Return where the bijection onto the site's support takes zero, `(num_rows, size)`; None without a bijection."""
    points = []
    for trace in run.traces:
        node = trace.nodes[name]
        if is_deterministic(node):
            return None
        try:
            transform = support_transform(node["fn"])
        except (NotImplementedError, AttributeError):
            return None
        zero = torch.zeros_like(transform.inv(node["value"]))
        points.append(transform(zero).reshape(run.rows_per_trace, -1))
    return torch.cat(points)

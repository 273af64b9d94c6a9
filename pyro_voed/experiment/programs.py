"""Running a Pyro program over many experiments at once, and reading rows back.

A model describes ONE experiment. It is run for `num_rows` experiments in one of two ways:

* *vectorised*: once, inside one outer plate at dimension `-1 - max_plate_nesting`, so that every sample site is drawn
  per row and every inner plate keeps its dimension. A site whose single-run value has shape `shape` then has shape
  `(num_rows, 1, ..., *shape)`, with one singleton for each plate dimension it does not use;
* *one by one*: `num_rows` times, for any model whatever.

`ProgramRun` hides the difference: it reads values, log densities and unconstrained coordinates as `(num_rows, ...)`.
Data given with `obs=` are released and drawn like any other site. (`poutine.uncondition` also redraws deterministic
sites, which inside a plate expands their values a second time, so the release is our own.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

from pyro_voed.experiment.caller_state import param_store_kept
from pyro_voed.experiment.failing import draw_or_fail
from pyro_voed.experiment.supports import bijection, lkj_drawn_right, support_of

OUTER_PLATE = "_pyro_voed_rows"


class Release(Messenger):
    """Draw sites given with `obs=`, except those named in `keep` (history) and deterministic ones."""

    def __init__(self, keep: Sequence[str] = ()):
        super().__init__()
        self.keep = frozenset(keep)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not is_deterministic(msg) and msg["name"] not in self.keep:
            if isinstance(base_distribution(msg["fn"]), dist.Unit):
                return
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            msg["infer"]["was_observed"] = True


class Assign(Messenger):
    """Give sample sites values, or functions of their message, without marking them observed.

    torch's own draws of LKJ distributions are put right (`lkj_drawn_right`).
    """

    def __init__(self, values: Mapping[str, Tensor | Callable[[Any], Tensor]], *, may_fail: bool = False):
        super().__init__()
        self.values, self.may_fail = values, may_fail

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not is_deterministic(msg):
            msg["value"], msg["done"] = (value(msg) if callable(value) else value), True
        elif value is None and msg["value"] is None and not msg["done"]:
            right = lkj_drawn_right(msg["fn"])
            if self.may_fail and right is msg["fn"] and not getattr(right, "has_rsample", False):
                msg["value"], msg["done"] = draw_or_fail(right), True
            elif right is not msg["fn"]:
                msg["value"], msg["done"] = right.sample(), True


@dataclass
class Meter:
    """Counts experiments simulated, the currency in which simulators are paid; shared by all that run one program."""

    num_calls: int = 0


@dataclass(frozen=True)
class Program:
    """A released Pyro program of one experiment and how it is run for many.

    Attributes:
        call: The program, its arguments bound.
        max_plate_nesting: Plate (and undeclared batch) dimensions in use; the outer plate stands left of them.
        design_singletons: For each design, the singleton dimensions put between row and value when every row has
            its own design; None where no such layout is right, so designs are looped over.
        constants: Values of the parameters that are no designs, held as they were when the model was resolved.
        may_fail: Parameters that are NaN are no error, nor are the values drawn with them: the simulator failed.
    """

    call: Callable[[], Any]
    max_plate_nesting: int = 0
    vectorised: bool = False
    design_singletons: Mapping[str, int] | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    may_fail: bool = False
    meter: Meter = field(default_factory=Meter, compare=False)


def run_rows(
    program: Program,
    num_rows: int,
    shapes: Mapping[str, torch.Size],
    *,
    designs: Mapping[str, Tensor] | None = None,
    row_designs: Mapping[str, Tensor] | None = None,
    row_values: Mapping[str, Tensor] | None = None,
    row_coordinates: Mapping[str, Tensor] | None = None,
) -> ProgramRun:
    """Run `num_rows` experiments; `shapes` are the single-run shapes of all sites.

    Args:
        designs: Design values shared by all rows, in the shape the program has them.
        row_designs: Design values of each row, `(num_rows, *shape)`.
        row_values: Site values of each row, `(num_rows, *shape)`; aligned to the plates here.
        row_coordinates: Unconstrained coordinates of each row, `(num_rows, dim)`, mapped to the support that the site
            has in that row, which may depend on sites before it.
    """
    designs, row_designs = designs or {}, row_designs or {}
    row_values, row_coordinates = row_values or {}, row_coordinates or {}
    program.meter.num_calls += num_rows
    if program.vectorised:
        ones = {name: (1,) * count for name, count in (program.design_singletons or {}).items()}
        laid_out = {name: v.reshape(v.shape[0], *ones[name], *v.shape[1:]) for name, v in row_designs.items()}
        trace = trace_program(program, {**designs, **laid_out}, _assignments(row_values, row_coordinates), num_rows)
        return ProgramRun((trace,), num_rows, shapes)
    traces = []
    for row in range(num_rows):
        own, values, coordinates = (
            {name: value[row] for name, value in rows.items()} for rows in (row_designs, row_values, row_coordinates)
        )
        trace = trace_program(program, {**designs, **own}, _assignments(values, coordinates), None)
        if set(sample_nodes(trace)) != set(shapes):
            raise ValueError(sites_come_and_go(set(sample_nodes(trace)) ^ set(shapes)))
        traces.append(trace)
    return ProgramRun(tuple(traces), 1, shapes)


def trace_program(
    program: Program,
    designs: Mapping[str, Tensor],
    assigned: Mapping[str, Callable[[Any], Tensor]],
    num_rows: int | None,
) -> poutine.Trace:
    """Trace one run; with `num_rows`, inside the outer plate."""
    substituted = {**program.constants, **designs}
    with ExitStack() as handlers:
        handlers.enter_context(param_store_kept())
        recorder = handlers.enter_context(poutine.trace())
        handlers.enter_context(Assign(assigned, may_fail=program.may_fail))
        if substituted:
            handlers.enter_context(poutine.substitute(data=substituted))
        if program.may_fail:
            handlers.enter_context(pyro.validation_enabled(False))
        if num_rows is not None:
            handlers.enter_context(pyro.plate(OUTER_PLATE, num_rows, dim=-1 - program.max_plate_nesting))
        program.call()
    return recorder.trace


def _assignments(values: Mapping[str, Tensor], coordinates: Mapping[str, Tensor]) -> dict[str, Callable[[Any], Tensor]]:
    assigned: dict[str, Callable[[Any], Tensor]] = {name: partial(_put_value, value) for name, value in values.items()}
    return assigned | {name: partial(_put_coordinates, rows) for name, rows in coordinates.items()}


def _put_value(value: Tensor, msg: Any) -> Tensor:
    # By the time a message is seen the plates have expanded its distribution, so its shape is that of the value.
    return value.reshape(msg["fn"].batch_shape + msg["fn"].event_shape)


def _put_coordinates(rows: Tensor, msg: Any) -> Tensor:
    transform = support_transform(msg["fn"])
    return transform(rows.reshape(transform.inverse_shape(msg["fn"].batch_shape + msg["fn"].event_shape)))


@dataclass(frozen=True)
class ProgramRun:
    """The traces of one run over rows (one of all rows, or one a row), read as `(num_rows, ...)`."""

    traces: tuple[poutine.Trace, ...]
    rows_per_trace: int
    shapes: Mapping[str, torch.Size]

    def value(self, name: str) -> Tensor:
        """Return the site's values, `(num_rows, *shape)`."""
        return torch.cat(
            [to_rows(t.nodes[name]["value"], self.rows_per_trace, self.shapes[name], name) for t in self.traces]
        )

    def redrawn(self, names: Sequence[str]) -> ProgramRun:
        """Return the same run with new values at the named sites, drawn from the distributions that it made there.

        The model is not run again, as `poutine.replay` would: right only where nothing else follows from the values.
        """
        traces = []
        for trace in self.traces:
            fresh = trace.copy()
            for name in names:
                node = trace.nodes[name]
                fresh.nodes[name] = {**node, "value": node["fn"].sample()}
            traces.append(fresh)
        return ProgramRun(tuple(traces), self.rows_per_trace, self.shapes)

    def measured(self, name: str) -> Tensor | None:
        """Return which elements of a site its masks leave in, `(num_rows, *shape)`; None where it has no mask."""
        nodes = [trace.nodes[name] for trace in self.traces]
        found = [list(masks(node)) for node in nodes]
        if not any(found):
            return None
        parts = []
        for node, own in zip(nodes, found, strict=True):
            measured = torch.ones_like(node["value"], dtype=torch.bool)
            for mask, event_dim in own:
                part = torch.as_tensor(mask, device=measured.device)
                measured = measured & part.reshape(part.shape + (1,) * event_dim)
            parts.append(to_rows(measured, self.rows_per_trace, self.shapes[name], name))
        return torch.cat(parts)

    def flat_value(self, name: str) -> Tensor:
        """Return the site's values with their dimensions joined, `(num_rows, size)`."""
        value = self.value(name)
        return value.reshape(value.shape[0], -1)

    def log_prob(self, name: str, *, on_support: bool = False) -> Tensor:
        """Return the site's log density in nats, summed within the row, `(num_rows,)`.

        With `on_support` values that were put in are allowed to lie outside the support, where it is -inf.
        """
        parts = []
        for trace in self.traces:
            node = trace.nodes[name]
            fn, value = node["fn"], node["value"]
            log_prob = log_prob_on_support(fn, value) if on_support else fn.log_prob(value)
            parts.append(self._row_sum(scale_and_mask(log_prob, mask=node["mask"])))
        return torch.cat(parts)

    def control(self, name: str) -> Tensor | None:
        """Return the site's log density plus its entropy, nats, `(num_rows,)`, of mean 0; None without an entropy."""
        parts = []
        for trace in self.traces:
            node = trace.nodes[name]
            if node["mask"] is not None or not _has_own_entropy(node["fn"]):
                return None
            try:
                control = node["fn"].log_prob(node["value"]) + node["fn"].entropy()
            except (NotImplementedError, AttributeError):
                # AttributeError: an expanded multinomial of torch 2.13 has lost what its entropy needs.
                return None
            parts.append(self._row_sum(control))
        return torch.cat(parts)

    def unconstrained(self, name: str, transform: Transform | None = None) -> tuple[Tensor, Tensor]:
        """Return unconstrained coordinates `(num_rows, dim)` and log `|d value / d coordinates|` `(num_rows,)`.

        Each trace's own support is used (bounds may differ from row to row) unless a transform is given.
        """
        coordinates, log_dets = [], []
        for trace in self.traces:
            node = trace.nodes[name]
            to_support = transform if transform is not None else support_transform(node["fn"])
            value = node["value"]
            unconstrained = to_support.inv(value)
            coordinates.append(unconstrained.reshape(self.rows_per_trace, -1))
            log_dets.append(self._row_sum(to_support.log_abs_det_jacobian(unconstrained, value)))
        return torch.cat(coordinates), torch.cat(log_dets)

    def _row_sum(self, log_density: Tensor) -> Tensor:
        if log_density.dim() == 0 or log_density.shape[0] != self.rows_per_trace:
            return log_density.sum().expand(self.rows_per_trace)
        return log_density.reshape(self.rows_per_trace, -1).sum(-1)


def _has_own_entropy(fn: Any) -> bool:
    """Whether the entropy is that of the density: a user's class may state another density and inherit the entropy."""
    classes = type(base_distribution(fn)).__mro__
    density, entropy = (next(c for c in classes if name in vars(c)) for name in ("log_prob", "entropy"))
    return density.__module__.startswith(("torch.", "pyro.")) or not issubclass(density, entropy) or density is entropy


def log_prob_on_support(fn: Any, value: Tensor) -> Tensor:
    """Return fn.log_prob(value), -inf outside the support.

    Without validation torch computes some number there, with validation it raises; log 0 is what it is.
    """
    log_prob = fn.log_prob(value)
    inside = fn.support.check(value).expand(log_prob.shape)
    return torch.where(inside, log_prob, torch.full_like(log_prob, -torch.inf))


def to_rows(value: Tensor, num_rows: int, shape: torch.Size, name: str) -> Tensor:
    """Return a site's value in a trace as `(num_rows, *shape)`, expanded where it depends on no random site."""
    has_rows = value.dim() > len(shape) and value.shape[0] == num_rows
    if has_rows and [size for size in value.shape[1:] if size != 1] == [size for size in shape if size != 1]:
        return value.reshape(num_rows, *shape)
    if value.shape == shape:
        return value.expand(num_rows, *shape)
    raise ValueError(
        f"site '{name}': run for {num_rows} experiments at once its value has shape {tuple(value.shape)}, where one "
        f"experiment has {tuple(shape)}."
    )


def support_transform(fn: Distribution) -> Transform:
    """Return the bijection from unconstrained coordinates to the distribution's support."""
    return bijection(support_of(fn))


def base_distribution(fn: Any) -> Any:
    """Return what an expanded, masked or reinterpreted distribution wraps."""
    while isinstance(fn, (dist.torch_distribution.MaskedDistribution, torch.distributions.Independent)):
        fn = fn.base_dist
    return fn


def has_discrete_support(fn: Any) -> bool:
    """Whether a distribution states a support and it is discrete; one that only samples may state none."""
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def is_deterministic(node: Mapping[str, Any]) -> bool:
    """Whether a site was made with `pyro.deterministic`."""
    return bool(node["infer"] and node["infer"].get("_deterministic"))


def is_plate(node: Mapping[str, Any]) -> bool:
    """Whether a trace node only records a plate's indices."""
    return isinstance(node["fn"], _Subsample)


def masks(node: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
    """Yield the masks on a site, by a handler and in its distribution, each with how many event dimensions it lacks."""
    layer = node["fn"]
    if is_deterministic(node):
        return
    if node["mask"] is not None:
        yield node["mask"], len(layer.event_shape)
    while layer is not None:
        if getattr(layer, "_mask", None) is not None:
            yield layer._mask, len(layer.event_shape)
        layer = getattr(layer, "base_dist", None)


def sites_come_and_go(names: set[str]) -> str:
    """Say that sites are in some runs and not in others."""
    return (
        f"the model's sites change from run to run: {sorted(names)} come and go. Sample every site in every run (a "
        "site that plays no part may be ignored afterwards)."
    )


def sample_nodes(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """Return the sample and deterministic sites of a trace, plates left out."""
    return {name: node for name, node in trace.nodes.items() if node["type"] == "sample" and not is_plate(node)}

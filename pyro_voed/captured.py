"""Training steps recorded once and replayed, so that nothing of a step is left to the CPU but to start it.

A step through Pyro is hundreds of small operations, each started by Python; on a GPU that starting is what takes the
time. Recorded as a CUDA graph, the whole step (simulation, density, gradient, optimiser) is one launch.

A recording does again what was done, so it may only be trusted after a look at what it draws. Before training

* from one state of torch's generators two simulations must be the same: other generators' numbers would be repeated
  for ever;
* every element of every site that varies between simulations must vary between replays;
* replayed simulations must have the distribution of fresh ones, by a two-sample Kolmogorov-Smirnov test of every
  element at a false-positive rate of 1e-6 in all.

What cannot be recorded, or does not pass, runs as it is, with a warning that says why: an option to go faster must not
be one to go wrong. Terms and gradients that are not finite are counted on the device and read every 50 steps.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READ_EVERY = 50
WARM_UP = 3
FEWEST_REPLAYS = 4
ROWS_TO_COMPARE = 4_000
FALSE_POSITIVE_RATE = 1e-6

Step = Callable[[], Mapping[str, Tensor]]
"""A training step; returns the values of the sites that it simulated."""


@runtime_checkable
class Climber(Protocol):
    """What ascends: parameters and an optimiser whose rates can be set from outside a recording."""

    optimiser: torch.optim.Optimizer

    def scale_rates(self, factor: float) -> None:
        """Set every rate to a share of its own."""

    def step_unseen(self, bound: Tensor) -> Tensor:
        """Climb one step without waiting for the device; return whether the gradient was finite."""


class NotReplayable(RuntimeError):
    """A recording does not do what the step does."""


def recorder(device: torch.device) -> Callable[[Step], Step] | None:
    """Return what records steps on a device, None where nothing does."""
    return cuda_graph if device.type == "cuda" else None


class HeldConstants(TorchDispatchMode):
    """Keep on the device what a step brings there from the host, so that a recording has nothing to bring.

    Every Python number in a model is such a constant: `Normal(mean, 5.0)` copies the 5.0 to the device of the mean, and
    a copy from the host cannot be recorded. Copies are known by what is in them.

    Attributes:
        closed: Whether a new constant is an error: one that was not there in the steps before differs from step to
            step, and a recording would hold on to one of its values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self._held: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if operation is not torch.ops.aten._to_copy.default or device is None or torch.device(device).type == "cpu":
            return operation(*args, **kwargs)
        host = args[0]
        if host.device.type != "cpu":
            return operation(*args, **kwargs)
        content = host.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        key = (tuple(host.shape), host.dtype, kwargs.get("dtype"), str(device), content)
        if key not in self._held:
            if self.closed:
                raise NotReplayable("it brings numbers from the host that differ from step to step")
            self._held[key] = operation(*args, **kwargs)
        # A copy, because whoever made the constant may write to it.
        return self._held[key].clone()


def cuda_graph(step: Step) -> Step:
    """Record a step as a CUDA graph; its outputs are overwritten by the next replay."""
    side, constants = torch.cuda.Stream(), HeldConstants()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), constants:
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    constants.closed = True
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), constants:
        outputs = step()

    def replay() -> Mapping[str, Tensor]:
        # The recording reads the constants where they are, so they live as long as it does.
        assert constants.closed
        graph.replay()
        return outputs

    return replay


@dataclass
class Capture:
    """How the steps of one training run are captured.

    Attributes:
        record: What records a step, as `recorder` gives it.
        values: The values of the sites in a batch, `(num_samples, ...)` each.
        calls: Count of simulated experiments, which replays would not move by themselves.
    """

    record: Callable[[Step], Step]
    values: Callable[[Any], Mapping[str, Tensor]]
    calls: list[int] = field(default_factory=lambda: [0])


class CapturedSteps:
    """Steps that are replayed, what they found kept on the device until it is read.

    Args:
        capture: How to record.
        draw: Gives a new batch.
        terms: Gives the batch's terms, whose mean is ascended.
        climber: Optimiser and parameters.

    Raises:
        NotReplayable: If the step cannot be recorded, or a recording does not simulate what the step does.
    """

    def __init__(
        self, capture: Capture, draw: Callable[[], Any], terms: Callable[[Any], Tensor], climber: Climber
    ) -> None:
        self._capture, self._draw, self._terms, self._climber = capture, draw, terms, climber
        self._parameters = [own for group in climber.optimiser.param_groups for own in group["params"]]
        like = self._parameters[0]
        self._bounds = torch.zeros(READ_EVERY, dtype=like.dtype, device=like.device)
        self._bad_terms = torch.zeros(READ_EVERY, dtype=torch.long, device=like.device)
        self._bad_gradients = torch.zeros(READ_EVERY, dtype=torch.long, device=like.device)
        self._slot = torch.zeros(1, dtype=torch.long, device=like.device)
        self._num_terms = self._calls_a_step = self._unread = self._read = 0
        self._saved: list[Tensor] = []
        self.bounds: list[float] = []
        with self._nothing_learnt(), _streams_kept(like.device):
            self._replay = self._checked_recording()

    def take(self) -> None:
        """Replay one step."""
        if self._unread == 0:
            # Here and not after the last look: between steps designs may have been projected.
            self._saved = [tensor.detach().clone() for tensor in self._state()]
        self._replay()
        self._capture.calls[0] += self._calls_a_step
        self._unread += 1
        if self._unread == READ_EVERY:
            self.settle()

    def settle(self) -> None:
        """Read what the steps since the last look found.

        Raises:
            ArithmeticError: If a term or gradient was not finite; parameters and optimiser are then as they were
                before the first of these steps.
        """
        if self._unread == 0:
            return
        count, first = self._unread, self._read
        self._unread = 0
        self._slot.zero_()
        bad_terms, bad_gradients = self._bad_terms[:count].tolist(), self._bad_gradients[:count].tolist()
        self._bad_terms.zero_()
        self._bad_gradients.zero_()
        if any(bad_terms) or any(bad_gradients):
            with torch.no_grad():
                for tensor, before in zip(self._state(), self._saved, strict=True):
                    tensor.copy_(before)
            at = next(slot for slot in range(count) if bad_terms[slot] or bad_gradients[slot])
            what = f"{bad_terms[at]} of {self._num_terms} terms are" if bad_terms[at] else "the gradient is"
            raise ArithmeticError(
                f"steps {first} to {first + count - 1}, replayed from a recording: in step {first + at} {what} not "
                f"finite. What was learnt is as before step {first}. Run again without capture to see which site it is."
            )
        self._read += count
        self.bounds += self._bounds[:count].tolist()

    def _step(self) -> Mapping[str, Tensor]:
        with torch.enable_grad():
            before = self._capture.calls[0]
            batch = self._draw()
            values = self._terms(batch)
            self._calls_a_step = self._capture.calls[0] - before
            bound = values.mean()
            finite = self._climber.step_unseen(bound)
        self._num_terms = values.numel()
        self._bad_terms.index_copy_(0, self._slot, (~torch.isfinite(values)).sum().reshape(1))
        self._bad_gradients.index_copy_(0, self._slot, (~finite).long().reshape(1))
        self._bounds.index_copy_(0, self._slot, bound.detach().reshape(1).to(self._bounds.dtype))
        self._slot.add_(1)
        return {name: value.detach() for name, value in self._capture.values(batch).items()}

    def _checked_recording(self) -> Step:
        with torch.enable_grad():
            self._check_generators()
            fresh = [self._fresh()]
            num_replays = max(FEWEST_REPLAYS, math.ceil(ROWS_TO_COMPARE / _rows(fresh[0])))
            num_replays = min(num_replays, READ_EVERY)
            fresh += [self._fresh() for _ in range(num_replays - 1)]
        try:
            replay = self._capture.record(self._step)
        # Recorders raise whatever what they record raises when it asks for a value.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise NotReplayable(f"the step could not be recorded: {lines[0]}") from error
        self._slot.zero_()
        replays = []
        for _ in range(num_replays):
            # Outputs of a recording are overwritten by the next replay.
            replays.append({name: value.clone() for name, value in replay().items()})
        check_replays(fresh, replays)
        return replay

    def _fresh(self) -> Mapping[str, Tensor]:
        return {name: value.detach() for name, value in self._capture.values(self._draw()).items()}

    def _check_generators(self) -> None:
        """Raise where a simulation draws from other generators than torch's."""
        runs = []
        for other_seed in range(2):
            with _streams_kept(self._bounds.device):
                random.seed(other_seed)
                numpy.random.seed(other_seed)  # noqa: NPY002
                runs.append(self._fresh())
        for name, value in runs[0].items():
            # Not to the last digit: some sums on a GPU add up in any order.
            if not torch.allclose(value.double(), runs[1][name].double(), rtol=1e-3, equal_nan=True):
                raise NotReplayable(
                    f"site '{name}' draws from another generator than torch's (Python's or NumPy's), whose numbers a "
                    "recording would repeat for ever"
                )

    def _state(self) -> list[Tensor]:
        states = self._climber.optimiser.state
        own = [states[parameter] for parameter in self._parameters if parameter in states]
        return self._parameters + [value for state in own for value in state.values() if isinstance(value, Tensor)]

    @contextmanager
    def _nothing_learnt(self) -> Iterator[None]:
        """Put parameters back, the optimiser's memory to zero, and the counters too."""
        before = [parameter.detach().clone() for parameter in self._parameters]
        # Designs must stand still while simulations are compared.
        self._climber.scale_rates(0.0)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, before, strict=True):
                    parameter.copy_(value)
                for tensor in self._state()[len(self._parameters) :]:
                    tensor.zero_()
                for counter in (self._slot, self._bad_terms, self._bad_gradients, self._bounds):
                    counter.zero_()
            self._climber.scale_rates(1.0)


def captured_or_none(
    capture: Capture, draw: Callable[[], Any], terms: Callable[[Any], Tensor], climber: Climber
) -> CapturedSteps | None:
    """Return captured steps; None, with a warning that says why, where there is no trusting them."""
    try:
        return CapturedSteps(capture, draw, terms, climber)
    except NotReplayable as error:
        warnings.warn(f"capture: {error}. Training runs without.", stacklevel=3)
        return None


def check_replays(fresh: Sequence[Mapping[str, Tensor]], replays: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise where replayed simulations stand still or have another distribution than fresh ones.

    Args:
        fresh: Site values of simulations made afresh, `(num_samples, ...)` each.
        replays: As many replayed ones.

    Raises:
        NotReplayable: Naming the site.

    Example:
        >>> draws = [{"y": torch.randn(1000, 2)} for _ in range(8)]
        >>> check_replays(draws[:4], draws[4:])
        >>> check_replays(draws[:4], draws[4:5] * 4)
        Traceback (most recent call last):
        pyro_voed.captured.NotReplayable: site 'y' varies between simulations, but not from replay to replay
    """
    num_elements = sum(value[0].numel() for value in fresh[0].values())
    for name in fresh[0]:
        own, replayed = (_rows_of(name, runs) for runs in (fresh, replays))
        still = _varies(own) & ~_varies(replayed)
        if still.any():
            raise NotReplayable(f"site '{name}' varies between simulations, but not from replay to replay")
        distance, rows = _kolmogorov_smirnov(own.flatten(0, 1), replayed.flatten(0, 1)), own.shape[0] * own.shape[1]
        critical = math.sqrt(-math.log(FALSE_POSITIVE_RATE / num_elements / 2.0) / rows)
        if (distance > critical).any():
            raise NotReplayable(
                f"site '{name}' is distributed otherwise in replays: a Kolmogorov-Smirnov distance of "
                f"{distance.max():.3f} where chance gives at most {critical:.3f}"
            )


def _rows_of(name: str, runs: Sequence[Mapping[str, Tensor]]) -> Tensor:
    return torch.stack([run[name].reshape(run[name].shape[0], -1) for run in runs]).double()


def _varies(runs: Tensor) -> Tensor:
    return (runs != runs[0]).any(0).any(0)


def _kolmogorov_smirnov(first: Tensor, second: Tensor) -> Tensor:
    """Return the largest distance of the empirical distribution functions of each column, for equally many rows."""
    points = torch.cat([first, second]).mT.contiguous()
    ranks = [
        torch.searchsorted(rows.mT.contiguous().sort(-1).values, points, right=True).double() / rows.shape[0]
        for rows in (first, second)
    ]
    return (ranks[0] - ranks[1]).abs().amax(-1)


def _rows(values: Mapping[str, Tensor]) -> int:
    return next(iter(values.values())).shape[0]


@contextmanager
def _streams_kept(device: torch.device) -> Iterator[None]:
    """Give back the random streams as they were, so that training draws what it would have drawn."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)  # noqa: NPY002

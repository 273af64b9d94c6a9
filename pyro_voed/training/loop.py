"""The one training loop: stochastic gradient ascent on a mean of terms, the bound.

Everything that is learnt, with or without designs, is learnt here: on fresh simulations every step (`fit_fresh`), which
cannot be overfitted, or on minibatches of one pool of them (`fit_pool`), for expensive simulators.

Gradients are taken for the given parameters only, so nothing accumulates on tensors that belong to the caller. A term
that is not finite stops the loop with the step and the count; the weights are then those of the last good step.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_voed.results import FitHistory, StopReason
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.plans import Best, Plan, PoolPlan

VALIDATION_COPIES = 8
"""Sets of outcomes for the forward runs of the validation part, where outcomes can be drawn anew."""

SHOW_EVERY = 50

Batch = TypeVar("Batch")


def fit_fresh(
    draw: Callable[[], Batch],
    terms: Callable[[Batch], Tensor],
    ascent: Ascent,
    *,
    max_steps: int = 10_000,
    window: int = 250,
    cooldown_steps: int = 1_000,
    num_steps: int | None = None,
    explain: Callable[[Batch], str] = lambda batch: "",
    after_step: Callable[[int], None] = lambda step: None,
    before_cooldown: Callable[[], None] = lambda: None,
    progress: bool | None = None,
    description: str = "fit",
) -> FitHistory:
    """Ascend the mean of `terms(batch)` on fresh batches until it stops rising, then cool down.

    The rate falls to zero by half a cosine in the last `cooldown_steps`; `num_steps` fixes the steps in all. `explain`
    says what in a batch is not finite, `after_step` gets each step's number, `before_cooldown` is called once.
    """
    started = time.perf_counter()
    total = max_steps if num_steps is None else num_steps
    cooldown_steps = min(cooldown_steps, total // 2)
    plan = Plan(total, cooldown_steps, window, fixed=num_steps is not None)
    bounds: list[float] = []
    factors: list[float] = []
    reason: StopReason = "not trained"
    with _interruptible() as interrupted, tqdm(total=total, desc=description, disable=_hidden(progress)) as bar:
        for step in range(total):
            if interrupted():
                reason = "interrupted"
                break
            if plan.starts_cooling(step, bounds):
                before_cooldown()
                bar.total = plan.end
            if step >= plan.end:
                break
            factor = plan.factor(step)
            ascent.scale_rates(factor)
            with torch.enable_grad():
                batch = draw()
            bounds.append(_one_step(batch, terms, ascent, explain, step))
            factors.append(factor)
            after_step(step)
            bar.update()
            if len(factors) % SHOW_EVERY == 0:
                recent = bounds[-SHOW_EVERY:]
                bar.set_postfix_str(f"bound {sum(recent) / len(recent):.3f} nats", refresh=False)
        else:
            reason = plan.reason
    reason = plan.reason if reason == "not trained" and factors else reason
    return FitHistory(torch.tensor(bounds), torch.tensor(factors), reason, time.perf_counter() - started)


def fit_pool(
    pool: Any,
    terms: Callable[[Any], Tensor],
    ascent: Ascent,
    *,
    batch_size: int = 128,
    validation_fraction: float = 0.1,
    patience: int = 20,
    max_epochs: int = 1_000,
    refresh: Callable[[Any], Any] | None = None,
    begin: Callable[[Any], None] = lambda training: None,
    explain: Callable[[Any], str] = lambda batch: "",
    progress: bool | None = None,
    description: str = "fit",
) -> FitHistory:
    """Ascend on minibatches of a fixed pool, stop early, and put the best weights back.

    The rate is constant until the validation bound has not risen for `patience` epochs. Then the best weights are put
    back and the rate cools down to zero, by half a cosine over as many epochs as there were, or until the validation
    bound has not risen for half of these. On a small pool that can be too slow: weights learn the pool by heart
    before the rate is low. If cooling down has not raised the bound, the best weights are put back once more and
    training goes on at a tenth of the rate, with the same patience.

    Args:
        pool: Has `num_samples` rows and is picked from by row.
        terms, ascent, explain: As in `fit_fresh`.
        batch_size, validation_fraction, patience, max_epochs: As in `Pool`.
        refresh: Gives a part of the pool with new outcomes for the same forward runs. Then every pass sees new ones,
            and the validation bound is a mean over `VALIDATION_COPIES` of them.
        begin: Gets, before the first step, the part that is learnt from: a start that has seen the validation part
            would spoil what that is for.
    """
    started = time.perf_counter()
    training, validation = _split(pool, validation_fraction)
    begin(training)
    copies = [validation] if refresh is None else [refresh(validation) for _ in range(VALIDATION_COPIES)]
    best = Best([parameter for group in ascent.optimiser.param_groups for parameter in group["params"]])
    bounds: list[float] = []
    factors: list[float] = []
    scores: list[float] = []
    reason: StopReason = "budget"
    plan = PoolPlan(patience)
    with _interruptible() as interrupted, tqdm(total=max_epochs, desc=description, disable=_hidden(progress)) as bar:
        for _ in range(max_epochs):
            ascent.scale_rates(plan.factor)
            if refresh is not None:
                training = refresh(training)
            # Pieces of nearly equal size: a short one at the end would be a noisy step.
            for rows in torch.randperm(training.num_samples).tensor_split(math.ceil(training.num_samples / batch_size)):
                bounds.append(_one_step(training[rows], terms, ascent, explain, len(bounds)))
                factors.append(plan.factor)
            with torch.no_grad():
                means = [_finite_mean(copy, terms, explain, len(bounds)) for copy in copies]
            scores.append(sum(means) / len(means))
            plan.count(better=best.offer(scores[-1]))
            bar.update()
            bar.set_postfix_str(f"validation bound {scores[-1]:.4f}")
            if interrupted():
                reason = "interrupted"
                break
            if plan.is_stalled:
                best.restore()
                if not plan.goes_on():
                    reason = "early stopping"
                    break
    best.restore()
    return FitHistory(
        torch.tensor(bounds), torch.tensor(factors), reason, time.perf_counter() - started, torch.tensor(scores)
    )


class TrainingStopped(RuntimeError):
    """An error ended training; it holds the density and designs reached until then, so that training can go on."""

    def __init__(self, message: str, density: Any = None, designs: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(message)
        self.density, self.designs = density, designs


class NotFinite(TrainingStopped, ArithmeticError):
    """A term or gradient was not finite, which ended training."""


@contextmanager
def keeping(learned: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Turn any error that ends the body into a `TrainingStopped` with what was learned so far."""
    try:
        yield
    except TrainingStopped:
        raise
    except ArithmeticError as error:
        raise NotFinite(str(error), **learned()) from error
    except Exception as error:
        raise TrainingStopped(f"{type(error).__name__}: {error}", **learned()) from error


def _split(pool: Any, fraction: float) -> tuple[Any, Any]:
    size = round(fraction * pool.num_samples)
    if size < 2 or pool.num_samples - size < 2:
        raise ValueError(
            f"a pool of {pool.num_samples} simulations is too small to keep {fraction:.0%} for validation: at least "
            "two must fall on either side."
        )
    order = torch.randperm(pool.num_samples)
    return pool[order[size:]], pool[order[:size]]


def _one_step(
    batch: Batch, terms: Callable[[Batch], Tensor], ascent: Ascent, explain: Callable[[Batch], str], step: int
) -> float:
    with torch.enable_grad():
        values = terms(batch)
        bound = values.mean()
        if not torch.isfinite(bound):
            raise _not_finite(values, batch, explain, step)
        if not ascent.step(bound):
            raise ArithmeticError(
                f"step {step}: the gradient is not finite though every term is. {explain(batch)} "
                "Try a smaller learning rate, or look for square roots and logarithms at 0 in the model."
            )
    return bound.item()


def _finite_mean(batch: Any, terms: Callable[[Any], Tensor], explain: Callable[[Any], str], step: int) -> float:
    values = terms(batch)
    if not torch.isfinite(values).all():
        raise _not_finite(values, batch, explain, step)
    return values.mean().item()


def _not_finite(values: Tensor, batch: Batch, explain: Callable[[Batch], str], step: int) -> ArithmeticError:
    bad = int((~torch.isfinite(values)).sum())
    return ArithmeticError(f"step {step}: {bad} of {values.numel()} terms are not finite. {explain(batch)}".rstrip())


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end training after the current step, with everything kept; a second one raises."""
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: Any) -> None:
        if asked:
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt
        asked.append(True)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)

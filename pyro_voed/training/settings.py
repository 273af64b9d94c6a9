"""How a density is trained: on fresh simulations every step, or on a fixed pool of them.

Fresh simulations cannot be learned by heart, so they are the better choice wherever a simulation costs less than a
gradient step. A pool is for expensive simulators: part of it is kept for validation, and training stops early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_voed.checks import check_count, check_positive, check_share

Rates = float | Sequence[float] | None


@dataclass(frozen=True)
class Fresh:
    """Train on fresh simulations every step.

    Args:
        num_steps: Take exactly this many steps; 0 uses a density as it is. Default: until the bound no longer improves
            by more than its noise, then cool down.
        max_steps: Most steps; default 10,000 (20,000 for `amortise_eig`).
        batch_size: Experiments a step; default from the dimensions.
        learning_rate: Peak learning rate; or several, of which the best is chosen (in an ensemble for each design),
            trained side by side on the same simulations. Default: the estimator's own.
        design_learning_rate: Peak learning rate of the designs, in unconstrained coordinates; for searches alone.

    Example:
        >>> Fresh(num_steps=500).num_steps
        500
    """

    num_steps: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: Rates = None
    design_learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("num_steps", 0), ("max_steps", 1), ("batch_size", 2)):
            value = getattr(self, name)
            if value is not None:
                check_count(value, name, minimum)
        rates_of(self, 1.0)
        if self.design_learning_rate is not None:
            check_positive(self.design_learning_rate, "design_learning_rate")


@dataclass(frozen=True)
class Pool:
    """Train on a fixed pool of simulations, part of it kept for validation.

    Args:
        num_simulations: Size of the pool, shared among the designs of a batch.
        batch_size: Experiments a step; default 256.
        learning_rate: As in `Fresh`, but several are trained one after the other on the same pool.
        redraw_outcomes: Where outcomes are a forward map plus explicit noise, run that map once for each experiment of
            the pool and draw its outcomes anew for every pass; False keeps each experiment's one outcome.
        validation_fraction: Part of the pool that is kept for validation.
        patience: Epochs without a better validation bound before the rate cools down.
        max_epochs: Most passes over the pool.

    Example:
        >>> Pool(1_000).batch_size is None
        True
    """

    num_simulations: int = 10_000
    batch_size: int | None = None
    learning_rate: Rates = None
    redraw_outcomes: bool = True
    validation_fraction: float = 0.1
    patience: int = 20
    max_epochs: int = 1_000

    def __post_init__(self) -> None:
        check_count(self.num_simulations, "num_simulations", 20)
        if self.batch_size is not None:
            check_count(self.batch_size, "batch_size", 2)
        rates_of(self, 1.0)
        check_share(self.validation_fraction, "validation_fraction")
        check_count(self.patience, "patience")
        check_count(self.max_epochs, "max_epochs")


Training = Fresh | Pool


def rates_of(training: Training, default: float) -> tuple[float, ...]:
    """Return the learning rates to try, at least one."""
    given = default if training.learning_rate is None else training.learning_rate
    rates = tuple(given) if isinstance(given, Sequence) else (given,)
    if not rates:
        raise ValueError("learning_rate: expected a positive number or several, got none.")
    return tuple(float(check_positive(rate, "learning_rate")) for rate in rates)


def check_training(training: object, *, kinds: tuple[type, ...] = (Fresh, Pool), searches: bool = False) -> None:
    """Raise where `training` cannot be used, or sets a rate for designs where none is searched for."""
    if training is not None and not isinstance(training, kinds):
        expected = " or ".join(f"{kind.__name__}(...)" for kind in kinds)
        raise TypeError(f"training: expected {expected}, got {training!r}.")
    if isinstance(training, Fresh) and training.design_learning_rate is not None and not searches:
        raise ValueError("training: no design is searched for here, so leave out design_learning_rate.")

r"""Which estimator is best for a model? All of them, at equal budgets of simulated experiments, several times each.

An estimate errs in two ways: by its bias, which its standard error does not know of, and by chance. Repeats with other
seeds (of simulation and of training) show the second; where the exact value is known, the mean over repeats shows the
first. The currency is the number of simulated experiments, since simulators are what costs; `budgets` says what each
estimator makes of them.

References:
    Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), section 4.1, for the comparison at equal budgets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from pyro_voed.checks import Labels, check_callable, check_count
from pyro_voed.compare.budgets import SMALLEST_BUDGET, EstimatorAtBudget
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.results import Bound, EIGResult


@dataclass(frozen=True)
class ComparisonRow:
    """One estimator at one budget; numbers are nan where it gave no estimate, and `failure` says why.

    Attributes:
        estimator: Its name in the comparison.
        budget: Simulated experiments it was allowed.
        eig: Mean of the estimates over the repeats, nats.
        standard_error: What one run says of its own error: root mean square over the repeats, nats.
        bound: Which way it errs.
        spread: Standard deviation of the estimates over the repeats, nats; nan for one repeat.
        num_simulations: Simulated experiments that it took on average, checks of the model included.
        seconds, processor_seconds: Wall and processor time of one run on average.
        error: `eig` less the exact value, nats; None where that was not given.
        estimates: Estimate of each repeat, nats.
    """

    estimator: str
    budget: int
    eig: float = math.nan
    standard_error: float = math.nan
    bound: Bound | None = None
    spread: float = math.nan
    num_simulations: float = math.nan
    seconds: float = math.nan
    processor_seconds: float = math.nan
    error: float | None = None
    estimates: tuple[float, ...] = ()
    failure: str | None = None

    @property
    def mean_standard_error(self) -> float:
        """Standard error of `eig`, nats: from the spread where there are repeats, else that of the one run."""
        num = len(self.estimates)
        return self.spread / math.sqrt(num) if num > 1 else self.standard_error

    def __str__(self) -> str:
        start = f"{self.estimator:<20}{self.budget:>9,}"
        if self.failure is not None:
            return f"{start}  {self.failure}"
        error = "-" if self.error is None else f"{self.error:+.4f}"
        spread = "-" if math.isnan(self.spread) else f"{self.spread:.4f}"
        start += f"{self.eig:>10.4f}{self.standard_error:>9.4f}{spread:>9}{error:>10}{self.num_simulations:>11,.0f}"
        return f"{start}{self.seconds:>9.2f}{self.processor_seconds:>9.2f}  {self.bound}"


@dataclass(frozen=True)
class Comparison:
    """What `compare_estimators` found, a row for each estimator and budget, in the order given."""

    rows: tuple[ComparisonRow, ...]
    num_repeats: int
    exact: float | None = None

    def to_data_frame(self) -> Any:
        """Return the rows as a pandas data frame; `estimates` is a column of tuples."""
        import pandas as pd

        return pd.DataFrame([asdict(row) | {"mean_standard_error": row.mean_standard_error} for row in self.rows])

    def curve(self, estimator: str) -> tuple[list[float], list[float], list[float]]:
        """Return simulator calls, error (estimate where no exact value is known) and its standard error by budget."""
        own = [row for row in self.rows if row.estimator == estimator]
        if not own:
            raise ValueError(f"estimator: expected one of {self.estimators}, got {estimator!r}.")
        points = sorted(
            (row.num_simulations, row.eig if row.error is None else row.error, row.mean_standard_error)
            for row in own
            if row.failure is None
        )
        calls, values, errors = ([point[k] for point in points] for k in range(3))
        return calls, values, errors

    @property
    def estimators(self) -> list[str]:
        """Names of the estimators, in the order given."""
        return list(dict.fromkeys(row.estimator for row in self.rows))

    def __str__(self) -> str:
        head = f"{'estimator':<20}{'budget':>9}{'EIG':>10}{'se':>9}{'spread':>9}{'error':>10}"
        head += f"{'calls':>11}{'wall s':>9}{'CPU s':>9}  side"
        known = "" if self.exact is None else f"; exact value {self.exact:.4f}"
        title = f"nats; mean of {self.num_repeats} repeats, se of one run, spread over repeats{known}"
        return "\n".join([title, head, *(str(row) for row in self.rows)])


def compare_estimators(
    model: Callable[..., Any] | Experiment,
    estimators: Mapping[str, EstimatorAtBudget],
    budgets: int | Sequence[int],
    repeats: int = 1,
    *,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    exact: float | None = None,
    seed: int | None = None,
    on_row: Callable[[ComparisonRow], None] = lambda row: None,
) -> Comparison:
    """Run estimators of the expected information gain at equal budgets, each several times.

    An estimator that refuses the model (NotImplementedError) or whose terms are not finite (ArithmeticError) gets a
    row that says so; any other error ends the comparison.

    Args:
        model: A Pyro program of one experiment, or an `Experiment`, compared at its stored or initial design.
        estimators: Estimators at a budget by the name they are shown under; `ESTIMATORS` holds the library's.
        budgets: Simulated experiments, at least 100 each.
        repeats: Runs of each, with other seeds. Equal repeats of different estimators share their seed.
        exact: Exact value in nats, where it is known.
        on_row: Called with every row as soon as it is complete, for example `print`.
        observation_labels, target_labels, seed: As in `eig_flow`.

    Returns:
        The rows, which `to_data_frame`, `print` and `plot_comparison` show.

    Example:
        >>> from pyro_voed.compare.budgets import ESTIMATORS
        >>> from pyro_voed.problems.finite import finite
        >>> nmc = {"nmc": ESTIMATORS["nmc_low"]}
        >>> found = compare_estimators(finite(), nmc, [100, 200], observation_labels="y", seed=0)
        >>> [(row.estimator, row.budget, row.bound) for row in found.rows]
        [('nmc', 100, 'upper'), ('nmc', 200, 'upper')]
    """
    if not isinstance(model, Experiment):
        check_callable(model)
    sizes = _checked(estimators, budgets, repeats, exact)
    with isolated(seed):
        seeds = torch.randint(2**31 - 1, (len(sizes), repeats)).tolist()
    rows = []
    for name, estimator in estimators.items():
        call = partial(estimator, model, observation_labels, target_labels)
        for budget, own in zip(sizes, seeds, strict=True):
            rows.append(_row(name, call, budget, own, exact))
            on_row(rows[-1])
    return Comparison(tuple(rows), repeats, exact)


def _checked(
    estimators: Mapping[str, EstimatorAtBudget], budgets: int | Sequence[int], repeats: int, exact: float | None
) -> list[int]:
    if not isinstance(estimators, Mapping) or not estimators:
        raise ValueError(f"estimators: expected a mapping from names to callables, with one at least, got {estimators}")
    for name, estimator in estimators.items():
        if not callable(estimator):
            raise TypeError(f"estimators: {name!r} is a {type(estimator).__name__}, which cannot be called.")
    sizes = [budgets] if isinstance(budgets, int) else list(budgets)
    if not sizes:
        raise ValueError("budgets: expected one at least.")
    for budget in sizes:
        check_count(budget, "budgets", SMALLEST_BUDGET)
    check_count(repeats, "repeats")
    if exact is not None and not math.isfinite(exact):
        raise ValueError(f"exact: expected a finite number of nats, got {exact!r}.")
    return sizes


def _row(
    name: str, call: Callable[..., EIGResult], budget: int, seeds: list[int], exact: float | None
) -> ComparisonRow:
    results, wall, processor = [], [], []
    for seed in seeds:
        started = time.perf_counter(), time.process_time()
        try:
            # A caller's own estimator may draw from the global streams or leave parameters behind.
            with isolated(seed):
                result = call(budget=budget, seed=seed)
        except (NotImplementedError, ArithmeticError) as error:
            return ComparisonRow(name, budget, failure=f"{type(error).__name__}: {error}")
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
        results.append(_checked_result(name, result))
    estimates = torch.tensor([result.eig.item() for result in results], dtype=torch.double)
    errors = torch.tensor([result.standard_error.item() for result in results], dtype=torch.double)
    eig = estimates.mean().item()
    num = len(results)
    return ComparisonRow(
        estimator=name,
        budget=budget,
        eig=eig,
        standard_error=errors.square().mean().sqrt().item(),
        bound=results[0].bound,
        spread=estimates.std().item() if num > 1 else math.nan,
        num_simulations=sum(result.num_simulations for result in results) / num,
        seconds=sum(wall) / num,
        processor_seconds=sum(processor) / num,
        error=None if exact is None else eig - exact,
        estimates=tuple(estimates.tolist()),
    )


def _checked_result(name: str, result: EIGResult) -> EIGResult:
    if not isinstance(result, EIGResult):
        raise TypeError(f"estimators: {name!r} returned a {type(result).__name__}, not an EIGResult.")
    if result.eig.numel() != 1:
        raise ValueError(
            f"estimators: {name!r} returned estimates of shape {tuple(result.eig.shape)}. Compare at one design."
        )
    return result

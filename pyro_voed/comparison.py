r"""Which estimator is best for a model? All of them, at equal budgets of simulated experiments, several times each.

An estimate errs in two ways: by its bias, which its standard error does not know of, and by chance. Repeats with other
seeds (of simulation and of training) show the second; where the exact value is known, the mean over repeats shows the
first. The currency is the number of simulated experiments, since simulators are what costs.

An *estimator at a budget* is any callable

    (model, observation_labels, target_labels, *, budget, seed, model_args, model_kwargs) -> EIGResult

and `at_budget` makes one of an `eig_*` function and a rule that turns a budget B into its sizes. The ready ones:

=============================== ====================================================================================
`flow_at_budget`                0.8 B to train the default flow, the rest to evaluate it
`gaussian_flow_at_budget`       the same with a Gaussian whose mean and covariance are functions of the outcome
`marginal_at_budget`            0.8 B to train the outcome's density, the rest to evaluate it
`marginal_likelihood_at_budget` 0.8 B to train two densities of the outcome, the rest to evaluate them
`critic_at_budget`              0.8 B to train an InfoNCE critic, the rest to evaluate it
`ace_at_budget`, `vnmc_...`     0.5 B to train the default flow as proposal, the rest for outer and inner draws
`nmc_low_at_budget`             M about B^(1/3) inner draws for each outer one: N (M + 1) = B
`nmc_high_at_budget`            M about B^(1/2), for less bias and more variance
`nmc_reused_at_budget`, `pce_`  N = B outer draws that serve as inner draws too: B^2 densities
`lbkld_at_budget`               three experiments at each of B / 3 draws of the targets
`laplace_at_budget`             at most 74 runs (Newton steps, halved where needed) for each of B / 74 draws
=============================== ====================================================================================

References:
    Rainforth, Cornish, Yang, Warrington and Wood (2018), "On nesting Monte Carlo estimators", for the cube root. Dong,
    Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), section 4.1, for the comparison at equal budgets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from pyro_voed.caller_state import isolated
from pyro_voed.checks import Labels, check_callable, check_count
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.estimators import (
    eig_ace,
    eig_flow,
    eig_laplace,
    eig_marginal,
    eig_marginal_likelihood,
    eig_nmc,
    eig_pce,
    eig_vnmc,
)
from pyro_voed.estimators.critic import eig_critic
from pyro_voed.estimators.lbkld import eig_lbkld
from pyro_voed.results import Bound, EIGResult

SMALLEST_BUDGET = 100
NEWTON_STEPS = 10


EstimatorAtBudget = Callable[..., EIGResult]
"""What `compare_estimators` calls; the arguments are those at the head of this file."""


@dataclass(frozen=True)
class ComparisonRow:
    """One estimator at one budget.

    Attributes:
        estimator: Its name in the comparison.
        budget: Simulated experiments it was allowed.
        eig: Mean of the estimates over the repeats, nats; nan where there is none.
        standard_error: What one run says of its own error: root mean square over the repeats, nats.
        bound: Which way it errs.
        spread: Standard deviation of the estimates over the repeats, nats; nan for one repeat.
        num_simulations: Simulated experiments that it took on average, checks of the model included.
        seconds: Wall time of one run on average.
        processor_seconds: Processor time of one run on average, which other programs on the machine do not lengthen.
        error: `eig` less the exact value, nats; None where that was not given.
        estimates: Estimate of each repeat, nats.
        failure: Why it gave no estimate, if so.
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
    """What `compare_estimators` found, a row for each estimator and budget, in the order given.

    Attributes:
        rows: The rows.
        num_repeats: Runs asked for of each.
        exact: Exact value in nats, where it was given.
    """

    rows: tuple[ComparisonRow, ...]
    num_repeats: int
    exact: float | None = None

    def to_data_frame(self) -> Any:
        """Return the rows as a pandas data frame; `estimates` is a column of tuples."""
        import pandas as pd

        return pd.DataFrame([asdict(row) | {"mean_standard_error": row.mean_standard_error} for row in self.rows])

    def curve(self, estimator: str) -> tuple[list[float], list[float], list[float]]:
        """Return simulator calls, error (estimate where no exact value is known) and its standard error by budget.

        Args:
            estimator: A name in the comparison.

        Raises:
            ValueError: If there is no such estimator.
        """
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
    model: Callable[..., Any],
    estimators: Mapping[str, EstimatorAtBudget],
    budgets: int | Sequence[int],
    repeats: int = 1,
    *,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    exact: float | None = None,
    seed: int | None = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    on_row: Callable[[ComparisonRow], None] = lambda row: None,
) -> Comparison:
    """Run estimators of the expected information gain at equal budgets, each several times.

    An estimator that refuses the model (NotImplementedError) or whose terms are not finite (ArithmeticError) gets a
    row that says so; any other error ends the comparison.

    Args:
        model: A Pyro program of one experiment, compared at its stored or initial design.
        estimators: Estimators at a budget by the name they are shown under; `ESTIMATORS` holds the library's.
        budgets: Simulated experiments, at least 100 each.
        repeats: Runs of each, with other seeds. Equal repeats of different estimators share their seed.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about; default: all other latent sites.
        exact: Exact value in nats, where it is known.
        seed: Seed of the whole comparison; None draws one from the global generator.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        on_row: Called with every row as soon as it is complete, for example `print`.

    Returns:
        The rows, which `to_data_frame`, `print` and `plot_comparison` show.

    Raises:
        ValueError: If there are no estimators or budgets, a budget or the exact value is out of range, labels are
            wrong, or an estimator returns several designs.
        TypeError: If an estimator cannot be called or returns no `EIGResult`.

    Example:
        >>> from pyro_voed.problems import linear_gaussian as lg
        >>> comparison = compare_estimators(
        ...     lg.linear_gaussian(),
        ...     {name: ESTIMATORS[name] for name in ("nmc_low", "nmc_high")},
        ...     budgets=[1_000, 10_000],
        ...     repeats=3,
        ...     observation_labels="y",
        ...     exact=lg.DEFAULT_EIG,
        ...     seed=0,
        ... )
        >>> comparison.to_data_frame()[["estimator", "budget", "bound"]]
          estimator  budget  bound
        0   nmc_low    1000  upper
        1   nmc_low   10000  upper
        2  nmc_high    1000  upper
        3  nmc_high   10000  upper
    """
    check_callable(model)
    sizes = _checked(estimators, budgets, repeats, exact)
    with isolated(seed):
        seeds = torch.randint(2**31 - 1, (len(sizes), repeats)).tolist()
    rows = []
    for name, estimator in estimators.items():
        call = partial(
            estimator, model, observation_labels, target_labels, model_args=model_args, model_kwargs=model_kwargs
        )
        for budget, own in zip(sizes, seeds, strict=True):
            rows.append(_row(name, call, budget, own, exact))
            on_row(rows[-1])
    return Comparison(tuple(rows), repeats, exact)


def at_budget(estimate: Callable[..., EIGResult], sizes: Callable[[int], Mapping[str, Any]]) -> EstimatorAtBudget:
    """Make an estimator at a budget of an `eig_*` function.

    Args:
        estimate: An `eig_*` function, some of its arguments perhaps fixed by `functools.partial`.
        sizes: Turns a budget into keyword arguments of it (`pooled`, `nested_low`, ...).

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> small = partial(AffineCouplingFlow, num_transforms=1, hidden_dim=16)
        >>> mine = at_budget(partial(eig_flow, density=small), pooled)
        >>> mine(linear_gaussian(), "y", budget=1_000, seed=0).bound
        'lower'
    """

    def run(
        model: Callable[..., Any],
        observation_labels: Labels = None,
        target_labels: Labels = None,
        *,
        budget: int,
        seed: int | None = None,
        model_args: Sequence[Any] = (),
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> EIGResult:
        check_count(budget, "budget", SMALLEST_BUDGET)
        given = {"seed": seed, "model_args": model_args, "model_kwargs": model_kwargs}
        return estimate(model, observation_labels, target_labels, **given, **sizes(budget))

    return run


def pooled(budget: int) -> dict[str, Any]:
    """Return sizes of an estimator that learns from a pool: four fifths to learn, the rest to evaluate.

    Example:
        >>> pooled(10_000)
        {'num_simulations': 8000, 'num_samples': 2000, 'batch_size': 256, 'progress': False}
    """
    pool = round(0.8 * budget)
    # A hundred steps for each pass over a large pool are enough, and larger batches are cheaper by the row.
    batch_size = min(1_024, max(256, pool // 100))
    return {"num_simulations": pool, "num_samples": budget - pool, "batch_size": batch_size, "progress": False}


def with_proposal(budget: int) -> dict[str, Any]:
    """Return sizes of an estimator with a learned proposal: one half to learn it, the rest for outer and inner draws.

    Example:
        >>> with_proposal(10_000)["num_inner_samples"]
        8
    """
    pool = budget // 2
    # With a good proposal few inner draws do, and the variance is that of the outer ones.
    num_inner = max(2, round((budget - pool) ** 0.25))
    # A tenth of the inner draws come from the prior, and cost a run to draw as well as one to score.
    outer = max(2, round((budget - pool) / (1 + 1.1 * num_inner)))
    sizes = pooled(budget) | {"num_simulations": pool, "num_samples": outer}
    return sizes | {"num_inner_samples": num_inner}


def nested_low(budget: int) -> dict[str, Any]:
    """Return sizes of nested Monte Carlo with few inner draws, the cube root of the budget.

    So bias and standard error fall at the same rate, which is the best one as the budget grows.

    Example:
        >>> nested_low(1_000)
        {'num_outer_samples': 91, 'num_inner_samples': 10}
    """
    return _nested(budget, round(budget ** (1 / 3)))


def nested_high(budget: int) -> dict[str, Any]:
    """Return sizes of nested Monte Carlo with many inner draws, the square root of the budget.

    Example:
        >>> nested_high(10_000)
        {'num_outer_samples': 99, 'num_inner_samples': 100}
    """
    return _nested(budget, round(budget**0.5))


def reused(budget: int) -> dict[str, Any]:
    """Return sizes of nested Monte Carlo whose outer draws serve as inner ones too.

    Example:
        >>> reused(1_000)
        {'num_outer_samples': 1000, 'num_inner_samples': None}
    """
    return {"num_outer_samples": budget, "num_inner_samples": None}


def repeated(budget: int) -> dict[str, Any]:
    """Return sizes of the nearest-neighbour bound: three experiments at each draw of the targets.

    Example:
        >>> repeated(9_000)
        {'num_samples': 3000}
    """
    # The estimator takes no fewer than 1,000 draws, so that budgets below 3,000 are exceeded.
    return {"num_samples": max(1_000, budget // 3)}


def newton(budget: int) -> dict[str, Any]:
    """Return sizes of the Laplace approximation: a run to draw and one for every density at a draw.

    A step takes up to seven runs, for it is halved until the density does not fall; where steps are short of that, as
    for posteriors near to Gaussian, far less than the budget is spent.

    Example:
        >>> newton(7_400)
        {'num_newton_steps': 10, 'num_samples': 100}
    """
    return {"num_newton_steps": NEWTON_STEPS, "num_samples": max(4, budget // (7 * NEWTON_STEPS + 4))}


flow_at_budget = at_budget(eig_flow, pooled)
gaussian_flow_at_budget = at_budget(partial(eig_flow, density=partial(AffineCouplingFlow, num_transforms=0)), pooled)
marginal_at_budget = at_budget(eig_marginal, pooled)
marginal_likelihood_at_budget = at_budget(eig_marginal_likelihood, pooled)
critic_at_budget = at_budget(eig_critic, pooled)
ace_at_budget = at_budget(eig_ace, with_proposal)
vnmc_at_budget = at_budget(eig_vnmc, with_proposal)
nmc_low_at_budget = at_budget(eig_nmc, nested_low)
nmc_high_at_budget = at_budget(eig_nmc, nested_high)
nmc_reused_at_budget = at_budget(eig_nmc, reused)
pce_at_budget = at_budget(eig_pce, reused)
lbkld_at_budget = at_budget(eig_lbkld, repeated)
laplace_at_budget = at_budget(eig_laplace, newton)

ESTIMATORS: Mapping[str, EstimatorAtBudget] = {
    "flow": flow_at_budget,
    "gaussian_flow": gaussian_flow_at_budget,
    "critic": critic_at_budget,
    "lbkld": lbkld_at_budget,
    "pce": pce_at_budget,
    "ace": ace_at_budget,
    "vnmc": vnmc_at_budget,
    "marginal": marginal_at_budget,
    "nmc_low": nmc_low_at_budget,
    "nmc_high": nmc_high_at_budget,
    "nmc_reused": nmc_reused_at_budget,
    "marginal_likelihood": marginal_likelihood_at_budget,
    "laplace": laplace_at_budget,
}
"""The library's estimators at a budget: lower bounds, then upper ones, then those of no guaranteed side."""


def plot_comparison(comparison: Comparison, ax: Any = None) -> Any:
    """Draw the error of each estimator against its simulator calls, or its estimate where no exact value is known.

    Bars are two standard errors of the mean over repeats (of the one run, without repeats) either way; estimators
    without an estimate are left out.

    Args:
        comparison: What `compare_estimators` returned.
        ax: Matplotlib axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If no estimator gave an estimate.

    Example:
        >>> row = ComparisonRow("flow", 1_000, 1.1, 0.02, "lower", num_simulations=1e3, error=-0.1)
        >>> plot_comparison(Comparison((row,), 1, exact=1.2)).get_xlabel()
        'simulated experiments'
    """
    import matplotlib.pyplot as plt

    curves = {name: comparison.curve(name) for name in comparison.estimators}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        raise ValueError("comparison: no estimator gave an estimate, so there is nothing to draw.")
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    markers = "osD^v<>PX*hpd"
    for number, (name, (calls, values, errors)) in enumerate(curves.items()):
        # Markers tell apart what colours, which come round again after ten, do not.
        ax.errorbar(
            calls, values, [2 * error for error in errors], label=name, capsize=3, markersize=5, linewidth=1.2,
            color=f"C{number % 10}", marker=markers[number % len(markers)],
        )  # fmt: skip
    if comparison.exact is not None:
        ax.axhline(0.0, color="0.3", linewidth=1)
    ax.set(
        xscale="log",
        xlabel="simulated experiments",
        ylabel="expected information gain (nats)" if comparison.exact is None else "estimate less exact value (nats)",
    )
    ax.legend(frameon=False, fontsize="small", title="bars: ±2 standard errors", title_fontsize="small")
    return ax


def _nested(budget: int, num_inner: int) -> dict[str, Any]:
    return {"num_outer_samples": max(2, round(budget / (num_inner + 1))), "num_inner_samples": num_inner}


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

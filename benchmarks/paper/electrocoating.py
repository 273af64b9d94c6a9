"""Case 3 of the paper: at which current should a coating bath be run? Bounds from both sides, an expensive simulator.

The problem is `pyro_voed.problems.electrocoating`, a stand-in in all its constants. Every simulation solves a partial
differential equation, so simulations are made once, kept, and shared by all estimators (`electrocoating_pools`):
for each candidate current one pool to train on, one to evaluate on. Parts, and what they stand for in Dong, Jacobsen,
Khalloufi, Akram, Liu, Duraisamy and Huan (2025):

* `convergence`: both bounds while they are trained, from two sizes of pool, at 50 mA with 10 and with 50 measurements,
  beside re-used nested Monte Carlo (Figures 8 and 10);
* `once`: what becomes of them where each simulation keeps the one outcome it was made with, as in the paper;
* `outcomes`: marginals of the learned density of 10 measurements beside simulated ones (Figure 9);
* `candidates`: three currents by a Gaussian, a flow, a flow with an LSTM summary and re-used nested Monte Carlo
  (Figure 11), with 50 measurements and with 10, which the paper does not show;
* `posteriors`: flows with and without LSTM beside sequential Monte Carlo at one outcome (Figures 12 and 15);
* `no_limit`: without the rectifier's limit the measured current tells nothing (a check of ours).

    python benchmarks/paper/electrocoating.py [--quick] [--only PART ...] [--figures DIR]
"""

from __future__ import annotations

from typing import Any

import electrocoating_pools as pools
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from study import Study, table
from torch import Tensor

from pyro_voed.plots import plot_posterior_pair
from pyro_voed.problems.electrocoating import CURRENTS, RELATIVE_NOISE, TOTAL_CHARGE, simulate

CURRENT = 50.0
METHODS = {"gaussian": "Gaussian", "flow": "flow", "lstm": "flow, LSTM", "marginal": "marginal"}
COLOURS = {"gaussian": "#E69F00", "flow": "#0072B2", "lstm": "#009E73", "marginal": "#D55E00", "reference": "0.1"}
UNITS = ("$C_v$, mm$^3$/C", "$j_{min}$, A/m$^2$", "$Q_{min}$, C/m$^2$")
#: Targets behind the outcome whose posterior is shown.
TRUE_TARGETS = (45.0, 1.8, 115.0)


class Case:
    """The kept simulations and what is computed from them, each once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.sizes = (study.size(1_000, 100), study.size(10_000, 200))
        self.largest = study.size(50_000, 300)
        self.batches = {self.sizes[0]: study.size(128, 50), self.sizes[1]: study.size(512, 90)}
        self.batches[self.largest] = study.size(512, 150)
        self.num_evaluated = study.size(20_000, 300)
        self._pools: dict[str, dict[str, Tensor]] = {}

    def pool(self, current: float, *, held_out: bool = False, largest: bool = False) -> dict[str, Tensor]:
        """Return simulations to train on, or the largest pool of them, or those to evaluate on."""
        size, word = (self.num_evaluated, "evaluation") if held_out else (self.sizes[1], "training")
        name, seed = f"pool_{word}_{current:g}", 2 * round(current) + held_out
        if largest:
            size, name, seed = self.largest, f"pool_largest_{current:g}", 2 * round(current) + 1_000
        if name not in self._pools:
            self._pools[name] = self.study.part(name, pools.simulate_pool, current=current, size=size, seed=seed)
        return self._pools[name]

    def reference(self, current: float, num_times: int) -> dict[str, Tensor]:
        """Return the terms of re-used nested Monte Carlo, of both sides and in the middle."""
        held_out = self.pool(current, held_out=True)

        def compute(current: float, num_times: int, size: int) -> dict[str, Tensor]:
            return pools.reference(held_out, num_times)

        sides = self.study.part(
            f"reference_{current:g}_{num_times}",
            compute,
            current=current,
            num_times=num_times,
            size=self.num_evaluated,
        )
        return {**sides, "middle": 0.5 * (sides["upper"] + sides["lower"])}

    def trained(
        self, method: str, num_times: int, size: int, *, current: float = CURRENT, redraw: bool = True
    ) -> dict[str, Any]:
        """Return a finished training; see `electrocoating_pools.train`."""
        kept = self.pool(current, largest=size == self.largest)
        held_out = self.pool(current, held_out=True)

        def compute(current: float, num_evaluated: int, **settings: Any) -> dict[str, Any]:
            return pools.train(kept, held_out, **settings)

        return self.study.part(
            f"{method}_{current:g}_{num_times}_{size}" + ("" if redraw else "_once"),
            compute,
            current=current,
            num_evaluated=self.num_evaluated,
            method=method,
            num_times=num_times,
            size=size,
            batch_size=self.batches[size],
            max_epochs=self.study.size(1_000, 2),
            redraw=redraw,
            seed=0,
        )

    def density(self, method: str, num_times: int, size: int) -> Any:
        """Return a trained density at 50 mA."""
        weights = self.trained(method, num_times, size)["weights"]
        return pools.trained_density(weights, method, self.pool(CURRENT), num_times)


def estimate(terms: Tensor) -> str:
    """Return mean and standard error of terms."""
    return f"{terms.mean():.3f} ± {terms.std() / len(terms) ** 0.5:.3f}"


def difference(terms: Tensor, reference: Tensor) -> str:
    """Return the mean difference and its standard error, on the same experiments."""
    apart = terms.double() - reference
    return f"{apart.mean():+.3f} ± {apart.std() / len(apart) ** 0.5:.3f}"


def bracket(reference: dict[str, Tensor]) -> str:
    """Return re-used nested Monte Carlo from below and above."""
    return f"{reference['lower'].mean():.3f} to {reference['upper'].mean():.3f}"


def convergence(case: Case) -> None:
    """Follow both bounds in training (Figures 8 and 10)."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    rows = []
    for ax, (num_times, lower) in zip(panels, ((10, "flow"), (50, "lstm")), strict=True):
        reference = case.reference(CURRENT, num_times)
        ends, middle = (reference["lower"].mean(), reference["upper"].mean()), reference["middle"].mean()
        ax.axhspan(*ends, color="0.1", alpha=0.35, lw=0, label="re-used nested MC")
        for method in (lower, "marginal"):
            rows += [[str(num_times), *_follow(ax, case, method, num_times, size)] for size in case.sizes]
        if num_times == 50:
            rows.append(["50", *_follow(ax, case, lower, 50, case.largest)])
        rows.append([str(num_times), "re-used nested Monte Carlo", bracket(reference), "", "", ""])
        ax.set(title=f"{num_times} measurements, {CURRENT:g} mA", xlabel="step", ylabel="bound (nats)")
        ax.set_ylim(middle - 1.2, middle + 1.2)
        ax.legend(fontsize="small", framealpha=0.9, edgecolor="none", loc="lower right")
    columns = ["measurements", "bound, pool", "nats", "to reference", "steps", "s"]
    table(f"Bounds at {CURRENT:g} mA (Figures 8 and 10)", columns, rows)
    case.study.save(figure, "convergence")


def _follow(ax: Axes, case: Case, method: str, num_times: int, size: int) -> list[str]:
    """Draw one training and return its cells of the table."""
    done, reference = case.trained(method, num_times, size), case.reference(CURRENT, num_times)["middle"]
    label = f"{'upper' if pools.is_upper(method) else 'lower'}, {METHODS[method]}, {size:,}"
    # What the watched experiments give differs from what all give by what the reference says of them.
    path = torch.tensor(done["followed"]) - reference[: pools.WATCHED].mean() + reference.mean()
    steps = torch.arange(len(path)) * done["steps"] / len(path)
    style = {case.sizes[0]: "--", case.sizes[1]: "-", case.largest: ":"}[size]
    ax.plot(steps, path, color=COLOURS[method], linestyle=style, linewidth=1.4, label=label)
    gap = difference(done["terms"], reference)
    return [label, estimate(done["terms"]), gap, f"{done['steps']:,}", f"{done['seconds']:.0f}"]


def once(case: Case) -> None:
    """Keep the one outcome that each simulation was made with, as the paper does."""
    rows = []
    for method, num_times in (("flow", 10), ("marginal", 10), ("lstm", 50)):
        reference = case.reference(CURRENT, num_times)["middle"]
        for size in case.sizes:
            runs = [case.trained(method, num_times, size, redraw=redraw) for redraw in (False, True)]
            gaps = [difference(run["terms"], reference) for run in runs]
            rows.append([str(num_times), f"{METHODS[method]}, {size:,}", *gaps])
    columns = ["measurements", "density, pool", "outcomes drawn once", "drawn anew every pass"]
    table(f"Bounds at {CURRENT:g} mA, to the reference", columns, rows)


def outcomes(case: Case) -> None:
    """Compare marginals of the learned density with simulated ones (Figure 9)."""
    drawn = [pools.draw_outcomes(case.density("marginal", 10, size), case.num_evaluated) for size in case.sizes]
    simulated = pools.evaluation(case.pool(CURRENT, held_out=True), 10).y
    figure, panels = plt.subplots(2, 5, figsize=(11, 4.2), layout="constrained")
    for index, ax in enumerate(panels.flat):
        _marginal(ax, simulated[:, index], [draws[:, index] for draws in drawn], case.sizes)
        ax.set_title(f"$t$ = {TOTAL_CHARGE / (1e-3 * CURRENT) * (index + 1) / 10:.0f} s", fontsize="medium")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    figure.supxlabel("current, mA")
    rows = []
    for size, draws in zip(case.sizes, drawn, strict=True):
        apart = [_kolmogorov(draws[:, index], simulated[:, index]) for index in range(10)]
        shift = ((draws.mean(0) - simulated.mean(0)) / simulated.std(0)).abs().max()
        scale = (draws.std(0) / simulated.std(0) - 1.0).abs().max()
        correlation = (torch.corrcoef(draws.T) - torch.corrcoef(simulated.T)).abs().max()
        numbers = (max(apart), shift, scale, correlation)
        rows.append([f"{size:,}", *(f"{number:.3f}" for number in numbers)])
    columns = ["pool", "largest Kolmogorov distance", "of means, sd", "of sd, relative", "of correlations"]
    table("q(y) beside simulations, 10 measurements: largest differences (Figure 9)", columns, rows)
    case.study.save(figure, "outcomes")


def _marginal(ax: Axes, simulated: Tensor, drawn: list[Tensor], sizes: tuple[int, ...]) -> None:
    edges = torch.linspace(*torch.quantile(simulated, torch.tensor([0.0005, 0.9995])).tolist(), 41)
    ax.hist(simulated, edges, density=True, color="0.8", label="simulated")
    for draws, size, style in zip(drawn, sizes, ("--", "-"), strict=True):
        density = torch.histogram(draws, edges)[0] / (len(draws) * (edges[1] - edges[0]))
        centres = 0.5 * (edges[1:] + edges[:-1])
        ax.plot(centres, density, color=COLOURS["marginal"], linestyle=style, linewidth=1.2, label=f"q(y), {size:,}")
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=4)


def _kolmogorov(first: Tensor, second: Tensor) -> float:
    both = torch.cat([first, second]).sort().values
    shares = [torch.searchsorted(draws.sort().values, both, right=True) / len(draws) for draws in (first, second)]
    return (shares[0] - shares[1]).abs().max().item()


def candidates(case: Case) -> None:
    """Estimate the information of the three currents (Figure 11)."""
    sizes = case.sizes[: case.study.size(2, 1)]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = [(method, size) for method in ("gaussian", "flow", "lstm") for size in sizes]
    for ax, num_times in zip(panels, (10, 50), strict=True):
        _compare(ax, case, num_times, lines)
    case.study.save(figure, "candidates")


def _compare(ax: Axes, case: Case, num_times: int, lines: list[tuple[str, int]]) -> None:
    """Draw the estimates of some methods and pools for all candidates, and print their table."""
    references = [case.reference(current, num_times) for current in CURRENTS]
    rows = []
    for method, size in lines:
        done = [case.trained(method, num_times, size, current=current)["terms"] for current in CURRENTS]
        apart = [difference(own, reference["middle"]) for own, reference in zip(done, references, strict=True)]
        means, label = [own.mean().item() for own in done], f"{METHODS[method]}, {size:,}"
        cells = [f"{mean:.3f} ({gap})" for mean, gap in zip(means, apart, strict=True)]
        rows.append([label, *cells, _ranking(means)])
        style = "--" if size == case.sizes[0] else "-"
        ax.plot(range(3), means, linestyle=style, color=COLOURS[method], marker="o", markersize=4, label=label)
    middles = [reference["middle"].mean().item() for reference in references]
    ax.plot(range(3), middles, ":", color=COLOURS["reference"], marker="_", markersize=14, label="re-used nested MC")
    ax.set_xticks(range(3), [f"{current:g} mA" for current in CURRENTS])
    ax.set(title=f"{num_times} measurements", ylabel="expected information gain (nats)")
    ax.legend(fontsize="small", frameon=False, loc="lower right")
    rows.append(["re-used nested Monte Carlo", *map(bracket, references), _ranking(middles)])
    columns = ["estimator, pool", *(f"{current:g} mA" for current in CURRENTS), "ranking, mA"]
    table(f"Candidates, {num_times} measurements (Figure 11), nats (to the reference)", columns, rows)


def _ranking(values: list[float]) -> str:
    return " > ".join(f"{CURRENTS[index]:g}" for index in sorted(range(3), key=lambda index: -values[index]))


def posteriors(case: Case) -> None:
    """Compare flows with and without LSTM with sequential Monte Carlo at one outcome (Figures 12 and 15)."""
    torch.manual_seed(4)
    truth = torch.tensor(TRUE_TARGETS)
    mean = 1e3 * simulate(truth, torch.tensor(CURRENT), num_times=50).current
    y = mean * (1.0 + RELATIVE_NOISE * torch.randn(50))

    def compute(num_particles: int) -> dict[str, Any]:
        return pools.sequential_monte_carlo(CURRENT, y, num_particles, max_moves=case.study.size(100, 1))

    smc = case.study.part("smc", compute, num_particles=case.study.size(1_000, 50))
    draws, num_judged = smc["draws"], case.study.size(1_000, 100)
    rows = [["SMC", *_moments(draws), "", ""]]
    for size, word in zip(case.sizes, ("small", "large"), strict=True):
        sets = {"SMC": draws}
        for method in ("flow", "lstm"):
            own = sets[METHODS[method]] = pools.draw_posterior(case.density(method, 50, size), y, len(draws))
            gap = difference(case.trained(method, 50, size)["terms"], case.reference(CURRENT, 50)["middle"])
            rows.append(
                [f"{METHODS[method]}, {size:,}", *_moments(own), pools.accuracy_between(own, draws, num_judged), gap]
            )
        grid = plot_posterior_pair(sets, true_values=truth, column_names=UNITS)
        grid[0, 0].set_title(f"pool of {size:,}")
        case.study.save(grid[0, 0].figure, f"posteriors_{word}")
    runs = draws.chunk(2)
    rows.append(["SMC, one run against the other", "", "", "", pools.accuracy_between(*runs, num_judged), ""])
    columns = ["posterior, pool", *UNITS, "C2ST against SMC", "mean over outcomes, to the reference"]
    table("Posteriors at one outcome, 50 measurements (Figures 12 and 15): mean and sd", columns, rows)
    print(
        f"SMC: {smc['simulations']:,} solves, R-hat {smc['r_hat']:.3f}, {smc['effective']:.0f} effective draws; "
        f"simulated with {TRUE_TARGETS}"
    )


def _moments(draws: Tensor) -> list[str]:
    return [f"{mean:.3g} ± {spread:.2g}" for mean, spread in zip(draws.mean(0), draws.std(0), strict=True)]


def no_limit(case: Case) -> None:
    """Show that nothing is learned without the voltage limit."""
    size, num_samples = case.study.size(2_000, 100), case.study.size(5_000, 100)
    settings = {"current": CURRENT, "size": size, "num_samples": num_samples, **case.study.passes}
    results = case.study.part("without_limit", pools.without_limit, **settings)
    rows = [[name, f"{value:+.4f} ± {error:.4f}"] for name, (value, error) in results.items()]
    table(f"Without a voltage limit, {CURRENT:g} mA, 10 measurements; exact: 0", ["estimator", "nats"], rows)


PARTS = {
    "convergence": convergence,
    "once": once,
    "outcomes": outcomes,
    "candidates": candidates,
    "posteriors": posteriors,
    "no_limit": no_limit,
}


def main() -> None:
    """Run the chosen parts."""
    study = Study("electrocoating", __doc__.splitlines()[0], list(PARTS))
    case = Case(study)
    for name in study.chosen:
        PARTS[name](case)


if __name__ == "__main__":
    main()

"""Bare `eig_flow` on the models of `tests/suite`, whose exact values are known.

Each model is estimated by `eig_flow(model, observations, targets, seed=seed)` and nothing else. Printed are, for each
model, the exact value, the mean estimate and its standard error, the gap, why training stopped, and seconds; whether
every estimate is within max(0.03, 2 %) of the exact value, up to three of its standard errors, and whether one is above
by more than four, which a lower bound is not. The last line sums up. Run as

    python benchmarks/suite.py [--seeds 0 1 2] [--only name ...] [--family name ...] [--csv table.csv] [--processes 1]
        [--quick]
"""

import argparse
import csv
import math
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import pyro
import torch

from pyro_voed import Fresh, eig_flow

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.suite.catalogue import MODELS

SMALLEST_TOLERANCE, SHARE = 0.03, 0.02
QUICK = {"training": Fresh(num_steps=20), "num_samples": 200}


@dataclass(frozen=True)
class Run:
    """One estimate; without one, the type of the error and its first words."""

    name: str
    family: str
    seed: int
    exact: float
    exact_error: float
    eig: float
    standard_error: float
    stop: str
    steps: int
    seconds: float
    message: str = ""

    @property
    def error(self) -> float:
        """Standard error of the difference to the exact value."""
        return math.hypot(self.standard_error, self.exact_error)

    @property
    def within(self) -> bool:
        tolerance = max(SMALLEST_TOLERANCE, SHARE * self.exact)
        return math.isfinite(self.eig) and abs(self.eig - self.exact) <= tolerance + 3 * self.error

    @property
    def above(self) -> bool:
        # One hundred-thousandth of a nat is the rounding of single precision.
        return math.isfinite(self.eig) and self.eig - self.exact > 4 * self.error + 1e-5


def run(name, seed, quick):
    """Estimate one model with one seed; an error is part of the answer."""
    torch.set_num_threads(1)
    entry, started = MODELS[name], time.perf_counter()
    known = (name, entry.family, seed, entry.exact, entry.error)
    pyro.clear_param_store()
    options = QUICK if quick else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = eig_flow(
                entry.model, entry.observation_labels, entry.target_labels, seed=seed, progress=False, **options
            )
    # Whatever a model brings about is a row of the table.
    except Exception as error:
        words = " ".join(str(error).split())
        seconds = time.perf_counter() - started
        return Run(*known, math.nan, math.nan, type(error).__name__, 0, seconds, words)
    history = result.history
    stop, steps = ("not trained", 0) if history is None else (history.stop_reason, history.num_steps)
    numbers = (result.eig.item(), result.standard_error.item())
    return Run(*known, *numbers, stop, steps, time.perf_counter() - started)


def rows(names, seeds, quick, processes):
    """Yield the runs of each model as soon as all of them are there."""
    questions = [(name, seed, quick) for name in names for seed in seeds]
    found = {}
    if processes == 1:
        answers = (run(*question) for question in questions)
    else:
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
        answers = (future.result() for future in as_completed([pool.submit(run, *q) for q in questions]))
    for answer in answers:
        found.setdefault(answer.name, []).append(answer)
        if len(found[answer.name]) == len(seeds):
            yield sorted(found[answer.name], key=lambda one: one.seed)


def line_of(runs):
    """Return the line of one model."""
    first, done = runs[0], [one for one in runs if math.isfinite(one.eig)]
    seconds = statistics.mean(one.seconds for one in runs)
    stops = ", ".join(sorted({one.stop for one in runs}))
    if done:
        mean = statistics.mean(one.eig for one in done)
        error = math.sqrt(sum(one.standard_error**2 for one in done)) / len(done)
        numbers = f"{mean:>9.4f} {error:>7.4f} {first.exact - mean:>8.4f}"
    else:
        numbers = f"{'-':>9} {'-':>7} {'-':>8}"
    within = f"{sum(one.within for one in runs)}/{len(runs)}"
    marks = "  ABOVE" if any(one.above for one in runs) else ""
    words = "".join(f"\n    seed {one.seed}: {one.message[:220]}" for one in runs if one.message)
    return f"{first.name:<24} {first.exact:>9.4f} {numbers} {within:>7} {seconds:>7.1f}  {stops}{marks}{words}"


def summary_of(runs):
    """Return the last line."""
    within, above = sum(one.within for one in runs), sum(one.above for one in runs)
    failed = sum(not math.isfinite(one.eig) for one in runs)
    models = {one.name for one in runs}
    whole = sum(all(one.within for one in runs if one.name == name) for name in models)
    return (
        f"within max({SMALLEST_TOLERANCE}, {SHARE:.0%}) + 3 se: {within} of {len(runs)} runs "
        f"({within / len(runs):.1%}), {whole} of {len(models)} models at all seeds; above by 4 se: {above}; "
        f"errors: {failed}; median {statistics.median(one.seconds for one in runs):.1f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of models; default: all")
    parser.add_argument("--family", nargs="+", help="families of models; default: all")
    parser.add_argument("--csv", help="file for a row a run")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="twenty steps, to see that it runs")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - set(MODELS)
    if unknown:
        parser.error(f"--only: no models {sorted(unknown)}; there are {list(MODELS)}")
    names = [
        name
        for name, entry in MODELS.items()
        if name in (arguments.only or MODELS) and entry.family in (arguments.family or [entry.family])
    ]
    if not names:
        parser.error("no model is left")

    print(f"{'model':<24} {'exact':>9} {'mean':>9} {'error':>7} {'gap':>8} {'within':>7} {'seconds':>7}  stopped by")
    runs = []
    for own in rows(names, arguments.seeds, arguments.quick, arguments.processes):
        runs += own
        print(line_of(own), flush=True)
    print(summary_of(runs))
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*asdict(runs[0]), "within", "above"])
            writer.writeheader()
            writer.writerows({**asdict(one), "within": one.within, "above": one.above} for one in runs)


if __name__ == "__main__":
    main()

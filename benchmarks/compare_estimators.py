"""Every estimator at equal simulator budgets: on five problems of known answer, or on any importable model.

Run as

    python benchmarks/compare_estimators.py [--budgets 10000] [--repeats 3] [--csv table.csv]
    python benchmarks/compare_estimators.py --model package.module:factory --observations y [--exact 1.2]

where `factory()` returns the Pyro model. Rows appear on the error stream as they are done, then a table for each
problem; all rows are written as CSV where asked.
"""

import argparse
import importlib
import math
import sys
import warnings

import torch

from pyro_voed import compare_estimators
from pyro_voed.compare.budgets import ESTIMATORS
from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten, nonlinear

PROBLEMS = {
    # Name: model, target labels (None: all latent sites), exact value in nats. Outcomes are "y" in all of them.
    "linear_gaussian": (linear_gaussian.linear_gaussian(), None, linear_gaussian.DEFAULT_EIG),
    "finite": (finite.finite(), None, finite.DEFAULT_EIG),
    "michaelis_menten": (
        michaelis_menten.michaelis_menten(michaelis_menten.START_DESIGNS),
        None,
        michaelis_menten.START_EIG,
    ),
    "implicit_toy": (implicit_toy.implicit_toy(), "theta", implicit_toy.DEFAULT_EIG),
    "nonlinear": (nonlinear.nonlinear(0.5), None, nonlinear.exact_eig(torch.tensor(0.5)).item()),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="package.module:factory, instead of the five problems")
    parser.add_argument("--observations", nargs="+", help="outcome sites of --model")
    parser.add_argument("--targets", nargs="+", help="target sites of --model")
    parser.add_argument("--exact", type=float, help="exact value of --model in nats, where it is known")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS), metavar="NAME")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10_000], help="simulator calls")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, with other seeds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole comparison")
    parser.add_argument("--csv", help="file for all rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # A doubtful approximation is what the table is to show, and one line for every run would bury it.
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro_voed")

    if arguments.model:
        problems = {arguments.model: (load(arguments.model), arguments.targets, arguments.exact)}
        observations = arguments.observations
    else:
        problems, observations = {name: PROBLEMS[name] for name in arguments.problems}, "y"
    frames = []
    for name, (model, targets, exact) in problems.items():
        comparison = compare_estimators(
            model,
            {estimator: ESTIMATORS[estimator] for estimator in arguments.estimators},
            arguments.budgets,
            arguments.repeats,
            observation_labels=observations,
            target_labels=targets,
            exact=exact if exact is None or math.isfinite(exact) else parser.error("--exact must be finite"),
            seed=arguments.seed,
            on_row=lambda row: print(row, file=sys.stderr, flush=True),
        )
        print(f"\n{name}: {comparison}", flush=True)
        frames.append(comparison.to_data_frame().assign(problem=name))
    if arguments.csv:
        import pandas as pd

        pd.concat(frames).to_csv(arguments.csv, index=False)


def load(path):
    """Call the factory at `package.module:factory`."""
    module, _, factory = path.partition(":")
    if not factory:
        raise SystemExit(f"--model: expected package.module:factory, got {path!r}")
    return getattr(importlib.import_module(module), factory)()


if __name__ == "__main__":
    main()

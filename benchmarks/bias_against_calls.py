"""Bias of the estimators against simulator calls on the nonlinear problem of three parameters, at one design.

At budgets of 1e3, 1e4 and 1e5 simulated experiments, and for several training seeds: the flow (with outcomes drawn anew
for every pass over its forward runs, and with one outcome for each run), a Gaussian, nested Monte Carlo with few, with
many and with re-used inner draws. The exact value is by quadrature. Rows appear on the error
stream as they are done, then the table; it and a figure of bias against calls are written where asked. Run as

    python benchmarks/bias_against_calls.py [--design 0.5] [--budgets 1000 10000 100000] [--repeats 10] [--quick]
        [--csv table.csv] [--figure bias.png]
"""

import argparse
import sys
from dataclasses import replace

import torch

from pyro_voed import compare_estimators, eig_flow
from pyro_voed.compare.budgets import ESTIMATORS, at_budget, pooled
from pyro_voed.plots import plot_comparison
from pyro_voed.problems.nonlinear import exact_eig, nonlinear

ONE_OUTCOME = "flow_one_outcome"


def of_one_outcome(budget):
    sizes = pooled(budget)
    return sizes | {"training": replace(sizes["training"], redraw_outcomes=False)}


CHOICES = {**ESTIMATORS, ONE_OUTCOME: at_budget(eig_flow, of_one_outcome)}
NAMES = ("flow", ONE_OUTCOME, "gaussian_flow", "nmc_low", "nmc_high", "nmc_reused")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--design", type=float, default=0.5, help="design, in (0, 1)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="simulator calls")
    parser.add_argument("--repeats", type=int, default=10, help="training seeds of each")
    parser.add_argument("--estimators", nargs="+", choices=list(CHOICES), default=NAMES, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole comparison")
    parser.add_argument("--csv", help="file for the table")
    parser.add_argument("--figure", help="file for the figure")
    parser.add_argument("--quick", action="store_true", help="small budgets and two seeds, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.budgets, arguments.repeats = [200, 500], 2
    torch.set_num_threads(1)

    comparison = compare_estimators(
        nonlinear(arguments.design),
        {name: CHOICES[name] for name in arguments.estimators},
        arguments.budgets,
        arguments.repeats,
        observation_labels="y",
        exact=exact_eig(torch.tensor(arguments.design)).item(),
        seed=arguments.seed,
        on_row=lambda row: print(row, file=sys.stderr, flush=True),
    )
    print(comparison)
    if arguments.csv:
        comparison.to_data_frame().to_csv(arguments.csv, index=False)
    if arguments.figure:
        plot_comparison(comparison).figure.savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()

"""One density, equal simulations: sbi's neural posterior estimation beside the density that `eig_flow` trains.

Three problems at one design each, none with more than three parameters. Both sides get the same number of simulations
and choose everything else themselves: sbi trains its default (a masked autoregressive flow) or its neural spline flow
until a held-out tenth stops improving; `eig_flow(training=Pool(...))` its default spline coupling flow the same way:
once on the very pool ("fixed pool") and once, as is its default, with the noise of the outcomes drawn anew every pass,
which costs no further run of the forward map but is more than sbi is given.
Compared are the seconds and the Barber-Agakov bound, mean log q(theta | y) - log p(theta), of the trained densities on
the same 10,000 fresh simulations, which neither side's time includes (ours has 2,000 of its own for its report). The
nearer to the exact value, the better the density. Run as

    python benchmarks/compare/npe_sbi.py [--budgets 3000] [--seeds 0 1 2] [--quick] [--csv table.csv]
"""

import argparse
import contextlib
import io
import logging
import statistics
import warnings

import torch
from sbi.inference import NPE
from side_by_side import describe, note, timed, write_table
from torch import Tensor

from pyro_voed import Experiment, Pool, eig_flow, sample_joint
from pyro_voed.experiment.packing import JointSample
from pyro_voed.problems import linear_gaussian, michaelis_menten, nonlinear

NUM_FRESH = 10_000

PROBLEMS = {
    # Name: model and exact value in nats.
    "linear Gaussian, 2 parameters": (linear_gaussian.linear_gaussian(), linear_gaussian.DEFAULT_EIG),
    "Michaelis-Menten, 2 parameters": (
        michaelis_menten.michaelis_menten(michaelis_menten.TUTORIAL_DESIGNS),
        michaelis_menten.TUTORIAL_EIG,
    ),
    "nonlinear, 3 parameters": (nonlinear.nonlinear(0.5), nonlinear.exact_eig(torch.tensor(0.5)).item()),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[3_000], help="simulations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of simulations and training")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--csv", help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    max_epochs = 2**31 - 1
    if arguments.quick:
        arguments.budgets, arguments.seeds, max_epochs = [300], [0], 3
    sides = {
        "sbi NPE, maf": lambda model, size, seed: sbi_npe(model, size, seed, "maf", max_epochs),
        "sbi NPE, nsf": lambda model, size, seed: sbi_npe(model, size, seed, "nsf", max_epochs),
        "pyro_voed, fixed pool": lambda model, size, seed: ours(model, size, seed, redraw_outcomes=False),
        "pyro_voed": ours,
    }
    rows = []
    for name, (model, exact) in PROBLEMS.items():
        for size in arguments.budgets:
            runs = {side: [] for side in sides}
            for seed in arguments.seeds:
                fresh = simulate(model, NUM_FRESH, 1_000 + seed)
                for side, train in sides.items():
                    log_q, seconds = timed(train, model, size, seed)
                    with torch.no_grad():
                        bound = (log_q(fresh) - fresh.log_prior).mean().item()
                    runs[side].append((bound, seconds))
                    note(f"{name}, {size} simulations, seed {seed}, {side}: {bound:.4f} nats, {seconds:.1f} s")
            rows += [summarised(name, size, side, runs[side], exact) for side in sides]
    print(describe("sbi", "pyro-ppl"))
    print(write_table(rows, arguments.csv))


def simulate(model, num_samples: int, seed: int) -> JointSample:
    """Simulate on a stream of its own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return sample_joint(Experiment(model, "y"), num_samples)


def ours(model, size: int, seed: int, redraw_outcomes: bool = True):
    """Train by `eig_flow` on a pool; return its log density of a sample's packed targets."""
    training = Pool(size, redraw_outcomes=redraw_outcomes)
    result = eig_flow(model, "y", training=training, num_samples=2_000, seed=seed, progress=False)
    return lambda sample: result.density.log_prob(sample.theta, sample.y)


def sbi_npe(model, size: int, seed: int, density: str, max_epochs: int):
    """Train sbi's density, in the same unconstrained coordinates."""
    logging.disable(logging.WARNING)
    sample = simulate(model, size, seed)
    # It reports on the output stream that it has converged.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        inference = NPE(density_estimator=density, show_progress_bars=False)
        inference.append_simulations(sample.theta, sample.y)
        estimator = inference.train(max_num_epochs=max_epochs)

    def log_q(fresh: JointSample) -> Tensor:
        return estimator.log_prob(fresh.theta.unsqueeze(0), condition=fresh.y).squeeze(0)

    return log_q


def summarised(problem: str, size: int, side: str, runs: list[tuple[float, float]], exact: float) -> dict:
    """Return one row: medians over seeds."""
    bound = statistics.median(bound for bound, _ in runs)
    return {
        "problem": problem,
        "simulations": size,
        "side": side,
        "bound, nats": bound,
        "below exact": exact - bound,
        "seconds": statistics.median(seconds for _, seconds in runs),
    }


if __name__ == "__main__":
    main()

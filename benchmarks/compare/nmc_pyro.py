"""Nested Monte Carlo on Michaelis-Menten: `eig_nmc` beside `pyro.contrib.oed`, pairs a second and peak memory.

Both average over N outer draws and M = N inner draws that all outer draws share; ours re-uses the outer draws, leaving
the own one out. Every run is a fresh process: a warm-up of 200 draws, then the timed call; the memory is the process's
peak, and "added" what the call added to that of the imports and the warm-up. Run as

    python benchmarks/compare/nmc_pyro.py [--sizes 1000 2000 4000] [--alone 10000 30000] [--repeats 3] [--quick]
        [--csv table.csv]

`--alone` are sizes that are run on our side only: theirs holds all pairs in memory at once, and at 10,000 that is about
3 GB for each temporary.
"""

import argparse
import json
import statistics
import sys

import torch
from side_by_side import describe, in_fresh_process, median_ratio, note, peak_mebibytes, timed, verdict, write_table

from pyro_voed.problems.michaelis_menten import (
    NOISE_SCALE,
    PRIOR_MEAN,
    PRIOR_SCALE,
    START_DESIGNS,
    mean_rate,
    michaelis_menten,
)

WARMUP_SIZE = 200


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 2_000, 4_000], help="outer draws, both sides")
    parser.add_argument("--alone", type=int, nargs="*", default=[10_000, 30_000], help="outer draws, our side only")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side and size")
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--csv", help="file for the table")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        print(json.dumps(measure(SIDES[arguments.worker[0]], int(arguments.worker[1]))))
        return
    if arguments.quick:
        arguments.sizes, arguments.alone, arguments.repeats = [500], [1_000], 2

    rows, ratios = [], []
    for size in arguments.sizes + arguments.alone:
        sides = ["pyro_voed"] if size in arguments.alone else list(SIDES)
        runs = {side: [] for side in sides}
        for _ in range(1 if size in arguments.alone else arguments.repeats):
            for side in sides:
                runs[side].append(in_fresh_process(sys.argv[0], "--worker", side, size))
                note(f"{size} {side} {runs[side][-1]}")
        rows += [{"N = M": size, "side": side, **medians(runs[side], size)} for side in sides]
        if len(sides) == 2:
            theirs, ours = ([run["seconds"] for run in runs[side]] for side in ("pyro.contrib.oed", "pyro_voed"))
            ratios.append((size, median_ratio(theirs, ours)))
    print(describe("pyro-ppl"))
    print(write_table(rows, arguments.csv))
    for size, ratio in [] if arguments.quick else ratios:
        print(verdict(f"times as many pairs a second, N = M = {size}", ratio, 3.0, at_most=False))


def ours(size: int) -> float:
    """Estimate with `eig_nmc`."""
    from pyro_voed import eig_nmc

    return eig_nmc(michaelis_menten(START_DESIGNS), "y", "theta", num_outer_samples=size, seed=1).eig.item()


def theirs(size: int) -> float:
    """Estimate with `nmc_eig`; its model takes the design and makes a plate of each of its batch dimensions."""
    import pyro
    import pyro.distributions as dist
    from pyro.contrib.oed.eig import nmc_eig

    def model(design):
        with pyro.plate_stack("plates", design.shape[:-1]):
            theta = pyro.sample("theta", dist.Normal(PRIOR_MEAN, PRIOR_SCALE).expand([2]).to_event(1))
            return pyro.sample("y", dist.Normal(mean_rate(theta, design), NOISE_SCALE).to_event(1))

    pyro.set_rng_seed(1)
    with torch.no_grad():
        return nmc_eig(model, torch.tensor(START_DESIGNS), "y", "theta", N=size, M=size).item()


SIDES = {"pyro.contrib.oed": theirs, "pyro_voed": ours}


def measure(side, size: int) -> dict:
    """Run one side once, after a small run that loads all code."""
    side(WARMUP_SIZE)
    before = peak_mebibytes()
    estimate, seconds = timed(side, size)
    return {"estimate": estimate, "seconds": seconds, "peak": peak_mebibytes(), "added": peak_mebibytes() - before}


def medians(runs: list[dict], size: int) -> dict:
    """Return the medians over runs."""
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "estimate, nats": middle["estimate"],
        "seconds": middle["seconds"],
        "million pairs a second": size * size / middle["seconds"] / 1e6,
        "peak MiB": middle["peak"],
        "added MiB": middle["added"],
    }


if __name__ == "__main__":
    main()

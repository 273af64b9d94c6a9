"""Time of a training step of many small densities: stacked, and one after the other.

For affine and spline couplings, several numbers of members and rows for each member: median milliseconds of a step of
all members in either way, alternating in one run, and their ratio. Run as

    python benchmarks/stacked.py [--members 16 64] [--rows 64 256] [--repeats 7] [--quick]
"""

import argparse
import copy
import statistics
import time

import torch

from pyro_voed.densities import AffineCouplingFlow, SplineCouplingFlow, StackedDensity, Standardise, StandardisedDensity
from pyro_voed.estimators.fit import weights_group
from pyro_voed.training.ascent import Ascent

THETA_DIM, CONTEXT_DIM = 2, 3


def made(flow):
    return StandardisedDensity(flow(THETA_DIM, CONTEXT_DIM), Standardise(THETA_DIM), Standardise(CONTEXT_DIM))


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(flow, members, rows, repeats):
    theta, context = torch.randn(rows, members, THETA_DIM), torch.randn(rows, members, CONTEXT_DIM)
    densities = [made(flow) for _ in range(members)]
    stacked = StackedDensity(copy.deepcopy(densities))
    together = Ascent([weights_group(stacked, [1e-3])])
    alone = [Ascent([weights_group(density, [1e-3])]) for density in densities]

    def step_together():
        together.step(stacked.log_prob(theta, context).mean())

    def step_alone():
        for index, (density, ascent) in enumerate(zip(densities, alone, strict=True)):
            ascent.step(density.log_prob(theta[:, index], context[:, index]).mean())

    step_together(), step_alone()
    times = [(seconds(step_together), seconds(step_alone)) for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="experiments for each member")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few members and repeats, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.members, arguments.rows, arguments.repeats = [4], [32], 2
    torch.set_num_threads(1)
    print("flow                 members  rows   stacked ms   one by one ms   ratio")
    for flow in (AffineCouplingFlow, SplineCouplingFlow):
        for members in arguments.members:
            for rows in arguments.rows:
                together, alone = compare(flow, members, rows, arguments.repeats)
                print(
                    f"{flow.__name__:<20} {members:>7} {rows:>5} {together * 1e3:>12.1f} {alone * 1e3:>15.1f} "
                    f"{alone / together:>7.1f}"
                )


if __name__ == "__main__":
    main()

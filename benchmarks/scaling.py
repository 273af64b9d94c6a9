"""Time and peak memory of `eig_flow` and `eig_nmc` as the problem grows: designs, dimensions, simulations.

On linear regressions with normal priors and noise whose designs are random matrices with rows of norm about one. From
one base problem (one design, two parameters, four outcomes) one size at a time is raised. The flow takes a fixed number
of steps, so the figures are of cost, not of accuracy; estimates stand next to the exact values (means over designs) to
show what the cost bought. Every row is a process of its own, after a small run that loads all code. Run as

    python benchmarks/scaling.py [--quick] [--csv table.csv]
"""

import argparse
import json
import sys
from pathlib import Path

import torch

# The timing and the table are those of the comparisons.
sys.path.append(str(Path(__file__).parent / "compare"))
from side_by_side import describe, in_fresh_process, note, peak_mebibytes, timed, write_table

from pyro_voed import Fresh, eig_flow, eig_nmc
from pyro_voed.problems.linear_gaussian import exact_eig, linear_gaussian

BASE = {"designs": 1, "theta_dim": 2, "y_dim": 4, "simulations": 1}
STEPS = {
    # Simulations are in multiples of the base: 256 experiments a step, 2,000 outer draws.
    "designs": [8, 64],
    "theta_dim": [8, 32],
    "y_dim": [32, 256],
    "simulations": [4, 16],
}
NUM_STEPS = 200


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the base problem alone with few steps")
    parser.add_argument("--csv", help="file for the table")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "SIZES", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        method, sizes, num_steps = arguments.worker
        print(json.dumps(measure(method, json.loads(sizes), int(num_steps))))
        return
    points = [BASE]
    if not arguments.quick:
        points += [{**BASE, name: value} for name, values in STEPS.items() for value in values]
    rows = []
    for method in METHODS:
        for sizes in points:
            num_steps = 20 if arguments.quick else NUM_STEPS
            row = in_fresh_process(sys.argv[0], "--worker", method, json.dumps(sizes), num_steps)
            rows.append({"method": method, **sizes, **row})
            note(str(rows[-1]))
    print(describe("pyro-ppl"))
    print(write_table(rows, arguments.csv))


def flow(model, designs, multiple: int, num_steps: int):
    """Train the flow for a fixed number of steps."""
    training = Fresh(num_steps=num_steps, batch_size=256 * multiple)
    return eig_flow(model, "y", designs=designs, training=training, seed=0, progress=False)


def nmc(model, designs, multiple: int, num_steps: int):
    """Average over all pairs of re-used draws."""
    return eig_nmc(model, "y", designs=designs, num_outer_samples=2_000 * multiple, seed=0)


METHODS = {"eig_flow": flow, "eig_nmc": nmc}


def measure(method: str, sizes: dict[str, int], num_steps: int) -> dict:
    """Run one point."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes["designs"], sizes["y_dim"], sizes["theta_dim"])
    designs = torch.randn(shape, generator=generator) / sizes["theta_dim"] ** 0.5
    scales = torch.ones(sizes["theta_dim"])
    model = linear_gaussian(designs[0], prior_scales=scales)
    batch = {"xi": designs} if sizes["designs"] > 1 else None
    METHODS[method](linear_gaussian(), None, 1, 5)
    before = peak_mebibytes()
    result, seconds = timed(METHODS[method], model, batch, sizes["simulations"], num_steps)
    return {
        "simulated": result.num_simulations,
        "seconds": seconds,
        "peak MiB": peak_mebibytes(),
        "added MiB": peak_mebibytes() - before,
        "estimate": result.eig.mean().item(),
        "exact": exact_eig(designs, prior_scales=scales).mean().item(),
    }


if __name__ == "__main__":
    main()

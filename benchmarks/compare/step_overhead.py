"""What a training step through Pyro costs over the same step written by hand in torch.

Ours is what `eig_flow` does each step on Michaelis-Menten at one design: simulate 256 experiments by running the Pyro
program, score the terms, climb. By hand: the same density, the simulator as plain tensor operations, `backward` and the
same fused Adam, without the checks, the clipping and the record that the library's loop keeps. The two run in turn, a
block of steps each; then the pieces in which they differ are timed alone. Run as

    python benchmarks/compare/step_overhead.py [--steps 500] [--repeats 7] [--batch 256] [--quick] [--csv table.csv]
"""

import argparse
import copy
import math
import statistics

import pyro
import torch
from side_by_side import alternate, describe, median_ratio, timed, verdict, write_table
from torch import Tensor

from pyro_voed import Experiment, Fresh, eig_flow, sample_joint
from pyro_voed.problems.michaelis_menten import (
    NOISE_SCALE,
    PRIOR_MEAN,
    PRIOR_SCALE,
    START_DESIGNS,
    mean_rate,
    michaelis_menten,
)
from pyro_voed.training.ascent import Ascent

RATE = 2e-3
LOG_NORMALISER = 2.0 * math.log(PRIOR_SCALE * math.sqrt(2.0 * math.pi))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="steps in a block")
    parser.add_argument("--repeats", type=int, default=7, help="blocks of each side")
    parser.add_argument("--batch", type=int, default=256, help="experiments a step")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--csv", help="file for the table")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.repeats = 20, 2
    torch.set_num_threads(1)
    steps, batch = arguments.steps, arguments.batch

    model = michaelis_menten(START_DESIGNS)
    training = Fresh(num_steps=2, batch_size=batch)
    density = eig_flow(model, "y", training=training, num_samples=2, seed=0, progress=False).density.train()
    through_pyro, by_hand = [], []
    for number in range(arguments.repeats + 1):
        ours = pyro_seconds(model, density, steps, batch) / steps
        theirs = timed(torch_steps(density, steps, batch))[1] / steps
        if number:
            through_pyro.append(ours)
            by_hand.append(theirs)

    pieces = {name: piece / steps for name, piece in piece_seconds(model, density, steps, batch).items()}
    rows = [{"what": "step through Pyro", "microseconds": 1e6 * statistics.median(through_pyro)}]
    rows += [{"what": "step by hand", "microseconds": 1e6 * statistics.median(by_hand)}]
    rows += [{"what": f"piece: {name}", "microseconds": 1e6 * seconds} for name, seconds in pieces.items()]
    print(describe("pyro-ppl"))
    print(write_table(rows, arguments.csv))
    if not arguments.quick:
        print(verdict("step through Pyro / step by hand", median_ratio(through_pyro, by_hand), 1.25, at_most=True))


def pyro_seconds(model, density, steps: int, batch: int) -> float:
    """Return the seconds of the library's own training loop."""
    training = Fresh(num_steps=steps, batch_size=batch)
    result = eig_flow(model, "y", density=density, training=training, num_samples=2, seed=0, progress=False)
    return result.history.seconds


def torch_steps(density, steps: int, batch: int):
    """Return a call that takes steps of the same kind, on a copy of the density."""
    density = copy.deepcopy(density)
    optimiser = torch.optim.Adam(density.parameters(), lr=RATE, fused=True)
    xi = torch.tensor(START_DESIGNS)

    def run() -> None:
        for _ in range(steps):
            theta, y, log_prior = draw(batch, xi)
            loss = (log_prior - density.log_prob(theta, y)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return run


def draw(batch: int, xi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Simulate by hand: targets, outcomes and log prior."""
    standard = torch.randn(batch, 2)
    theta = PRIOR_MEAN + PRIOR_SCALE * standard
    rate = mean_rate(theta, xi)
    return theta, rate + NOISE_SCALE * torch.randn_like(rate), -0.5 * standard.square().sum(-1) - LOG_NORMALISER


def piece_seconds(model, density, steps: int, batch: int) -> dict[str, float]:
    """Return median seconds, for a block of steps, of the pieces alone."""
    density = copy.deepcopy(density)
    parameters = list(density.parameters())
    experiment, xi = Experiment(model, "y"), torch.tensor(START_DESIGNS)
    ascent = Ascent([{"params": parameters, "lr": RATE}])
    optimiser = torch.optim.Adam(parameters, lr=RATE, fused=True)
    theta, y, _ = draw(batch, xi)

    def score() -> Tensor:
        return density.log_prob(theta, y).mean()

    def plain_step() -> None:
        optimiser.zero_grad()
        (-score()).backward()
        optimiser.step()

    def simulate() -> None:
        with torch.no_grad():
            sample_joint(experiment, batch)

    pieces = {
        "simulate through Pyro": simulate,
        "simulate by hand": lambda: draw(batch, xi),
        "score, climb and check as the library": lambda: ascent.step(score()),
        "score, backward and Adam by hand": plain_step,
    }

    def block(piece):
        def run() -> None:
            for _ in range(steps):
                piece()

        return run

    with pyro.validation_enabled(False):
        seconds = alternate({name: block(piece) for name, piece in pieces.items()}, 3)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()

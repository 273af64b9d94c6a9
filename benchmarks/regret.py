"""How often the bound on the regret holds: the nonlinear problem of three parameters on a grid of 11 designs.

One amortised flow is trained; the grid is then certified again and again on fresh draws. Counted are the repeats whose
intervals all hold the exact value, and those whose bound on the regret is not below what the choice really costs. An
exact 95 % bound holds in at least 182 of 200 repeats with probability 0.994. Run as

    python benchmarks/regret.py [--repeats 200] [--first-seed 0] [--width 0.06] [--num-steps 5000] [--quick]
"""

import argparse
import time

import torch

from pyro_voed import Fresh, amortise_eig, certify, max_regret
from pyro_voed.problems.nonlinear import DESIGNS, exact_eig, nonlinear


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first repeat, the others following")
    parser.add_argument("--width", type=float, default=0.06, help="width asked for of each certified interval, nats")
    parser.add_argument("--num-steps", type=int, default=5_000)
    parser.add_argument("--quick", action="store_true", help="two repeats of wide intervals, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.width, arguments.num_steps = 2, 0.3, 200
    torch.set_num_threads(1)

    designs = {"d": torch.tensor(DESIGNS)}
    exact = exact_eig(designs["d"])
    flow = amortise_eig(
        nonlinear(), "y", training=Fresh(num_steps=arguments.num_steps, batch_size=512), seed=0, progress=False
    )
    curve = flow.at(designs, num_samples=2_000, seed=0)
    print(
        f"flow trained in {flow.seconds:.0f} s; gap {(exact - curve.eig).min():.3f} to {(exact - curve.eig).max():.3f}"
    )
    held = valid = certified = 0
    regrets, started = [], time.perf_counter()
    for done in range(1, arguments.repeats + 1):
        result = certify(curve, width=arguments.width, seed=arguments.first_seed + done - 1)
        regret, chosen = max_regret(result)
        held += bool(((result.interval[0] <= exact) & (exact <= result.interval[1])).all())
        valid += bool(regret >= exact.max() - exact[chosen])
        certified += result.certificate.certified
        regrets.append(regret.item())
        if done % 20 == 0 or done <= 2:
            print(
                f"{done:>4} repeats: all intervals hold in {held}, the regret bound in {valid}, certified "
                f"{certified}; bound {min(regrets):.4f} to {max(regrets):.4f} nats, "
                f"{(time.perf_counter() - started) / done:.1f} s each",
                flush=True,
            )


if __name__ == "__main__":
    main()

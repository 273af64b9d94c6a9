"""Design search on the seven Michaelis-Menten concentrations, scored by quadrature.

For each seed a start near one half (the sigmoid of 0.1 N(0, 1)) is improved by `optimise_design` with its defaults.
The design found is scored by its exact expected information gain, which no part of the search has seen; the gap is
that value less the lower bound the search reports. Run as

    python benchmarks/michaelis_menten.py [--seeds 0 1 2] [--quick]
"""

import argparse
import time

import pyro
import torch

from pyro_voed import Fresh, optimise_design
from pyro_voed.problems.michaelis_menten import BEST_EIG, exact_eig, michaelis_menten

MAX_STANDARD_ERROR = 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of start and search")
    parser.add_argument("--quick", action="store_true", help="100 steps, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"best known design: exact EIG {BEST_EIG:.4f} nats")
    print("seed  exact at start  exact at design (se)  lower bound (se)    gap  steps  simulations  wall s  CPU s  xi")
    for seed in arguments.seeds:
        print(_row(seed, Fresh(num_steps=100) if arguments.quick else None), flush=True)


def _row(seed, training):
    generator = torch.Generator().manual_seed(seed)
    start = torch.sigmoid(0.1 * torch.randn(7, generator=generator))
    pyro.clear_param_store()
    started = time.perf_counter(), time.process_time()
    result = optimise_design(michaelis_menten(start), "y", "theta", training=training, seed=seed, progress=False)
    wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    design = result.designs["xi"]
    exact, error = exact_eig(torch.stack([start, design]))
    if error.max() > MAX_STANDARD_ERROR:
        raise ArithmeticError(f"the quadrature has standard errors {error.tolist()}, above {MAX_STANDARD_ERROR}")
    columns = [
        f"{seed:4d}",
        f"{exact[0]:14.4f}",
        f"{exact[1]:11.4f} ({error[1]:.4f})",
        f"{result.eig:.4f} ({result.standard_error:.4f})",
        f"{exact[1] - result.eig:+.4f}",
        f"{result.history.num_steps:5d}",
        f"{result.num_simulations:11,d}",
        f"{wall:6.1f}",
        f"{processor:5.1f}",
        " ".join(f"{x:.3f}" for x in design.sort().values.tolist()),
    ]
    return "  ".join(columns)


if __name__ == "__main__":
    main()

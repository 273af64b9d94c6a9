"""Seven Michaelis-Menten designs: BayesFlow's tutorial on Bayesian experimental design beside `optimise_design`.

Theirs is the tutorial's job: a `CouplingFlow` of the parameters given outcomes and designs, trained jointly with the
designs' logits by 5,000 AdamW steps of batch 128 at rate 1e-3, torch backend. The simulator is written with plain
tensor operations, which cost less than the tutorial's multivariate normals, so their time is understated if anything.
Ours is `optimise_design` twice, from the same starts: a short search ("ours, short") and a fuller one ("ours").
Designs are scored by the exact expected information gain, by quadrature, and the bounds on 20,000 fresh simulations;
neither scoring is in their time, while ours includes its own report of the bound. Run as

    python benchmarks/compare/michaelis_menten_bayesflow.py [--seeds 0 1 2] [--quick] [--csv table.csv]
"""

import argparse
import math
import os
import statistics
from dataclasses import replace

os.environ.setdefault("KERAS_BACKEND", "torch")

import pyro
import torch
from side_by_side import describe, note, timed, verdict, write_table
from torch import Tensor

from pyro_voed import Fresh, optimise_design
from pyro_voed.problems.michaelis_menten import (
    NOISE_SCALE,
    PRIOR_MEAN,
    PRIOR_SCALE,
    exact_eig,
    mean_rate,
    michaelis_menten,
)

NUM_DESIGNS = 7
THEIR_STEPS = 5_000
THEIR_BATCH = 128
LARGEST_RATE = 200.0
PRIOR_ENTROPY = math.log(2.0 * math.pi * math.e * PRIOR_SCALE**2)  # of two independent normals

# Chosen on the seeds 0 to 2, then checked on 0 to 9: the short search ends at 3.61 or more in all, the fuller one at
# 3.70 or more in nine, and in one in a local optimum at 3.62.
SHORT = Fresh(num_steps=300, design_learning_rate=0.1)
FULL = Fresh(num_steps=1_000, design_learning_rate=0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of start and training")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that it runs")
    parser.add_argument("--csv", help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [THEIR_STEPS, SHORT, FULL]
    if arguments.quick:
        arguments.seeds, sizes = [0], [50, replace(SHORT, num_steps=20), replace(FULL, num_steps=50)]

    # Uncounted: what the first call of each side sets up.
    ours(torch.zeros(NUM_DESIGNS), 0, Fresh(num_steps=20))
    theirs(torch.zeros(NUM_DESIGNS), 0, 20)
    rows = []
    for seed in arguments.seeds:
        start = 0.1 * torch.randn(NUM_DESIGNS, generator=torch.Generator().manual_seed(seed))
        rows.append({"side": "ours, short", "seed": seed, **ours(start, seed, sizes[1])})
        rows.append({"side": "BayesFlow", "seed": seed, **theirs(start, seed, sizes[0])})
        rows.append({"side": "ours", "seed": seed, **ours(start, seed, sizes[2])})
        for row in rows[-3:]:
            note(str(row))
    print(describe("bayesflow", "keras", "pyro-ppl"))
    print(write_table(rows, arguments.csv))
    if not arguments.quick:
        print("\n".join(verdicts(rows)))


def ours(start: Tensor, seed: int, training: Fresh) -> dict:
    """Search with `optimise_design` from the start's logits."""
    pyro.clear_param_store()
    model = michaelis_menten(torch.sigmoid(start))
    result, seconds = timed(optimise_design, model, "y", "theta", training=training, seed=seed, progress=False)
    return _row(result.designs["xi"], result.eig.item(), result.history.num_steps, seconds)


def theirs(start: Tensor, seed: int, num_steps: int) -> dict:
    """Train BayesFlow's flow and the designs together."""
    import bayesflow
    import keras

    keras.utils.set_random_seed(seed)
    flow = bayesflow.networks.CouplingFlow()
    flow.build(xz_shape=(32, 2), conditions_shape=(32, 2 * NUM_DESIGNS))
    logits = start.clone().requires_grad_()

    def log_q(batch: int) -> Tensor:
        theta = PRIOR_MEAN + PRIOR_SCALE * torch.randn(batch, 2)
        rate = mean_rate(theta, torch.sigmoid(logits))
        y = (rate + NOISE_SCALE * torch.randn_like(rate)) / LARGEST_RATE
        return flow.log_prob(theta, conditions=torch.cat([y, logits.detach().expand(batch, -1)], -1))

    def train() -> None:
        optimiser = torch.optim.AdamW([logits, *flow.parameters()], lr=1e-3)
        # Importing the package switches gradients off for the process.
        with torch.enable_grad():
            for _ in range(num_steps):
                optimiser.zero_grad()
                (-log_q(THEIR_BATCH).mean()).backward()
                optimiser.step()

    _, seconds = timed(train)
    with torch.no_grad():
        bound = torch.cat([log_q(2_000) for _ in range(10)]).mean().item() + PRIOR_ENTROPY
    return _row(torch.sigmoid(logits.detach()), bound, num_steps, seconds)


def _row(designs: Tensor, bound: float, num_steps: int, seconds: float) -> dict:
    exact, error = exact_eig(designs)
    return {
        "steps": num_steps,
        "seconds": seconds,
        "exact EIG": exact.item(),
        "standard error": error.item(),
        "bound": bound,
        "gap": exact.item() - bound,
        "designs": " ".join(f"{x:.3f}" for x in designs.sort().values.tolist()),
    }


def verdicts(rows: list[dict]) -> list[str]:
    """Compare medians of time, and the worst seed of everything else, with the bars."""

    def column(side: str, name: str) -> list[float]:
        return [row[name] for row in rows if row["side"] == side]

    seconds = {side: statistics.median(column(side, "seconds")) for side in ("BayesFlow", "ours, short", "ours")}
    return [
        f"median seconds: {', '.join(f'{side} {value:.2f}' for side, value in seconds.items())}",
        verdict("exact EIG, worst seed of ours, short", min(column("ours, short", "exact EIG")), 3.60, at_most=False),
        verdict("times faster, short", seconds["BayesFlow"] / seconds["ours, short"], 30.0, at_most=False),
        verdict("exact EIG, worst seed of ours", min(column("ours", "exact EIG")), 3.70, at_most=False),
        verdict("gap to the exact value, worst seed of ours", max(column("ours", "gap")), 0.03, at_most=True),
        verdict("times faster", seconds["BayesFlow"] / seconds["ours"], 12.0, at_most=False),
    ]


if __name__ == "__main__":
    main()

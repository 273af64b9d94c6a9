"""The flow's posteriors against NUTS at learned Michaelis-Menten designs.

For each seed the designs are learned by `optimise_design` with its defaults; the flow that comes out of the search is
compared with NUTS at three outcomes simulated from the prior. Printed are the accuracy of the classifier two-sample
test, its control (NUTS against itself) and its power check (NUTS against itself, one parameter shifted by 0.3
standard deviations). Run as

    python benchmarks/posterior_agreement.py [--seeds 0] [--quick]
"""

import argparse

import pyro
import torch

from pyro_voed import Fresh, flow_posterior, nuts_posterior, optimise_design, sample_joint
from pyro_voed.diagnostics import agreement
from pyro_voed.problems.michaelis_menten import START_DESIGNS, michaelis_menten


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of search, outcomes and chains")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print("seed  outcome  C2ST (se)      control (se)   power (se)     NUTS effective   R-hat  divergences  NUTS s")
    for seed in arguments.seeds:
        _print_rows(seed, arguments.quick)


def _print_rows(seed, quick):
    pyro.clear_param_store()
    model = michaelis_menten(START_DESIGNS)
    training = Fresh(num_steps=100) if quick else None
    result = optimise_design(model, "y", "theta", training=training, seed=seed, progress=False)
    torch.manual_seed(seed)
    outcomes = sample_joint(result.experiment, 3).values["y"]
    # At least 2,000 effective draws leave the control 1,000 a side, as the comparison itself has.
    chains = {"num_samples": 500, "num_warmup": 100} if quick else {"num_samples": 3_000, "num_warmup": 500}
    num_draws = 100 if quick else 1_000
    for number, y in enumerate(outcomes):
        reference = nuts_posterior(
            model, {"y": y}, "y", "theta", designs=result.designs, num_chains=4, jit_compile=True, progress=False,
            seed=seed + number, **chains,
        )  # fmt: skip
        flow = flow_posterior(result, {"y": y}, num_samples=4_000, seed=seed + number)
        compared = agreement(flow, reference, num_draws=num_draws, seed=seed + number)
        tests = (compared.c2st, compared.control, compared.power)
        columns = "  ".join(f"{c.accuracy:.3f} ({c.standard_error:.3f})" for c in tests)
        effective, r_hat = reference.effective_sample_size["theta"].min(), reference.r_hat["theta"].max()
        print(
            f"{seed:4d}  {number + 1:7d}  {columns}  {effective:14.0f}  {r_hat:6.3f}  {reference.num_divergences:11d}"
            f"  {reference.seconds:6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

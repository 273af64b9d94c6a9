"""Means, scales and correlations of twelve variables from 263 rows: recovery, calibration, and agreement with NUTS.

Trains one posterior of `problems.covariance` by one call of `eig_flow`, then prints the correlation of posterior mean
and truth, simulation-based calibration of all 90 quantities, whether sampled covariances are positive definite, and for
the observed data set the distance of posterior means from NUTS, in NUTS's standard deviations.

    python benchmarks/covariance.py [--steps 4000] [--batch 128] [--rate 1e-3] [--seed 0] [--no-nuts]
"""

import argparse
import time

import torch

from pyro_voed import Fresh, eig_flow, flow_posterior, nuts_posterior
from pyro_voed.diagnostics.calibration import sbc
from pyro_voed.diagnostics.simulated import simulate_posteriors
from pyro_voed.problems.covariance import NUM_ROWS, NUM_VARIABLES, correlations, covariance, observed_rows


def recovered(simulated):
    means = simulated.draws.mean(1)
    pairs = zip(means.T, simulated.truths.T, strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


def quantities(sample):
    flat = correlations({name: sample.flat(name) for name in ("mean", "scale", "correlation")})
    return torch.cat([flat[name] for name in ("mean", "scale", "correlation")], -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-nuts", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few variables and steps, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    variables, rows = (3, 50) if arguments.quick else (NUM_VARIABLES, NUM_ROWS)
    steps = 100 if arguments.quick else arguments.steps
    started = time.perf_counter()
    result = eig_flow(
        covariance(variables, rows),
        "y",
        training=Fresh(num_steps=steps, batch_size=arguments.batch, learning_rate=arguments.rate),
        seed=arguments.seed,
        progress=False,
    )
    print(result)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    simulated = simulate_posteriors(result, 500, 200, quantities=correlations, seed=arguments.seed)
    r = recovered(simulated)
    sizes = (variables, variables, variables * (variables - 1) // 2)
    for name, part in zip(("means", "scales", "correlations"), r.split(sizes), strict=True):
        print(f"{name:<13s} posterior mean against truth: correlation {part.min():.3f} to {part.max():.3f}")
    print(sbc(simulated, seed=arguments.seed))
    observed = observed_rows() if not arguments.quick else covariance(variables, rows)().detach()
    flow = flow_posterior(result, observed, 4_000, seed=arguments.seed)
    scale_tril = flow.flat("scale").unsqueeze(-1) * flow.flat("correlation")
    least = torch.linalg.eigvalsh((scale_tril @ scale_tril.mT).double()).amin()
    print(f"least eigenvalue of 4,000 sampled covariances {least:.2e}; flow draws in {flow.seconds:.2f} s")
    if arguments.no_nuts:
        return
    size = {"num_samples": 1_000, "num_warmup": 300, "num_chains": 3}
    model = covariance(variables, rows)
    nuts = nuts_posterior(model, observed, "y", seed=arguments.seed, progress=False, **size)
    means, trusted = quantities(flow), quantities(nuts)
    distance = (means.mean(0) - trusted.mean(0)).abs() / trusted.std(0)
    ratio = means.std(0) / trusted.std(0)
    print(
        f"NUTS in {nuts.seconds:.0f} s, R-hat at most {max(v.nan_to_num(1.0).max() for v in nuts.r_hat.values()):.3f}"
    )
    names = ("means", "scales", "correlations")
    for name, part, scale in zip(names, distance.split(sizes), ratio.split(sizes), strict=True):
        print(
            f"{name:<13s} distance of posterior means: mean {part.mean():.3f}, largest {part.max():.3f} posterior sd; "
            f"sd ratio {scale.min():.2f} to {scale.max():.2f}"
        )
    print(f"all: mean distance {distance.mean():.3f} posterior sd")


if __name__ == "__main__":
    main()

"""A whole curve at once: the nonlinear problem of three parameters at 21 designs, from one amortised density.

Printed for every design: the exact information, the lower bound of the flow and of the Gaussian family amortised in the
same way, and the midpoints of two certificates, by the flow and, without training, by prior draws; then times, the time
of 1,000 designs, and the bound on the regret of the design chosen. Run as

    python benchmarks/design_curve.py [--num-designs 21] [--num-steps 5000] [--batch-size 512] [--width 0.035]
        [--seed 0] [--quick] [--figure curve.png]
"""

import argparse
import time
from functools import partial

import torch

from pyro_voed import Fresh, amortise_eig, certify, eig_nmc, max_regret
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.plots import plot_eig
from pyro_voed.problems.nonlinear import exact_eig, nonlinear


def timed(function, *args, **kwargs):
    started = time.perf_counter(), time.process_time()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - started[0], time.process_time() - started[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-designs", type=int, default=21)
    parser.add_argument("--num-steps", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--width", type=float, default=0.035, help="width of each certified interval, nats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short training, to see that it runs")
    parser.add_argument("--figure", help="file for the figure")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_steps, arguments.num_designs, arguments.width = 200, 3, 0.2
    torch.set_num_threads(1)

    designs = {"d": torch.linspace(0.0, 1.0, arguments.num_designs)}
    exact = exact_eig(designs["d"])
    train = partial(
        amortise_eig,
        nonlinear(),
        "y",
        training=Fresh(num_steps=arguments.num_steps, batch_size=arguments.batch_size),
        seed=arguments.seed,
        progress=False,
    )
    flow, flow_wall, flow_cpu = timed(train)
    gaussian, gaussian_wall, gaussian_cpu = timed(
        train, density=partial(AffineCouplingFlow, num_transforms=0, hidden_dim=128)
    )
    curve, curve_wall, _ = timed(flow.at, designs, num_samples=20_000, seed=arguments.seed)
    gaussian_curve = gaussian.at(designs, num_samples=20_000, seed=arguments.seed)
    certified, certified_wall, certified_cpu = timed(certify, curve, width=arguments.width, seed=arguments.seed)
    untrained = eig_nmc(nonlinear(), "y", designs=designs, num_outer_samples=500, num_inner_samples=500, seed=0)
    by_prior, prior_wall, prior_cpu = timed(certify, untrained, width=arguments.width, seed=arguments.seed)
    _, thousand_wall, _ = timed(flow.at, {"d": torch.linspace(0.0, 1.0, 1_000)}, seed=arguments.seed)

    middle, prior_middle = certified.interval.mean(0), by_prior.interval.mean(0)
    print(
        "   d    exact    flow (gap)        Gaussian   midpoint by flow (error)   by prior (error)   interval by flow"
    )
    for row, d in enumerate(designs["d"].tolist()):
        low, high = certified.interval[:, row].tolist()
        print(
            f"{d:.2f}  {exact[row]:.4f}  {curve.eig[row]:.4f} ({curve.eig[row] - exact[row]:+.4f})  "
            f"{gaussian_curve.eig[row]:.4f}     {middle[row]:.4f} ({middle[row] - exact[row]:+.4f})         "
            f"{prior_middle[row]:.4f} ({prior_middle[row] - exact[row]:+.4f})   [{low:.4f}, {high:.4f}]"
        )
    for name, result in (("the flow", certified), ("prior draws", by_prior)):
        contains = ((result.interval[0] < exact) & (exact < result.interval[1])).all().item()
        width = (result.interval[1] - result.interval[0]).max()
        error = (result.interval.mean(0) - exact).abs().max()
        print(
            f"by {name}: largest error of a midpoint {error:.4f}, largest width {width:.4f}; all intervals hold the "
            f"exact value: {contains}; Pareto k at most {result.certificate.pareto_k.max():.2f}"
        )
    regret, chosen = max_regret(certified)
    print(f"largest gap of the flow {(exact - curve.eig).max():.4f}, standard error {curve.standard_error.max():.4f}")
    print(f"chosen d = {designs['d'][chosen]:.2f}, regret at most {regret:.4f} nats at 95 %")
    print(
        f"seconds (processor): flow {flow_wall:.0f} ({flow_cpu:.0f}), Gaussian {gaussian_wall:.0f} "
        f"({gaussian_cpu:.0f}), curve {curve_wall:.1f}, certificates by flow {certified_wall:.0f} "
        f"({certified_cpu:.0f}), by prior draws {prior_wall:.0f} ({prior_cpu:.0f}), "
        f"1,000 designs {thousand_wall:.2f}"
    )
    if arguments.figure:
        axes = plot_eig(certified)
        axes.plot(designs["d"], exact, "k:", label="exact")
        axes.plot(designs["d"], gaussian_curve.eig, "C3--", label="Gaussian family, lower bound")
        axes.legend()
        axes.figure.savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()

"""A certified interval for the 21-parameter regression at the identity design, against the exact value.

For each seed a flow is trained, once as the library makes it and once with a linear skip (below), and certified to the
width asked for. The gap is the exact expected information gain less the flow's lower bound, both known to their errors;
`k` is the Pareto index of the certificate's terms; seconds are those of the processor, one thread. At a random design
nothing exact is known: what is printed there is what the certificate alone can say. Run as

    python benchmarks/regression_certificate.py [--width 1.0] [--seeds 0 1] [--design identity] [--quick]
"""

import argparse
import time

import torch
from torch import nn

from pyro_voed import Fresh, certify, eig_flow
from pyro_voed.densities import FlowDistribution, SplineCouplingFlow
from pyro_voed.problems.regression import IDENTITY, IDENTITY_EIG, IDENTITY_STANDARD_ERROR, regression, unit_rows


class LinearSkip(nn.Module):
    """A flow around a linear prediction of the targets, q(theta - B c given c), with B learnt along with it.

    At a small noise scale the posterior's mean is the outcome itself, to within that scale, and a network that squeezes
    the outcome through a hidden layer does not hand it on with so many digits.
    """

    has_rsample = True

    def __init__(self, density):
        super().__init__()
        self.density, self.theta_dim, self.context_dim = density, density.theta_dim, density.context_dim
        self.linear = nn.Linear(self.context_dim, self.theta_dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def condition(self, context):
        return FlowDistribution(self, context)

    def log_prob(self, theta, context):
        return self.density.log_prob(theta - self.linear(context), context)

    def draw(self, context, batch_shape):
        return self.density.draw(context, batch_shape) + self.linear(context)


def linear_skip(theta_dim, context_dim):
    return LinearSkip(SplineCouplingFlow(theta_dim, context_dim, num_transforms=3, hidden_dim=128))


#: How each flow is trained: the library's defaults; a larger batch and rate, for a fixed number of steps.
FLOWS = {
    "default": {},
    "linear skip": {
        "density": linear_skip,
        "training": Fresh(num_steps=4_000, batch_size=512, learning_rate=5e-3),
    },
}
QUICK = {"training": Fresh(num_steps=300), "num_samples": 2_000}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0, help="width asked for of the interval, nats")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training and certificate")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS), help="flows to train")
    parser.add_argument("--design", choices=["identity", "random"], default="identity", help="design to evaluate")
    parser.add_argument("--quick", action="store_true", help="300 steps, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    design = IDENTITY
    if arguments.design == "random":
        entries = torch.randn(IDENTITY.shape, generator=torch.Generator().manual_seed(0))
        design = unit_rows({"xi": entries})["xi"]
        print("exact EIG unknown at a random design")
    else:
        print(f"exact EIG {IDENTITY_EIG:.4f} ({IDENTITY_STANDARD_ERROR:.4f}) nats")
    print(
        "flow         seed  lower bound (se)    gap  steps  train CPU s  interval            width  k      certified"
        "  flow / outer / inner draws  certify CPU s"
    )
    for flow in arguments.flows:
        for seed in arguments.seeds:
            sizes = {**FLOWS[flow], **(QUICK if arguments.quick else {})}
            budget = {"max_simulations": 100_000} if arguments.quick else {}
            print(_row(design, flow, seed, arguments.width, sizes, budget), flush=True)


def _row(design, flow, seed, width, sizes, budget):
    started = time.process_time()
    trained = eig_flow(regression(design), "y", seed=seed, progress=False, **sizes)
    until_trained = time.process_time()
    certificate = certify(trained, width=width, seed=seed, **budget).certificate
    until_certified = time.process_time()
    low, high = certificate.interval.tolist()
    gap = f"{IDENTITY_EIG - trained.eig:5.2f}" if design is IDENTITY else "    -"
    draws = (certificate.num_flow_samples[0], certificate.num_outer_samples[0], certificate.num_inner_samples[0])
    columns = [
        f"{flow:<11}",
        f"{seed:4d}",
        f"{trained.eig:9.3f} ({trained.standard_error:.3f})",
        gap,
        f"{trained.history.num_steps:5d}",
        f"{until_trained - started:11.1f}",
        f"[{low:.3f}, {high:.3f}]",
        f"{high - low:5.3f}",
        f"{certificate.pareto_k:5.2f}",
        f"{certificate.certified!s:>9}",
        f"{draws[0]:9,d} / {draws[1]:,d} / {draws[2]:,d}".rjust(26),
        f"{until_certified - until_trained:13.1f}",
    ]
    return "  ".join(columns)


if __name__ == "__main__":
    main()

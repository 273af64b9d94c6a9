"""Which set networks recover all of twelve variances, and which ignore some.

Each line trains one posterior of `problems.twelve_variances` and says how many variances it ignores (posterior mean and
truth correlate below 0.2), the smallest and the mean correlation, the lower bound and the wall time, beside the exact
values. `--table defaults` is the library's own summaries, `--table thread` a plain deep set and what was tried to cure
it, `--table width` the library's deep set at several widths.

    python benchmarks/set_summaries.py --table defaults --seeds 0 1 2
"""

import argparse
import time
from functools import partial
from itertools import pairwise

import pyro
import torch
from torch import nn

from pyro_voed import Experiment, Fresh, eig_flow, sample_joint
from pyro_voed.densities import AffineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.diagnostics.simulated import SimulatedPosteriors, simulate_posteriors
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.problems.twelve_variances import exact_correlation, exact_eig, twelve_variances
from pyro_voed.summaries import DeepSetSummary, SetTransformerSummary
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh

NUM_VARIABLES = 12
IGNORED = 0.2


class PlainDeepSet(nn.Module):
    """A deep set as it is usually written: rectifiers, mean pooling, default initial weights."""

    def __init__(self, summary_dim=24, width=64, orthogonal=False):
        super().__init__()
        sizes = [NUM_VARIABLES, width, width, width]
        self.rows = nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())))
        self.out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, summary_dim))
        if orthogonal:
            for part in self.modules():
                if isinstance(part, nn.Linear):
                    nn.init.orthogonal_(part.weight, 2.0**0.5)
                    nn.init.zeros_(part.bias)

    def forward(self, y):
        return self.out(self.rows(y.unflatten(-1, (-1, NUM_VARIABLES))).mean(-2))


class PlainMLP(nn.Module):
    """Two hidden layers on all rows side by side."""

    def __init__(self, num_rows, summary_dim=24, width=256):
        super().__init__()
        layers = [nn.Linear(num_rows * NUM_VARIABLES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, summary_dim))

    def forward(self, y):
        return self.layers(y)


def correlations(simulated):
    means = simulated.draws.mean(1)
    pairs = zip(means.T, simulated.truths.T, strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


def report(name, seed, num_rows, simulated, bound, error, seconds):
    r = correlations(simulated)
    print(
        f"{name:<44s} seed {seed}  rows {num_rows:3d}  ignored {int((r < IGNORED).sum()):2d}  correlation "
        f"{r.min():.3f} / {r.mean():.3f} (exact {float(exact_correlation(num_rows)):.3f})  bound {bound:.3f} +- "
        f"{error:.3f} (exact {float(exact_eig(num_rows)):.3f})  {seconds:.0f} s",
        flush=True,
    )


def by_library(name, seed, num_rows, num_steps, make=None, batch_size=None):
    """Train by one call of `eig_flow`."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    result = eig_flow(
        twelve_variances(num_rows),
        "y",
        "variance",
        summary=None if make is None else make(),
        training=Fresh(num_steps=num_steps, batch_size=batch_size),
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - started
    simulated = simulate_posteriors(result, 2_000, 100, seed=seed)
    report(name, seed, num_rows, simulated, result.eig, result.standard_error, seconds)


def by_hand(name, seed, num_rows, num_steps, make, *, constrained=True, penalty=0.0, batch_size=128):
    """Train as the thread did: affine couplings, rate 1e-3, on the logit of the variances or on the variances."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    experiment = Experiment(twelve_variances(num_rows), "y", "variance")

    def draw(size=batch_size):
        with torch.no_grad():
            sample = sample_joint(experiment, size)
        # The log prior of the variances themselves is 0 on the unit interval.
        return (sample.theta, sample.y, sample.log_prior) if constrained else (sample.values["variance"], sample.y, 0.0)

    theta, y, _ = draw(1_000)
    flow = AffineCouplingFlow(NUM_VARIABLES, make()(y[:2]).shape[1], num_transforms=6, hidden_dim=128)
    scales = Standardise(NUM_VARIABLES).fit_(theta), Standardise(y.shape[1]).fit_(y)
    density = StandardisedDensity(flow, *scales, make())

    def terms(sample):
        theta, y, log_prior = sample
        values = density.log_prob(theta, y) - log_prior
        if not penalty:
            return values
        summaries = density.encode(y)
        off = torch.corrcoef(summaries.T) - torch.eye(summaries.shape[1])
        return values - penalty * off.square().mean()

    ascent = Ascent([{"params": list(density.parameters()), "lr": 1e-3}])
    with pyro.validation_enabled(False):
        fit_fresh(draw, terms, ascent, num_steps=num_steps, progress=False)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        theta, y, log_prior = draw(2_000)
        bound, error = mean_and_standard_error(density.log_prob(theta, y) - log_prior)
        draws = density.condition(y).sample((100,)).movedim(0, 1)
        if constrained:
            theta, draws = theta.sigmoid(), draws.sigmoid()
    columns = tuple(f"variance[{index}]" for index in range(NUM_VARIABLES))
    report(name, seed, num_rows, SimulatedPosteriors(theta, draws, columns), bound, error, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=["defaults", "thread", "width"], default="defaults")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--quick", action="store_true", help="fifty steps, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, steps = arguments.rows, 50 if arguments.quick else arguments.steps
    for seed in arguments.seeds:
        if arguments.table == "defaults":
            by_library("picked: deep set", seed, rows, steps)
            transformer = partial(SetTransformerSummary, NUM_VARIABLES, 24, num_inducing=16 if rows > 64 else None)
            by_library("set transformer", seed, rows, steps, transformer)
        elif arguments.table == "width":
            for width in (6, 12, 24, 48, 96):
                make = partial(DeepSetSummary, NUM_VARIABLES, width)
                by_library(f"deep set with moments, {width} features", seed, rows, steps, make)
            for width in (6, 12, 24, 48, 96):
                make = partial(DeepSetSummary, NUM_VARIABLES, width, moments=False)
                by_library(f"deep set without moments, {width} features", seed, rows, steps, make)
        else:
            by_hand("plain deep set", seed, rows, steps, PlainDeepSet)
            by_hand("no constraint on the variances", seed, rows, steps, PlainDeepSet, constrained=False)
            by_hand("plain MLP on all rows", seed, rows, steps, partial(PlainMLP, rows))
            by_hand("ten times the width", seed, rows, steps, partial(PlainDeepSet, summary_dim=240))
            by_hand("263 rows", seed, 263, steps, PlainDeepSet)
            by_hand("orthogonal initial weights", seed, rows, steps, partial(PlainDeepSet, orthogonal=True))
            by_hand("doubled training", seed, rows, 2 * steps, PlainDeepSet)
            by_hand("penalty on correlated summaries", seed, rows, steps, PlainDeepSet, penalty=10.0)
            by_library("ours: eig_flow(model)", seed, rows, steps)


if __name__ == "__main__":
    main()

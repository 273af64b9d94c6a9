"""Does a search by defaults find the best design? Six problems whose best design is known, several seeds each.

Each search is `optimise_design(model, ...)` with nothing else given. The design that it ends at is judged by an exact
value, computed here by closed forms, enumeration or quadrature and not by the library; it counts as found where this is
within 0.01 nats or 1 % of the best known. "Share of one start" is the processor time over that of `starts=1`, which
is run for the first `--alone` seeds of each problem. Run as

    python benchmarks/design_searches.py [--problems NAME ...] [--seeds 10] [--alone 1] [--quick] [--csv FILE]
    python benchmarks/design_searches.py --best

`--best` looks for the best designs anew, by gradient ascent on the exact values from many starts.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_voed import Fresh, optimise_design
from pyro_voed.problems import michaelis_menten as mm

NEAR, RELATIVE = 0.01, 0.01
"""A design is found where its information is within this many nats, or this share, of the best known."""


@dataclass(frozen=True)
class Problem:
    """A model with one design "xi" in a box, and the exact information of a design, `(*batch, *shape) -> (*batch)`."""

    model: Callable[[], Tensor]
    target: str
    exact: Callable[[Tensor], Tensor]
    best: float
    shape: tuple[int, ...]
    ends: tuple[float, float]

    def found(self, value: float) -> bool:
        """Say whether the information of a design is as good as the best known."""
        return value >= self.best - max(NEAR, RELATIVE * self.best)


def in_box(low: float, high: float) -> constraints.Constraint:
    return constraints.interval(low, high)


# --- Prediction -------------------------------------------------------------------------------------------------------
# A parabola is measured four times in (-1, 1) and predicted at 1.2. In powers of the distance from there, its value at
# 1.2 is the first coefficient, the target, and the other two are nuisance.

NEW_POINT, PARABOLA_NOISE = 1.2, 0.3


def prediction() -> Tensor:
    xi = pyro.param("xi", torch.tensor([-0.6, -0.2, 0.2, 0.6]), constraint=in_box(-1.0, 1.0))
    value = pyro.sample("value", dist.Normal(0.0, 1.0))
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    away = xi - NEW_POINT
    mean = value.unsqueeze(-1) + slopes[..., :1] * away + slopes[..., 1:] * away.square()
    return pyro.sample("y", dist.Normal(mean, PARABOLA_NOISE).to_event(1))


def prediction_exact(xi: Tensor) -> Tensor:
    powers = torch.stack([(xi - NEW_POINT) ** k for k in range(3)], -1)
    noise = PARABOLA_NOISE**2 * torch.eye(xi.shape[-1], dtype=xi.dtype)
    others = powers[..., 1:]
    return 0.5 * (torch.logdet(powers @ powers.mT + noise) - torch.logdet(others @ others.mT + noise))


# --- Linear regression on a box ---------------------------------------------------------------------------------------
# Four rows of three entries in (-1, 1). By Hadamard's inequality none is better than orthogonal columns of signs.

SCALES, REGRESSION_NOISE = (1.0, 1.5, 0.7), 1.0


def regression() -> Tensor:
    start = torch.tensor([[0.5, 0.1, -0.2], [0.1, 0.5, 0.3], [-0.3, 0.2, 0.5], [0.2, -0.4, 0.1]])
    xi = pyro.param("xi", start, constraint=in_box(-1.0, 1.0))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), torch.tensor(SCALES)).to_event(1))
    return pyro.sample("y", dist.Normal((xi @ theta.unsqueeze(-1)).squeeze(-1), REGRESSION_NOISE).to_event(1))


def regression_exact(xi: Tensor) -> Tensor:
    scaled = xi * torch.tensor(SCALES, dtype=xi.dtype) / REGRESSION_NOISE
    return 0.5 * torch.logdet(torch.eye(xi.shape[-2], dtype=xi.dtype) + scaled @ scaled.mT)


# --- Sensors in a Gaussian field --------------------------------------------------------------------------------------
# Three sensors in the unit square measure a field with noise; the targets are its values at five places.

PLACES = torch.tensor([[0.15, 0.2], [0.85, 0.25], [0.5, 0.55], [0.2, 0.85], [0.8, 0.8]])
LENGTH, SENSOR_NOISE = 0.35, 0.2


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-0.5 * (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) / LENGTH**2)


def sensors() -> Tensor:
    xi = pyro.param("xi", torch.tensor([[0.4, 0.4], [0.5, 0.5], [0.6, 0.6]]), constraint=in_box(0.0, 1.0))
    places = PLACES.to(xi)
    between = kernel(places, places) + 1e-6 * torch.eye(len(places))
    field = pyro.sample("field", dist.MultivariateNormal(torch.zeros(len(places)), between))
    weights = torch.linalg.solve(between, kernel(places, xi)).mT  # (*batch, num_sensors, num_places)
    left = kernel(xi, xi) - weights @ kernel(places, xi) + SENSOR_NOISE**2 * torch.eye(3)
    return pyro.sample("y", dist.MultivariateNormal((weights @ field.unsqueeze(-1)).squeeze(-1), left))


def sensors_exact(xi: Tensor) -> Tensor:
    places = PLACES.to(xi)
    noise = SENSOR_NOISE**2 * torch.eye(xi.shape[-2], dtype=xi.dtype)
    between = kernel(places, places) + 1e-6 * torch.eye(len(places), dtype=xi.dtype)
    across, own = kernel(xi, places), kernel(xi, xi) + noise
    return 0.5 * (torch.logdet(own) - torch.logdet(own - across @ torch.linalg.solve(between, across.mT)))


# --- Two doses of a drug ----------------------------------------------------------------------------------------------
# The response steps from 0 to 1 about a dose that is to be learned; far from it, both ways, it is flat.

STEP, RESPONSE_NOISE = 0.35, 0.15
DOSE_MEAN, DOSE_SCALE = 3.0, 0.7


def doses() -> Tensor:
    xi = pyro.param("xi", torch.tensor([7.0, 8.0]), constraint=in_box(0.0, 10.0))
    middle = pyro.sample("middle", dist.Normal(DOSE_MEAN, DOSE_SCALE))
    mean = torch.sigmoid((xi - middle.unsqueeze(-1)) / STEP)
    return pyro.sample("y", dist.Normal(mean, RESPONSE_NOISE).to_event(1))


def doses_exact(xi: Tensor) -> Tensor:
    """Subtract the noise's entropy from the outcome's, both integrals by the trapezoidal rule."""
    middle = DOSE_MEAN + DOSE_SCALE * torch.linspace(-5.0, 5.0, 161, dtype=xi.dtype)
    weights = torch.softmax(-0.5 * ((middle - DOSE_MEAN) / DOSE_SCALE) ** 2, 0)
    y = torch.linspace(-0.9, 1.9, 141, dtype=xi.dtype)
    means = torch.sigmoid((xi.unsqueeze(-1) - middle) / STEP)  # (*batch, 2, num_nodes)
    noise = dist.Normal(means.unsqueeze(-2), xi.new_tensor(RESPONSE_NOISE))
    each = noise.log_prob(y.unsqueeze(-1)).exp()  # (*batch, 2, num_y, num_nodes)
    joint = (each[..., 0, :, :] * weights) @ each[..., 1, :, :].mT
    entropy = -(torch.xlogy(joint, joint)).sum((-1, -2)) * (y[1] - y[0]) ** 2
    return entropy - 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(RESPONSE_NOISE))


# --- Logistic regression ----------------------------------------------------------------------------------------------
# Ten subjects at each of three doses respond or do not; the curve's middle and slope are unknown.

SUBJECTS = 10


def responders() -> Tensor:
    xi = pyro.param("xi", torch.tensor([0.5, 1.0, 1.5]), constraint=in_box(-4.0, 4.0))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    logits = torch.exp(0.5 * theta[..., 1:]) * (xi - theta[..., :1])
    return pyro.sample("y", dist.Binomial(SUBJECTS, logits=logits).to_event(1))


def responders_exact(xi: Tensor) -> Tensor:
    """Sum over all outcomes, integrate over the parameters by the trapezoidal rule."""
    axis = torch.linspace(-5.0, 5.0, 41, dtype=xi.dtype)
    middle, slope = torch.cartesian_prod(axis, axis).unbind(-1)
    weights = torch.softmax(-0.5 * (middle**2 + slope**2), 0)
    counts = torch.arange(SUBJECTS + 1, dtype=xi.dtype)
    logits = torch.exp(0.5 * slope) * (xi.unsqueeze(-1) - middle)  # (*batch, 3, num_nodes)
    scores = dist.Binomial(SUBJECTS, logits=logits.unsqueeze(-1)).log_prob(counts)  # (*batch, 3, num_nodes, 11)
    each = scores.exp()
    inner = (each * scores).sum(-1).sum(-2) @ weights  # minus the entropy given the parameters
    a, b, c = each.unbind(-3)
    pairs = (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)  # (*batch, num_nodes, 121)
    joint = (weights.unsqueeze(-1) * pairs).mT @ c
    return inner - torch.xlogy(joint, joint).sum((-1, -2))


def michaelis_menten_exact(xi: Tensor) -> Tensor:
    return mm.exact_eig(xi)[0]


PROBLEMS = {
    "Michaelis-Menten": Problem(mm.michaelis_menten(), "theta", michaelis_menten_exact, 3.7107, (7,), (0.0, 1.0)),
    "prediction": Problem(prediction, "value", prediction_exact, 1.4795, (4,), (-1.0, 1.0)),
    "regression": Problem(regression, "theta", regression_exact, 2.4986, (4, 3), (-1.0, 1.0)),
    "sensors": Problem(sensors, "field", sensors_exact, 4.8643, (3, 2), (0.0, 1.0)),
    "two doses": Problem(doses, "middle", doses_exact, 1.0841, (2,), (0.0, 10.0)),
    "responders": Problem(responders, "theta", responders_exact, 1.3075, (3,), (-4.0, 4.0)),
}


def best_of_many(problem: Problem, num_starts: int, num_steps: int) -> tuple[Tensor, Tensor]:
    """Climb the exact information from many starts drawn in the box; return designs and values, the best first."""
    low, high = problem.ends
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(num_starts, *problem.shape, generator=generator, dtype=torch.double).mul(1.5).requires_grad_()
    optimiser = torch.optim.Adam([inner], lr=0.05)
    for _ in range(num_steps):
        optimiser.zero_grad()
        (-problem.exact(low + (high - low) * torch.sigmoid(inner)).sum()).backward()
        optimiser.step()
    designs = (low + (high - low) * torch.sigmoid(inner)).detach()
    values = problem.exact(designs)
    order = values.argsort(descending=True)
    return designs[order], values[order]


def timed_search(problem: Problem, seed: int, **options: object) -> tuple[Tensor, float, str]:
    """Return the design that a search ends at, its processor time and why it stopped."""
    pyro.clear_param_store()
    started = time.process_time()
    result = optimise_design(problem.model, "y", problem.target, seed=seed, progress=False, **options)
    return result.designs["xi"], time.process_time() - started, result.history.stop_reason


def rows_of(name: str, seeds: Sequence[int], alone: int, options: dict[str, object]) -> list[dict[str, object]]:
    """Search one problem with each seed; the first few from one start too."""
    problem, rows = PROBLEMS[name], []
    for seed in seeds:
        for kind, own in [("default", {}), *([("one start", {"starts": 1})] if seed < alone else [])]:
            design, seconds, reason = timed_search(problem, seed, **options, **own)
            value = problem.exact(design.double()).item()
            rows.append(
                {
                    "problem": name,
                    "search": kind,
                    "seed": seed,
                    "exact": value,
                    "best": problem.best,
                    "found": problem.found(value),
                    "seconds": seconds,
                    "stopped": reason,
                    "design": " ".join(f"{x:.3f}" for x in design.flatten().tolist()),
                }
            )
            print(*(f"{x:.4g}" if isinstance(x, float) else x for x in rows[-1].values()), sep=", ", flush=True)
    return rows


def table(rows: Sequence[dict[str, object]]) -> str:
    """Return one line a problem."""
    lines = [
        "| problem | best known | found | lowest | median | processor seconds, median | share of one start |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == name]
        default = [row for row in own if row["search"] == "default"]
        values = torch.tensor([row["exact"] for row in default])
        seconds = torch.tensor([row["seconds"] for row in default])
        pairs = {row["seed"]: row["seconds"] for row in own if row["search"] == "one start"}
        shares = [row["seconds"] / pairs[row["seed"]] for row in default if row["seed"] in pairs]
        share = f"{torch.tensor(shares).median():.2f}" if shares else "-"
        lines.append(
            f"| {name} | {default[0]['best']:.4f} | {sum(row['found'] for row in default)} of {len(default)} | "
            f"{values.min():.4f} | {values.median():.4f} | {seconds.median():.0f} | {share} |"
        )
    total = [row["found"] for row in rows if row["search"] == "default"]
    return "\n".join([*lines, "", f"found: {sum(total)} of {len(total)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--alone", type=int, default=1, help="seeds that are searched from one start too")
    parser.add_argument("--best", action="store_true", help="look for the best designs of the exact values")
    parser.add_argument("--quick", action="store_true", help="one short search each, to see that it runs")
    parser.add_argument("--csv", help="file for the searches, one a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.best:
        for name in arguments.problems:
            if name != "Michaelis-Menten":  # its quadrature carries no gradients
                slow = name in ("two doses", "responders")
                designs, values = best_of_many(PROBLEMS[name], 8 if slow else 200, 200 if slow else 2_000)
                print(f"{name}: {values[0]:.5f} at {designs[0].tolist()}; quartiles {values.quantile(Q).tolist()}")
        return
    options = {"training": Fresh(max_steps=60), "num_samples": 200} if arguments.quick else {}
    seeds, alone = (1, 0) if arguments.quick else (arguments.seeds, arguments.alone)
    rows = [row for name in arguments.problems for row in rows_of(name, range(seeds), alone, options)]
    print(table(rows))
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


Q = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.double)

if __name__ == "__main__":
    main()

"""Models that the laws of simulating, packing and scoring are about, and how draws are compared."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten

Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""


CLOSE = {"rtol": 2e-4, "atol": 2e-4}
"""Coordinates are mapped there and back in single precision."""


def assert_same_distribution(first, second):
    """Means and second moments agree within their joint standard errors."""
    for power in (1, 2):
        a, b = first.double() ** power, second.double() ** power
        error = (a.var(0) / a.shape[0] + b.var(0) / b.shape[0]).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= Z_MAX * error + 1e-9).all()


def candidates(experiment, *batch):
    """Designs of a batch, inside their constraints and all different."""
    sites = {site.name: (site.transform, site.value) for site in experiment.designs}
    steps = {name: 0.5 * torch.randn(*batch, *value.shape) for name, (_, value) in sites.items()}
    return {name: transform(transform.inv(value) + steps[name]).detach() for name, (transform, value) in sites.items()}


def normal(name, loc=0.0, scale=1.0, **options):
    return pyro.sample(name, dist.Normal(loc, scale), **options)


def scalar_design():
    xi = pyro.param("xi", torch.tensor(0.7), constraint=constraints.interval(0.0, 2.0))
    return normal("y", xi * normal("theta"), 0.5)


def event_design():
    xi = pyro.param("xi", torch.tensor([0.2, 0.5, 0.8]), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
    mean = theta[..., :1] * xi / (xi + theta[..., 1:])
    return pyro.sample("y", dist.LogNormal(mean, 0.2).to_event(1))


def plate_design():
    xi = pyro.param("xi", torch.tensor([0.2, 0.5, 0.8]))
    slope = normal("slope")
    with pyro.plate("points", 3):
        return normal("y", normal("intercept") + slope * xi, 0.5)


def scalar_design_beside_a_plate():
    xi = pyro.param("xi", torch.tensor(0.7))
    with pyro.plate("points", 3):
        return normal("y", xi * normal("theta"), 0.5)


def several_designs():
    dose = pyro.param("dose", torch.tensor(0.7), constraint=constraints.positive)
    times = pyro.param("times", torch.tensor([1.0, 2.0]))
    theta = pyro.sample("theta", dist.Gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(dose.unsqueeze(-1) * torch.exp(-theta.unsqueeze(-1) * times), 0.1).to_event(1))
    pyro.sample("count", dist.Poisson(dose * theta))


def bounded_chain():
    xi = pyro.param("xi", torch.tensor(0.7))
    a = pyro.sample("a", dist.Uniform(1.0, 3.0))
    b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
    return normal("y", xi * (a + b), 0.5)


WITH_DESIGNS = {
    "scalar design": (scalar_design, "y", "theta"),
    "event design": (event_design, "y", "theta"),
    "design in a plate": (plate_design, "y", None),
    "scalar design beside a plate": (scalar_design_beside_a_plate, "y", None),
    "several designs": (several_designs, ["y", "count"], None),
    "matrix design": (linear_gaussian.linear_gaussian(), "y", None),
    "nuisance, deterministic outcome": (implicit_toy.implicit_pair(), "y", "theta"),
    "dependent bounds": (bounded_chain, "y", None),
    "michaelis_menten": (michaelis_menten.michaelis_menten(), "y", None),
}


def nested_plates():
    mu = normal("mu")
    with pyro.plate("groups", 2, dim=-2):
        theta = normal("theta", mu)
        with pyro.plate("people", 3, dim=-1):
            normal("y", theta)


def simplex():
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("y", dist.Normal(shares, 0.3).to_event(1))


def discrete_outcome():
    pyro.sample("y", dist.Poisson(2.0 * pyro.sample("theta", dist.Gamma(3.0, 1.0))))


def discrete_target():
    coin = pyro.sample("coin", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    normal("y", normal("theta") * (coin + 1.0))


def masked():
    theta = normal("theta", torch.zeros(1))
    with pyro.plate("measurements", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        normal("y", theta)


def masked_counts():
    theta = normal("theta", torch.zeros(1))
    with pyro.plate("measurements", 4), poutine.mask(mask=torch.tensor([True, False, True, False])):
        pyro.sample("y", dist.Poisson(theta.exp()))


def correlated():
    theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]])))
    pyro.sample("y", dist.MultivariateNormal(theta, torch.tensor([[1.0, -0.3], [-0.3, 0.5]])))


def moving_support():
    theta = normal("theta")
    pyro.sample("y", dist.Uniform(theta - 0.5, theta + 0.5))


def linked():
    theta = normal("theta")
    normal("z", theta + 0.8 * normal("y", theta))


def own_scales():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    theta = pyro.sample("theta", dist.Normal(torch.tensor([5.0, -2.0]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(theta, scale.unsqueeze(-1) * torch.tensor([1.0, 0.1])).to_event(1))
    normal("z", theta[..., 0], 2.0)


EXPLICIT = {
    **{name: case for name, case in WITH_DESIGNS.items() if "deterministic" not in name},
    "finite": (finite.finite(), "y"),
    "nested plates": (nested_plates, "y"),
    "simplex": (simplex, "y"),
    "discrete outcome": (discrete_outcome, "y"),
    "discrete target": (discrete_target, "y"),
    "masked": (masked, "y"),
    "masked counts": (masked_counts, "y"),
    "correlated": (correlated, "y"),
    "moving support": (moving_support, "y"),
    "normals of many scales": (own_scales, ["y", "z"]),
    "linked outcomes": (linked, ["y", "z"]),
}
with_designs = pytest.mark.parametrize("case", WITH_DESIGNS.values(), ids=WITH_DESIGNS)
explicit = pytest.mark.parametrize("case", EXPLICIT.values(), ids=EXPLICIT)
both_ways = pytest.mark.parametrize("vectorize", [True, False], ids=["together", "one by one"])

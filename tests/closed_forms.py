"""Small models whose expected information gain is known at every design."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints


def gain_eig(gain):
    """Exact for `scaled` and `scalar`."""
    return 0.5 * torch.log1p(torch.as_tensor(gain) ** 2)


def scaled():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def scalar():
    xi = pyro.param("xi", torch.tensor(1.5), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def masked():
    """Two of three measurements."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0))
    with pyro.plate("measurements", 3), pyro.poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("y", dist.Normal(theta, 1.0))


MASKED_EIG = 0.5 * math.log(3.0)


def poisson(exposure=2.0):
    """Gamma prior and Poisson outcome, exact posteriors Gamma(3 + y, 1 + xi)."""
    xi = pyro.param("xi", torch.tensor(exposure), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Gamma(3.0, 1.0))
    pyro.sample("y", dist.Poisson(xi * theta))


def poisson_eig(exposure=2.0):
    """Prior entropy less the mean entropy of the posteriors."""
    y = torch.arange(0.0, 400.0).double()
    mass = dist.NegativeBinomial(torch.tensor(3.0).double(), exposure / (1 + exposure)).log_prob(y).exp()
    posterior = dist.Gamma(3.0 + y, torch.as_tensor(1.0 + exposure).double()).entropy()
    return (dist.Gamma(torch.tensor(3.0).double(), 1.0).entropy() - (mass * posterior).sum()).item()


def check_bounds(result, exact, gap, errors=4.0):
    """A lower bound, no further below the exact value than `gap`, which short training may leave.

    A right bound exceeds the exact value by more than four standard errors with probability 3e-5.
    """
    assert (result.eig - errors * result.standard_error < exact).all(), f"{result.eig}, exact {exact}"
    assert (exact - result.eig < gap + errors * result.standard_error).all(), f"{result.eig}, exact {exact}"

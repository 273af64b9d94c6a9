"""One gain, one Gaussian: information at any design in closed form, for ensembles and amortised densities."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

Z = 4.0
"""A right bound exceeds the exact value by more than this many standard errors with probability 3e-5."""

DESIGNS = torch.tensor([0.0, 0.6, 1.2, 2.0])
QUIET = {"seed": 0, "progress": False}


def exact_eig(gain):
    return 0.5 * torch.log1p(torch.as_tensor(gain) ** 2)


EXACT = exact_eig(DESIGNS)


def scaled():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def check_bounds(result, exact, gap):
    """A lower bound, no further below the exact value than `gap`, which short training may leave."""
    assert (result.eig - Z * result.standard_error < exact).all(), f"{result.eig}, exact {exact}"
    assert (exact - result.eig < gap + Z * result.standard_error).all(), f"{result.eig}, exact {exact}"

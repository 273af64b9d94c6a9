"""One model written in the ways its users write it has one expected information gain.

Each pair of estimates is held to 4.5 joint standard errors plus the flow's gap, which an exact pair misses with
probability 7e-6; the exact value is log(1 + 4) / 2.
"""

import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import constraints

from pyro_voed import Experiment, Fresh, Pool, eig_flow
from pyro_voed.densities import AffineCouplingFlow

EXACT = 0.5 * math.log(5.0)
GAP = 0.02


def small_flow(dim, context_dim):
    return AffineCouplingFlow(dim, context_dim, num_transforms=1, hidden_dim=32)


def design():
    return pyro.param("xi", torch.tensor(2.0), constraint=constraints.positive)


def plain():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(design() * theta, 1.0))


def with_data():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(design() * theta, 1.0), obs=torch.tensor(0.7))


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.xi = PyroParam(torch.tensor(2.0), constraints.positive)
        self.theta = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        return pyro.sample("y", dist.Normal(self.xi * self.theta, 1.0), obs=torch.tensor(0.7))


def black_box():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    mean = torch.as_tensor(numpy.multiply(design().detach().numpy(), theta.numpy()))
    return pyro.sample("y", dist.Normal(mean, 1.0))


def estimate(model, **options):
    training = Fresh(num_steps=250, batch_size=128, learning_rate=1e-2)
    return eig_flow(model, density=small_flow, seed=3, **{"training": training, "num_samples": 5_000, **options})


def one_by_one(model):
    experiment = Experiment(model, "y", "theta", vectorize=False)
    return estimate(experiment, training=Pool(2_000, batch_size=128, learning_rate=1e-2, patience=5), num_samples=2_000)


WAYS = {
    "plain": lambda: estimate(Experiment(plain, "y", "theta")),
    "with obs=": lambda: estimate(with_data),
    "PyroModule": lambda: estimate(Module()),
    "one by one": lambda: one_by_one(plain),
    "NumPy inside, one by one": lambda: one_by_one(black_box),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_gives_the_same_information(way):
    result = WAYS[way]()
    # A pool of 2,000 simulations leaves a larger gap than fresh ones.
    gap = 0.05 if "one by one" in way else GAP
    assert EXACT - gap - 4.5 * result.standard_error <= result.eig <= EXACT + 4.5 * result.standard_error


def test_a_pyro_module_with_local_parameters():
    with pyro.settings.context(module_local_params=True):
        result = estimate(Module())
    assert EXACT - GAP - 4.5 * result.standard_error <= result.eig <= EXACT + 4.5 * result.standard_error


def test_a_black_box_run_together_is_refused_with_the_remedy():
    def scalar_only():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(math.sin(theta.item()), 1.0))

    with pytest.raises(ValueError, match="vectorize=False"):
        eig_flow(scalar_only, "y")

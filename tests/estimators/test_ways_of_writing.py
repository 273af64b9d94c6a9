"""One model written in the ways its users write it has one expected information gain.

Each estimate is held to 4.5 standard errors of the exact value plus the flow's gap, which an exact one misses with
probability 7e-6.
"""

import functools
import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample

from pyro_voed import Experiment, Fresh, Pool, eig_flow
from pyro_voed.densities import AffineCouplingFlow
from tests.closed_forms import check_bounds, gain_eig
from tests.estimators.cases import normal, positive

small_flow = functools.partial(AffineCouplingFlow, num_transforms=1, hidden_dim=32)


def plain():
    theta = normal("theta")
    normal("y", positive("xi", 2.0) * theta)


def with_data():
    theta = normal("theta")
    pyro.sample("y", dist.Normal(positive("xi", 2.0) * theta, 1.0), obs=torch.tensor(0.7))


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.xi = PyroParam(torch.tensor(2.0), constraints.positive)
        self.theta = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        return pyro.sample("y", dist.Normal(self.xi * self.theta, 1.0), obs=torch.tensor(0.7))


def black_box():
    theta = normal("theta")
    normal("y", torch.as_tensor(numpy.multiply(positive("xi", 2.0).detach().numpy(), theta.numpy())))


WAYS = {
    "plain": (plain, {}),
    "with obs=": (with_data, {}),
    "PyroModule": (Module, {}),
    "PyroModule with local parameters": (Module, {"module_local_params": True}),
    "one by one": (plain, {}),
    "NumPy inside, one by one": (black_box, {}),
}


@pytest.mark.parametrize(
    # One of the two that run one by one tells of both by default.
    "way",
    [pytest.param(way, marks=[pytest.mark.slow] if way == "one by one" else []) for way in WAYS],
)
def test_every_way_of_writing_gives_the_same_information(way):
    model, settings = WAYS[way]
    one_by_one = way.endswith("one by one")
    training, num_samples = Fresh(num_steps=250, batch_size=128, learning_rate=1e-2), 5_000
    if one_by_one:
        training, num_samples = Pool(2_000, batch_size=128, learning_rate=1e-2, patience=5), 2_000
    with pyro.settings.context(**settings):
        model = Module() if model is Module else model
        experiment = Experiment(model, "y", "theta", vectorize=not one_by_one)
        result = eig_flow(experiment, density=small_flow, training=training, num_samples=num_samples, seed=3)
    # A pool of 2,000 simulations leaves a larger gap than fresh ones.
    check_bounds(result, gain_eig(2.0), 0.05 if one_by_one else 0.02, errors=4.5)


def test_a_black_box_run_together_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="vectorize=False"):
        eig_flow(lambda: normal("y", math.sin(normal("theta").item())), "y")

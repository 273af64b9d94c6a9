"""Discrete targets: which model, which disease, when the change was."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "discrete"


def model_discrimination():
    """Is the response linear or does it saturate? Parameters of both are nuisances."""
    x = pyro.param("x", torch.tensor([0.5, 2.0, 5.0]))
    saturates = pyro.sample("saturates", dist.Bernoulli(0.5))
    slope = pyro.sample("slope", dist.Normal(1.0, 0.2))
    highest = pyro.sample("highest", dist.Normal(4.0, 0.8))
    half = pyro.sample("half", dist.LogNormal(0.5, 0.3))
    with pyro.plate("readings", 3):
        mean = torch.where(saturates > 0, highest * x / (half + x), slope * x)
        pyro.sample("y", dist.Normal(mean, 0.4))


def diagnosis():
    """Four diseases, three tests and a marker in the blood."""
    table = torch.tensor([[0.1, 0.2, 0.05], [0.8, 0.3, 0.1], [0.3, 0.9, 0.2], [0.5, 0.5, 0.9]])
    place = torch.tensor([0.0, 1.0, 1.5, -1.0])
    disease = pyro.sample("disease", dist.Categorical(torch.tensor([0.5, 0.25, 0.15, 0.1])))
    pyro.sample("tests", dist.Bernoulli(table[disease]).to_event(1))
    pyro.sample("marker", dist.Normal(place[disease], 1.0))


def change_point():
    """The week after which a rate of two became five, from ten weekly counts."""
    week = pyro.sample("week", dist.Categorical(torch.ones(9)))
    with pyro.plate("weeks", 10) as number:
        rate = torch.where(number <= week, 2.0, 5.0)
        pyro.sample("count", dist.Poisson(rate))


MODELS = [
    SuiteModel(
        "model_discrimination", FAMILY, model_discrimination, ("y",), ("saturates",), 0.58007, 1e-04,
        "nuisances in closed form and by quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "diagnosis", FAMILY, diagnosis, ("tests", "marker"), ("disease",), 0.629165, 1e-08,
        "sum over tests, quadrature over the marker",
    ),
    SuiteModel(
        "change_point", FAMILY, change_point, ("count",), ("week",), 1.12486, 2e-04,
        "sum over classes, averaged over Sobol outcomes",
    ),
]  # fmt: skip

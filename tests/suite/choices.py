"""Choices and judgements: alternatives with attributes, ordered answers, psychometric functions, delayed rewards."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from tests.suite.record import SuiteModel

FAMILY = "choices"

ATTRIBUTES = torch.tensor(
    [
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
        [[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]],
        [[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]],
        [[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]],
        [[1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]],
        [[0.5, -0.5], [0.0, 1.0], [1.0, 0.0]],
    ]
)


def softmax_choice():
    """Tastes of a customer from six choices among three offers with two attributes."""
    taste = pyro.sample("taste", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    utility = (ATTRIBUTES * taste[..., None, None, :]).sum(-1)
    pyro.sample("choice", dist.Categorical(logits=utility).to_event(1))


def ordinal():
    """Ability from five items answered on four levels."""
    difficulty = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("items", 5):
        pyro.sample("answer", dist.OrderedLogistic(1.5 * (ability - difficulty), torch.tensor([-1.5, 0.0, 1.5])))


def psychometric():
    """Threshold and slope of a two-alternative task with lapses, ten trials at three levels."""
    level = pyro.param("level", torch.tensor([-0.5, 0.5, 1.5]))
    threshold = pyro.sample("threshold", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.LogNormal(0.5, 0.5))
    lapse = pyro.sample("lapse", dist.Beta(2.0, 20.0))
    with pyro.plate("levels", 3):
        detected = torch.sigmoid(slope * (level - threshold))
        pyro.sample("correct", dist.Binomial(10, 0.5 + (0.5 - lapse / 2) * detected))


def delay_discounting():
    """Eight choices of a small reward now or a larger one later; the noise of choice is a nuisance."""
    delays = torch.tensor([1.0, 3.0, 7.0, 14.0, 30.0, 60.0, 90.0, 180.0])
    delay = pyro.param("delay", delays, constraint=constraints.positive)
    rate = pyro.sample("rate", dist.LogNormal(-3.0, 1.0))
    temperature = pyro.sample("temperature", dist.LogNormal(0.0, 0.5))
    with pyro.plate("trials", 8):
        later = 20.0 / (1.0 + rate * delay)
        pyro.sample("waits", dist.Bernoulli(logits=(later - 10.0) / (2.0 * temperature)))


MODELS = [
    SuiteModel(
        "softmax_choice", FAMILY, softmax_choice, ("choice",), ("taste",), 0.990617, 3e-08,
        "sum over outcomes, quadrature",
    ),
    SuiteModel("ordinal", FAMILY, ordinal, ("answer",), ("ability",), 0.672909, 2e-09, "sum over outcomes, quadrature"),
    SuiteModel(
        "psychometric", FAMILY, psychometric, ("correct",), ("threshold", "slope"), 0.66101, 2e-06,
        "sum over outcomes, quadrature over targets and nuisance",
    ),
    SuiteModel(
        "delay_discounting", FAMILY, delay_discounting, ("waits",), ("rate",), 0.658059, 5e-09,
        "sum over outcomes, quadrature over target and nuisance",
    ),
]  # fmt: skip

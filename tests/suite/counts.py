"""Counts: rates with exposures, excess zeros, marked animals, shares of a whole."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from tests.suite.record import SuiteModel

FAMILY = "counts"


def gamma_poisson():
    """Accidents at ten sites of different size."""
    sizes = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 1.0, 1.0])
    exposure = pyro.param("exposure", sizes, constraint=constraints.positive)
    rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
    with pyro.plate("sites", 10):
        pyro.sample("accidents", dist.Poisson(exposure * rate))


def zero_inflated():
    """Eggs in eight nests, some of them abandoned."""
    gate = pyro.sample("gate", dist.Beta(2.0, 4.0))
    rate = pyro.sample("rate", dist.Gamma(4.0, 1.0))
    with pyro.plate("nests", 8):
        pyro.sample("eggs", dist.ZeroInflatedPoisson(rate, gate=gate))


def capture_recapture():
    """Size of a population of ten to forty from two catches with an unknown share caught."""
    extra = pyro.sample("extra", dist.Categorical(torch.ones(31)))
    share = pyro.sample("share", dist.Beta(4.0, 4.0))
    size = 10.0 + extra
    first = pyro.sample("first", dist.Binomial(size, share))
    pyro.sample("again", dist.Binomial(first, share))
    pyro.sample("new", dist.Binomial(size - first, share))


def dirichlet_multinomial():
    """Shares of three kinds among twelve."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])))
    pyro.sample("counts", dist.Multinomial(12, shares))


MODELS = [
    SuiteModel(
        "gamma_poisson", FAMILY, gamma_poisson, ("accidents",), ("rate",), 0.799046, 1e-08,
        "sum over the total, conjugate posterior",
    ),
    SuiteModel(
        "zero_inflated", FAMILY, zero_inflated, ("eggs",), ("gate", "rate"), 1.17775, 9e-05,
        "sum over number of zeros and total, quadrature",
    ),
    SuiteModel(
        "capture_recapture", FAMILY, capture_recapture, ("first", "again", "new"), ("extra",), 0.892421, 1e-08,
        "sum over all catches, share integrated in closed form",
    ),
    SuiteModel(
        "dirichlet_multinomial", FAMILY, dirichlet_multinomial, ("counts",), ("shares",), 1.042564, 1e-08,
        "sum over outcomes, conjugate posterior",
    ),
]  # fmt: skip

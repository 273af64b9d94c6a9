"""Heavy tails, wild scales and readings that went wrong."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "tails"


def cauchy_location():
    """Five readings with Cauchy noise."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("readings", 5):
        pyro.sample("y", dist.Cauchy(theta, 0.5))


def student_t_line():
    """A line through six readings with outliers."""
    x = pyro.param("x", torch.linspace(-1.0, 1.0, 6))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.StudentT(3.0, intercept + slope * x, 0.3))


def lognormal_decay():
    """Activity of a sample at five times, errors in proportion to the activity."""
    times = pyro.param("times", torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]))
    activity = pyro.sample("activity", dist.LogNormal(3.0, 0.5))
    decay = pyro.sample("decay", dist.Normal(0.3, 0.1))
    with pyro.plate("readings", 5):
        pyro.sample("y", dist.LogNormal(activity.log() - decay * times, 0.2))


def exploding_poisson():
    """A count whose rate is known to a factor of twenty."""
    log_rate = pyro.sample("log_rate", dist.Normal(0.0, 3.0))
    pyro.sample("count", dist.Poisson(log_rate.exp()))


def exponential_of_noise():
    """y = exp(3 theta + 1.5 e)."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(3.0 * theta, 1.5))


def gross_errors():
    """One reading in a hundred is 1e6."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    bad = pyro.sample("bad", dist.Bernoulli(0.01))
    reading = pyro.sample("reading", dist.Normal(theta, 0.5))
    pyro.deterministic("y", torch.where(bad > 0, torch.tensor(1e6), reading))


def missing_marker():
    """A reading above the range of the instrument is stored as -999."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    reading = pyro.sample("reading", dist.Normal(theta, 0.5))
    pyro.deterministic("y", torch.where(theta > 1.0, torch.tensor(-999.0), reading))


def cubed():
    """The cube of a precise reading."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 0.05))
    pyro.deterministic("y", (theta + noise) ** 3)


MODELS = [
    SuiteModel(
        "cauchy_location", FAMILY, cauchy_location, ("y",), ("theta",), 1.09458, 1e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "student_t_line", FAMILY, student_t_line, ("y",), ("intercept", "slope"), 3.33454, 5e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "lognormal_decay", FAMILY, lognormal_decay, ("y",), ("activity", "decay"), 2.951317, 1e-08,
        "closed form: linear and Gaussian in logarithms",
    ),
    SuiteModel(
        "exploding_poisson", FAMILY, exploding_poisson, ("count",), ("log_rate",), 1.418979, 4e-07,
        "sum over counts, quadrature; large counts by an integral",
    ),
    SuiteModel(
        "exponential_of_noise", FAMILY, exponential_of_noise, ("y",), ("theta",), 0.804719, 1e-12,
        "closed form: Gaussian in logarithms",
    ),
    SuiteModel(
        "gross_errors", FAMILY, gross_errors, ("y",), ("theta",), 0.796672, 1e-12,
        "closed form: share of good readings",
    ),
    SuiteModel(
        "missing_marker", FAMILY, missing_marker, ("y",), ("theta",), 0.955626, 1e-08,
        "entropy of the marker and quadrature",
    ),
    SuiteModel("cubed", FAMILY, cubed, ("y",), ("theta",), 2.996981, 1e-12, "closed form: cubing loses nothing"),
]  # fmt: skip

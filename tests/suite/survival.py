"""Survival times and censored readings: what is observed is computed from what happened."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "survival"


def exponential_censored():
    """Twelve patients with a constant hazard, followed for one year."""
    hazard = pyro.sample("hazard", dist.Gamma(2.0, 1.0))
    with pyro.plate("patients", 12):
        death = pyro.sample("death", dist.Exponential(hazard))
        pyro.deterministic("time", death.clamp(max=1.0))
        pyro.deterministic("died", (death < 1.0).float())


def weibull_censored():
    """Eight bearings, taken off the test rig after a time of 1.5."""
    shape = pyro.sample("shape", dist.LogNormal(0.3, 0.4))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("bearings", 8):
        failure = pyro.sample("failure", dist.Weibull(scale, shape))
        pyro.deterministic("hours", failure.clamp(max=1.5))
        pyro.deterministic("failed", (failure < 1.5).float())


def tobit():
    """A line whose negative readings are reported as zero."""
    x = pyro.param("x", torch.linspace(-1.0, 1.0, 5))
    intercept = pyro.sample("intercept", dist.Normal(0.5, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 5):
        latent = pyro.sample("latent", dist.Normal(intercept + slope * x, 0.5))
        pyro.deterministic("y", latent.clamp(min=0.0))


def machine_failures():
    """Failure rates of three machines from five lifetimes each."""
    with pyro.plate("machines", 3, dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("lifetimes", 5, dim=-2):
            pyro.sample("lifetime", dist.Exponential(rate))


MODELS = [
    SuiteModel(
        "exponential_censored", FAMILY, exponential_censored, ("time", "died"), ("hazard",), 0.89211, 5e-05,
        "conjugate posterior, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "weibull_censored", FAMILY, weibull_censored, ("hours", "failed"), ("shape", "scale"), 1.08922, 1e-03,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "tobit", FAMILY, tobit, ("y",), ("intercept", "slope"), 2.32064, 5e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "machine_failures", FAMILY, machine_failures, ("lifetime",), ("rate",), 2.054011, 1e-09,
        "closed form: conjugate, mean of a log beta",
    ),
]  # fmt: skip

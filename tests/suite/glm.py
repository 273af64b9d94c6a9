"""Generalised linear models: logistic, probit, Poisson with small and large means, negative binomial."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "glm"


def logistic_dose():
    """Deaths at six doses, one animal a dose."""
    dose = pyro.param("dose", torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]))
    alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(1.0, 1.0))
    with pyro.plate("animals", 6):
        pyro.sample("dead", dist.Bernoulli(logits=alpha + beta * dose))


def probit_groups():
    """Responders among ten at each of three doses, probit link."""
    dose = torch.tensor([-1.0, 0.0, 1.0])
    weights = pyro.sample("weights", dist.Normal(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.5])).to_event(1))
    score = weights[..., 0:1] + weights[..., 1:2] * dose
    probability = torch.special.ndtr(score).clamp(1e-6, 1 - 1e-6)
    pyro.sample("responders", dist.Binomial(10, probability).to_event(1))


def poisson_trend():
    """Rare events in two periods of three weeks each."""
    base = pyro.sample("base", dist.Normal(0.5, 0.7))
    trend = pyro.sample("trend", dist.Normal(0.0, 0.5))
    with pyro.plate("period", 2, dim=-1) as period, pyro.plate("week", 3, dim=-2):
        pyro.sample("events", dist.Poisson(torch.exp(base + trend * period)))


def poisson_large():
    """One count of about a thousand."""
    rate = pyro.sample("rate", dist.LogNormal(7.0, 0.3))
    pyro.sample("count", dist.Poisson(rate))


def negative_binomial():
    """Two overdispersed counts; the dispersion is a nuisance."""
    dispersion = pyro.sample("dispersion", dist.Gamma(4.0, 1.0))
    log_mean = pyro.sample("log_mean", dist.Normal(1.0, 0.6))
    with pyro.plate("sites", 2):
        pyro.sample("count", dist.NegativeBinomial(dispersion, logits=log_mean - dispersion.log()))


MODELS = [
    SuiteModel(
        "logistic_dose", FAMILY, logistic_dose, ("dead",), ("alpha", "beta"), 0.712906, 2e-09,
        "sum over outcomes, quadrature",
    ),
    SuiteModel(
        "probit_groups", FAMILY, probit_groups, ("responders",), ("weights",), 1.842211, 3e-09,
        "sum over outcomes, quadrature",
    ),
    SuiteModel(
        "poisson_trend", FAMILY, poisson_trend, ("events",), ("base", "trend"), 1.21798, 5e-04,
        "sum over both totals, quadrature",
    ),
    SuiteModel(
        "poisson_large", FAMILY, poisson_large, ("count",), ("rate",), 2.301373, 2e-09,
        "sum over outcomes, quadrature",
    ),
    SuiteModel(
        "negative_binomial", FAMILY, negative_binomial, ("count",), ("log_mean",), 0.348095, 8e-07,
        "sum over outcomes, quadrature over target and nuisance",
    ),
]  # fmt: skip

"""Hierarchies: groups, subjects, schools, with hyperparameters as targets or as nuisances."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "hierarchies"


def group_mean():
    """Mean of all groups; their spread and their own effects are nuisances."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 6):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(effect, 0.5))


def funnel():
    """Log variance of eight group effects, read with noise."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, torch.exp(v / 2)))
        pyro.sample("y", dist.Normal(effect, 1.0))


def random_effects():
    """Effect of a treatment on four subjects, each measured with and without it."""
    treatment = pyro.sample("treatment", dist.Normal(0.0, 1.0))
    with pyro.plate("subjects", 4, dim=-1):
        subject = pyro.sample("subject", dist.Normal(0.0, 2.0))
        with pyro.plate("conditions", 2, dim=-2):
            treated = torch.tensor([[0.0], [1.0]])
            pyro.sample("y", dist.Normal(subject + treatment * treated, 0.8))


def eight_schools():
    """Overall effect of coaching and its spread between eight schools."""
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(10.0))
    with pyro.plate("schools", 8):
        score = pyro.sample("score", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * score, errors))


def group_effects():
    """The effects of five groups themselves, whose spread is a nuisance."""
    tau = pyro.sample("tau", dist.HalfNormal(1.5))
    with pyro.plate("groups", 5):
        effect = pyro.sample("effect", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(effect, 0.5))


MODELS = [
    SuiteModel(
        "group_mean", FAMILY, group_mean, ("y",), ("mu",), 1.03577, 5e-04,
        "effects in closed form, quadrature over target and nuisance, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "funnel", FAMILY, funnel, ("y",), ("v",), 1.01096, 1e-07,
        "effects in closed form, quadrature over the sum of squares",
    ),
    SuiteModel("random_effects", FAMILY, random_effects, ("y",), ("treatment",), 0.735832, 1e-08, "closed form"),
    SuiteModel(
        "eight_schools", FAMILY, eight_schools, ("y",), ("mu", "tau"), 1.52003, 4e-04,
        "chain rule: the spread by quadrature and averaging, the mean given it in closed form",
    ),
    SuiteModel(
        "group_effects", FAMILY, group_effects, ("y",), ("effect",), 4.834083, 1e-07,
        "chain rule: the spread by quadrature, the effects given it in closed form",
    ),
]  # fmt: skip

"""Mixtures and bounded noise: labels, outliers, weights, uniform noise, detectors clipped at both ends."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "mixtures"


def component_mean():
    """Mean of the cluster that three readings come from; which of two clusters it is, is unknown."""
    label = pyro.sample("label", dist.Bernoulli(0.3))
    mean = pyro.sample("mean", dist.Normal(4.0 * label - 2.0, 0.5))
    with pyro.plate("readings", 3):
        pyro.sample("y", dist.Normal(mean, 0.5))


def two_component_noise():
    """Six readings, one in ten of them ten times as noisy."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("readings", 6):
        scales = torch.tensor([0.3, 3.0])
        parts = dist.Normal(theta.unsqueeze(-1).expand((*theta.shape, 2)), scales)
        pyro.sample(
            "y", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.9, 0.1]).expand(parts.batch_shape)), parts)
        )


def mixture_weight():
    """Share of cells of one kind from the brightness of twenty."""
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    shares = torch.stack([1 - weight, weight], dim=-1)
    with pyro.plate("cells", 20):
        parts = dist.Normal(torch.tensor([0.0, 2.0]).expand(shares.shape), 1.0)
        pyro.sample("brightness", dist.MixtureSameFamily(dist.Categorical(shares), parts))


def uniform_noise():
    """Ten readings with bounded noise: only the smallest and the largest count."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("readings", 10):
        pyro.sample("y", dist.Uniform(theta - 0.5, theta + 0.5))


def clipped_detector():
    """Six readings of a detector that saturates at both ends."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("readings", 6):
        signal = pyro.sample("signal", dist.Normal(2.0 * theta, 0.4))
        pyro.deterministic("y", signal.clamp(-1.0, 1.0))


MODELS = [
    SuiteModel(
        "component_mean", FAMILY, component_mean, ("y",), ("mean",), 1.303307, 1e-08,
        "entropy of a mixture, quadrature",
    ),
    SuiteModel(
        "two_component_noise", FAMILY, two_component_noise, ("y",), ("theta",), 2.00234, 1e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "mixture_weight", FAMILY, mixture_weight, ("brightness",), ("weight",), 0.62728, 8e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "uniform_noise", FAMILY, uniform_noise, ("y",), ("theta",), 3.34979, 3e-06,
        "truncated posterior, averaged over Sobol order statistics",
    ),
    SuiteModel(
        "clipped_detector", FAMILY, clipped_detector, ("y",), ("theta",), 1.69964, 2e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
]  # fmt: skip

"""Gaussian processes and time series: length scales, autoregressions, random walks, hidden states."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "processes"


def gp_length_scale():
    """Length scale of a Gaussian process from twelve readings."""
    length = pyro.sample("length", dist.LogNormal(-1.0, 0.6))
    x = torch.linspace(0.0, 1.0, 12)
    distance = (x[:, None] - x) / length[..., None, None]
    covariance = torch.exp(-0.5 * distance**2) + 0.01 * torch.eye(12)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(12), covariance))


def gp_mean_amplitude():
    """Mean and amplitude of a Gaussian process at eight places of the experimenter's choice."""
    x = pyro.param("x", torch.linspace(0.0, 2.0, 8))
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 0.5))
    distance = (x[..., :, None] - x[..., None, :]).abs()
    covariance = amplitude[..., None, None] ** 2 * torch.exp(-distance) + 0.01 * torch.eye(8)
    pyro.sample("y", dist.MultivariateNormal(mean.unsqueeze(-1).expand((*mean.shape, 8)), covariance))


def autoregression():
    """Memory of a series of fifteen values, each a site."""
    phi = pyro.sample("phi", dist.Uniform(-0.95, 0.95))
    before = torch.zeros(())
    for time in range(15):
        before = pyro.sample(f"y_{time}", dist.Normal(phi * before, 1.0))


def random_walk():
    """Drift and volatility of a price from its path over ten days."""
    drift = pyro.sample("drift", dist.Normal(0.0, 0.5))
    volatility = pyro.sample("volatility", dist.LogNormal(-1.0, 0.5))
    steps = pyro.sample(
        "steps", dist.Normal(drift[..., None], volatility[..., None]).expand((*drift.shape, 10)).to_event(1)
    )
    pyro.deterministic("path", steps.cumsum(-1), event_dim=1)


def local_level():
    """First level of a series whose level wanders."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    for time in range(6):
        pyro.sample(f"y_{time}", dist.Normal(level, 0.4))
        if time < 5:
            level = pyro.sample(f"level_{time + 1}", dist.Normal(level, 0.5))


def state_space():
    """How fast a hidden state moves, from ten noisy readings."""
    volatility = pyro.sample("volatility", dist.LogNormal(-0.5, 0.7))
    moves = pyro.sample("moves", dist.Normal(0.0, volatility[..., None]).expand((*volatility.shape, 10)).to_event(1))
    pyro.sample("y", dist.Normal(moves.cumsum(-1), 0.3).to_event(1))


MODELS = [
    SuiteModel(
        "gp_length_scale", FAMILY, gp_length_scale, ("y",), ("length",), 0.98731, 8e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "gp_mean_amplitude", FAMILY, gp_mean_amplitude, ("y",), ("mean", "amplitude"), 1.80596, 3e-04,
        "chain rule: amplitude by quadrature and averaging, the mean given it in closed form",
    ),
    SuiteModel(
        "autoregression", FAMILY, autoregression, tuple(f"y_{time}" for time in range(15)), ("phi",), 0.84744, 2e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "random_walk", FAMILY, random_walk, ("path",), ("drift", "volatility"), 2.32587, 8e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "local_level", FAMILY, local_level, tuple(f"y_{time}" for time in range(6)), ("level",), 1.152352, 1e-08,
        "closed form",
    ),
    SuiteModel(
        "state_space", FAMILY, state_space, ("y",), ("volatility",), 0.85879, 6e-04,
        "states in closed form, quadrature, averaged over Sobol outcomes",
    ),
]  # fmt: skip

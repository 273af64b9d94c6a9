"""Linear and polynomial regression, well and badly scaled, with known and unknown noise: Gaussian closed forms."""

import pyro
import pyro.distributions as dist
import torch

from tests.suite.record import SuiteModel

FAMILY = "regression"


def calibration_line():
    """Slope of a calibration line whose intercept is unknown too."""
    x = pyro.param("x", torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(1.0, 0.5))
    with pyro.plate("readings", 6):
        pyro.sample("y", dist.Normal(intercept + slope * x, 1.5))


def badly_scaled():
    """Coefficients in different units, read with little noise."""
    x = torch.linspace(0.0, 0.7212, 6)
    rows = torch.stack([x**power for power in range(4)], dim=-1)
    scales = torch.tensor([100.0, 1.0, 0.1, 0.01])
    coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros(4), scales).to_event(1))
    pyro.sample("y", dist.Normal(coefficients @ rows.T, 0.01).to_event(1))


def low_noise_plane():
    """Three weights, four precise readings."""
    rows = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.5], [0.2, 0.5, 1.0], [0.1, -0.4, 0.3]])
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(weights @ rows.T, 0.00093).to_event(1))


def cubic():
    """Four coefficients of a cubic, each a site of its own."""
    x = torch.linspace(-1.0, 1.0, 8)
    c0 = pyro.sample("c0", dist.Normal(0.0, 1.0))
    c1 = pyro.sample("c1", dist.Normal(0.0, 1.0))
    c2 = pyro.sample("c2", dist.Normal(0.0, 2.0))
    c3 = pyro.sample("c3", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Normal(c0 + x * (c1 + x * (c2 + x * c3)), 0.4))


def normal_inverse_gamma():
    """A line with unknown noise: conjugate prior, ten rows."""
    precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
    spread = precision.rsqrt().unsqueeze(-1)
    beta = pyro.sample("beta", dist.Normal(0.0, spread * torch.tensor([3.0, 5.0])).to_event(1))
    x = torch.linspace(-1.0, 1.0, 10)
    mean = beta[..., 0:1] + beta[..., 1:2] * x
    pyro.sample("y", dist.Normal(mean, spread).to_event(1))


def two_thermometers():
    """Offset of two thermometers in the same bath, whose own temperature is hardly known."""
    bath = pyro.sample("bath", dist.Normal(20.0, 10.0))
    offset = pyro.sample("offset", dist.Normal(0.0, 0.1))
    pyro.sample("first", dist.Normal(bath, 0.01))
    pyro.sample("second", dist.Normal(bath + offset, 0.01))


def thirty_nats():
    """Six masses on a very good balance."""
    masses = pyro.sample("masses", dist.Normal(torch.full((6,), 5.0), 1.0).to_event(1))
    with pyro.plate("weighings", 6, dim=-1):
        together = torch.tril(torch.ones(6, 6))
        pyro.sample("y", dist.Normal((masses * together).sum(-1), 0.0067))


def tiny_information():
    """A reading that says next to nothing."""
    effect = pyro.sample("effect", dist.Normal(0.0, 0.01414))
    pyro.sample("y", dist.Normal(effect, 1.0))


def placebo():
    """A dose of zero: the effect cannot be seen."""
    dose = pyro.param("dose", torch.tensor(0.0))
    effect = pyro.sample("effect", dist.Normal(1.0, 1.0))
    with pyro.plate("patients", 5):
        pyro.sample("y", dist.Normal(dose * effect, 1.0))


def matrix_coefficients():
    """Two outcomes on three regressors: a matrix of coefficients, a matrix of outcomes."""
    regressors = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, -0.5], [1.0, 2.0, 0.5], [1.0, 3.0, -0.5]])
    coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    pyro.sample("y", dist.Normal(regressors @ coefficients, torch.tensor([0.5, 1.0])).to_event(2))


def hundred_readings():
    """Mean and precision from a hundred exchangeable readings."""
    precision = pyro.sample("precision", dist.Gamma(4.0, 4.0))
    mean = pyro.sample("mean", dist.Normal(0.0, precision.rsqrt()))
    with pyro.plate("readings", 100):
        pyro.sample("y", dist.Normal(mean, precision.rsqrt()))


MODELS = [
    SuiteModel("calibration_line", FAMILY, calibration_line, ("y",), ("slope",), 0.597202, 1e-08, "closed form"),
    SuiteModel("badly_scaled", FAMILY, badly_scaled, ("y",), ("coefficients",), 14.692057, 1e-08, "closed form"),
    SuiteModel("low_noise_plane", FAMILY, low_noise_plane, ("y",), ("weights",), 20.84427, 1e-08, "closed form"),
    SuiteModel("cubic", FAMILY, cubic, ("y",), ("c0", "c1", "c2", "c3"), 6.807468, 1e-08, "closed form"),
    SuiteModel(
        "precision_of_a_line", FAMILY, normal_inverse_gamma, ("y",), ("precision",), 0.524765, 1e-08,
        "closed form, entropy of the multivariate t",
    ),
    SuiteModel(
        "normal_inverse_gamma", FAMILY, normal_inverse_gamma, ("y",), ("precision", "beta"), 5.096839, 1e-08,
        "closed form, entropy of the multivariate t",
    ),
    SuiteModel(
        "two_thermometers", FAMILY, two_thermometers, ("first", "second"), ("offset",), 1.965913, 1e-08,
        "closed form",
    ),
    SuiteModel("thirty_nats", FAMILY, thirty_nats, ("y",), ("masses",), 30.034133, 1e-08, "closed form"),
    SuiteModel("tiny_information", FAMILY, tiny_information, ("y",), ("effect",), 9.9959807e-05, 1e-12, "closed form"),
    SuiteModel("placebo", FAMILY, placebo, ("y",), ("effect",), 0.0, 1e-12, "independence"),
    SuiteModel(
        "matrix_coefficients", FAMILY, matrix_coefficients, ("y",), ("coefficients",), 5.862358, 1e-08,
        "closed form",
    ),
    SuiteModel(
        "hundred_readings", FAMILY, hundred_readings, ("y",), ("precision", "mean"), 3.647316, 1e-08,
        "closed form, entropy of the multivariate t",
    ),
]  # fmt: skip

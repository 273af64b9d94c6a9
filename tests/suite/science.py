"""Nonlinear models of pharmacology, chemistry and tracking."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from tests.suite.record import SuiteModel

FAMILY = "science"


def pharmacokinetics():
    """Clearance and volume of an oral drug from five blood samples, errors in proportion."""
    drawn = torch.tensor([0.5, 1.0, 2.0, 6.0, 12.0])
    time = pyro.param("time", drawn, constraint=constraints.positive)
    clearance = pyro.sample("clearance", dist.LogNormal(1.0, 0.4))
    volume = pyro.sample("volume", dist.LogNormal(3.0, 0.3))
    absorption = 1.2
    with pyro.plate("samples", 5):
        elimination = clearance / volume
        curve = (torch.exp(-elimination * time) - torch.exp(-absorption * time)) / (absorption - elimination)
        concentration = 100.0 * absorption / volume * curve
        pyro.sample("y", dist.LogNormal(torch.log(concentration.abs() + 1e-8), 0.15))


def dose_response():
    """Half-maximal dose; baseline and height of the response are nuisances."""
    given = torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0])
    dose = pyro.param("dose", given, constraint=constraints.positive)
    log_half = pyro.sample("log_half", dist.Normal(0.0, 1.0))
    baseline = pyro.sample("baseline", dist.Normal(0.5, 0.3))
    height = pyro.sample("height", dist.Normal(3.0, 0.5))
    with pyro.plate("wells", 5):
        pyro.sample("y", dist.Normal(baseline + height * dose / (log_half.exp() + dose), 0.25))


def calorimetry():
    """Affinity and heat of binding from ten injections of a ligand into a protein."""
    affinity = pyro.sample("affinity", dist.LogNormal(1.5, 0.6))
    heat = pyro.sample("heat", dist.Normal(-10.0, 2.0))
    total = torch.arange(0.0, 11.0) * 0.25
    sum_of_all = 1.0 + total + 1.0 / affinity.unsqueeze(-1)
    bound = 0.5 * (sum_of_all - torch.sqrt(sum_of_all**2 - 4.0 * total))
    heats = heat.unsqueeze(-1) * (bound[..., 1:] - bound[..., :-1])
    pyro.sample("y", dist.Normal(heats, 0.15).to_event(1))


def bearings():
    """Position of a ship from the bearings taken at three stations."""
    position = pyro.sample("position", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    stations = torch.tensor([[-3.0, -3.0], [3.0, -3.0], [0.0, 4.0]])
    offset = position.unsqueeze(-2) - stations
    angle = torch.atan2(offset[..., 1], offset[..., 0])
    pyro.sample("bearing", dist.VonMises(angle, 30.0).to_event(1))


MODELS = [
    SuiteModel(
        "pharmacokinetics", FAMILY, pharmacokinetics, ("y",), ("clearance", "volume"), 2.778, 5e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "dose_response", FAMILY, dose_response, ("y",), ("log_half",), 0.86924, 4e-04,
        "nuisances in closed form, quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "calorimetry", FAMILY, calorimetry, ("y",), ("affinity", "heat"), 2.19233, 2e-03,
        "quadrature, averaged over Sobol outcomes",
    ),
    SuiteModel(
        "bearings", FAMILY, bearings, ("bearing",), ("position",), 1.256, 8e-04,
        "quadrature, averaged over Sobol outcomes",
    ),
]  # fmt: skip

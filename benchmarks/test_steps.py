"""Timings of our own pieces: simulation, flows forward and backward, pairs of nested Monte Carlo.

No part of the default test run. The test suite's `conftest.py` switches shape checks on, which are most of the time of
such small pieces, so it is left out:

    OMP_NUM_THREADS=1 python -m pytest --noconftest -p no:cacheprovider benchmarks/test_steps.py
"""

import sys

import pytest

pytest.importorskip("pytest_benchmark")
if any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path):
    pytest.skip("shape checks are on: run with --noconftest", allow_module_level=True)

import pyro
import torch

from pyro_voed import Experiment, eig_nmc, sample_joint
from pyro_voed.densities import AffineCouplingFlow, SplineCouplingFlow
from pyro_voed.problems.michaelis_menten import START_DESIGNS, michaelis_menten

torch.set_num_threads(1)
BATCHES = [256, 1_024]
FLOWS = {"affine": AffineCouplingFlow, "spline": SplineCouplingFlow}


@pytest.fixture(autouse=True)
def _unvalidated():
    # As in training and evaluation.
    with pyro.validation_enabled(False):
        yield


@pytest.fixture
def experiment():
    return Experiment(michaelis_menten(START_DESIGNS), "y")


@pytest.mark.parametrize("batch", BATCHES)
def test_simulation(benchmark, experiment, batch):
    with torch.no_grad():
        benchmark(sample_joint, experiment, batch)


@pytest.mark.parametrize("batch", BATCHES)
def test_simulation_with_design_gradients(benchmark, experiment, batch):
    xi = torch.tensor(START_DESIGNS, requires_grad=True)

    def simulate():
        return torch.autograd.grad(sample_joint(experiment, batch, {"xi": xi}).y.sum(), xi)

    benchmark(simulate)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("flow", FLOWS)
def test_log_prob_and_backward(benchmark, flow, batch):
    density = FLOWS[flow](2, 7, num_transforms=3, hidden_dim=64)
    parameters = list(density.parameters())
    theta, context = torch.randn(batch, 2), torch.randn(batch, 7)

    def step():
        return torch.autograd.grad(density.log_prob(theta, context).mean(), parameters)

    benchmark(step)


@pytest.mark.parametrize("size", [1_000, 4_000])
def test_pairs_of_nested_monte_carlo(benchmark, size):
    model = michaelis_menten(START_DESIGNS)
    benchmark(eig_nmc, model, "y", "theta", num_outer_samples=size, seed=0)

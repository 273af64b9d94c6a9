"""Laws of simulation: run together or one by one, in chunks or at once, it is the same thing, and it is counted."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, sample_joint
from pyro_voed.experiment.packing import pack_run
from pyro_voed.experiment.programs import is_deterministic, run_rows, sample_nodes
from tests.experiment.cases import (
    assert_same_distribution,
    candidates,
    event_design,
    normal,
    scalar_design,
    with_designs,
)


@with_designs
def test_vectorised_and_sequential_simulation_agree_in_distribution(case):
    together, alone = (Experiment(*case, vectorize=vectorize) for vectorize in (True, False))
    first, second = sample_joint(together, 4_000), sample_joint(alone, 400)
    assert_same_distribution(first.theta, second.theta)
    assert_same_distribution(torch.tanh(first.y), torch.tanh(second.y))
    if first.log_prior is not None:
        assert_same_distribution(first.log_prior[:, None], second.log_prior[:, None])


@with_designs
def test_vectorised_and_sequential_simulation_agree_draw_by_draw(case):
    together, alone = (Experiment(*case, vectorize=vectorize) for vectorize in (True, False))
    run = run_rows(together.program, 7, together.shapes, designs=together.design_values)
    drawn = [name for name, node in sample_nodes(run.traces[0]).items() if not is_deterministic(node)]
    values = {name: run.value(name) for name in drawn}
    again = run_rows(alone.program, 7, alone.shapes, designs=alone.design_values, row_values=values)
    first = pack_run(together, run, torch.Size([7]), together.is_explicit)
    second = pack_run(alone, again, torch.Size([7]), together.is_explicit)
    for name in ("theta", "y", "log_prior", "log_likelihood", "log_det", "outcome_log_det"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@with_designs
def test_equal_seeds_give_equal_draws(case):
    experiment = Experiment(*case)
    pyro.set_rng_seed(3)
    first = sample_joint(experiment, 10)
    pyro.set_rng_seed(3)
    second = sample_joint(experiment, 10)
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.y, second.y)


@with_designs
def test_chunks_give_the_right_number_of_equally_distributed_draws(case):
    experiment = Experiment(*case)
    limit = 50 * 8 * experiment.bytes_per_row  # chunks of fifty
    before = experiment.num_calls
    chunked = sample_joint(experiment, 2_001, likelihood=experiment.is_explicit, max_bytes=limit)
    assert experiment.num_calls - before == 2_001
    assert chunked.theta.shape[0] == chunked.y.shape[0] == 2_001
    assert torch.unique(chunked.theta, dim=0).shape[0] == 2_001, "chunks repeat draws"
    whole = sample_joint(experiment, 2_001)
    assert_same_distribution(chunked.theta, whole.theta)
    assert_same_distribution(torch.tanh(chunked.y), torch.tanh(whole.y))


@with_designs
@pytest.mark.parametrize("stored", [True, False])
def test_the_store_is_untouched(case, stored):
    if stored:
        case[0]()
    store = pyro.get_param_store()
    leaves = {name: (store._params[name], store._params[name].detach().clone()) for name in store}
    experiment = Experiment(*case)
    sample_joint(experiment, 5)
    sample_joint(experiment, 5, candidates(experiment, 2))
    assert set(store.keys()) == set(leaves)
    for name, (leaf, value) in leaves.items():
        assert store._params[name] is leaf
        assert torch.equal(leaf.detach(), value)
        assert leaf.grad is None


def test_every_run_of_the_model_is_counted():
    calls = []

    def counted():
        calls.append(1)
        return scalar_design()

    experiment = Experiment(counted, "y", vectorize=False)
    probes = experiment.num_calls
    assert probes == len(calls)
    sample_joint(experiment, 13)
    assert experiment.num_calls == len(calls) == probes + 13
    sample_joint(experiment, 4, {"xi": torch.tensor([0.1, 0.2, 0.3])})
    assert experiment.num_calls == len(calls) == probes + 13 + 12


def test_a_numpy_black_box_runs_one_by_one():
    def model():
        xi = pyro.param("xi", torch.tensor(0.5))
        simulated = torch.as_tensor(math.sin(normal("theta").item()) + xi.item(), dtype=torch.float32)
        return pyro.deterministic("y", simulated + normal("e", 0.0, 0.1))

    sample = sample_joint(Experiment(model, "y", "theta", vectorize=False), 200)
    assert_same_distribution((sample.y - torch.sin(sample.theta) - 0.5) / 0.1, torch.randn(2_000, 1))


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_gradients_flow_to_designs(batch):
    experiment = Experiment(event_design, "y")
    designs = candidates(experiment, *batch)
    designs["xi"].requires_grad_()
    sample = sample_joint(experiment.laid_out(designs if batch else {}), 6, designs, likelihood=True)
    # log y = mean(theta, xi) + noise, so dy/dxi is that of the mean; the log-likelihood given its own noise stays put.
    theta = sample.values["theta"]
    mean = theta[..., :1] * designs["xi"] / (designs["xi"] + theta[..., 1:])
    (expected,) = torch.autograd.grad(mean.sum(), designs["xi"], retain_graph=True)
    (got,) = torch.autograd.grad(sample.y.sum(), designs["xi"], retain_graph=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if batch:
        (of_one,) = torch.autograd.grad(sample.y[:, 1].sum(), designs["xi"])
        assert (of_one[[0, 2]] == 0).all(), "gradients cross the members of a batch"
        assert (of_one[1] != 0).all()


def event_design_double():
    xi = pyro.param("xi", torch.tensor([0.2, 0.5], dtype=torch.float64))
    theta = pyro.sample("theta", dist.LogNormal(xi.new_zeros(2), 0.3).to_event(1))
    return pyro.sample("y", dist.LogNormal(theta * xi, 0.2).to_event(1))


@pytest.mark.parametrize(
    ("model", "default"), [(event_design, torch.float64), (event_design_double, torch.float32)], ids=["default", "own"]
)
def test_double_precision_stays_double(model, default):
    torch.set_default_dtype(default)
    try:
        sample = sample_joint(Experiment(model, "y"), 4, likelihood=True)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("theta", "y", "log_prior", "log_likelihood"):
        assert getattr(sample, name).dtype == torch.float64

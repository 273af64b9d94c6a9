"""Laws of packing: vectors of coordinates say what the values say, with densities that belong to the vectors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_voed import Experiment, sample_joint
from pyro_voed.experiment.packing import pack_run, put_targets, unpack_targets
from pyro_voed.experiment.programs import run_rows
from tests.experiment.cases import Z_MAX, both_ways, bounded_chain, event_design, normal, several_designs


def uniform_chain():
    a = pyro.sample("a", dist.Uniform(1.0, 3.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    c = pyro.sample("c", dist.Uniform(b, a + b))
    return normal("y", a + b + c)


def bounded_chain_in_a_plate():
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Uniform(1.0, 3.0))
        return normal("y", a + pyro.sample("b", dist.Uniform(0.0, a)))


DEPENDENT = {
    "chain": (uniform_chain, {"a": (1, False), "b": (1, True), "c": (1, True)}),
    "chain in a plate": (bounded_chain_in_a_plate, {"a": (3, False), "b": (3, True)}),
}


@both_ways
@pytest.mark.parametrize("name", DEPENDENT)
def test_targets_of_dependent_supports_come_back_as_they_were(name, vectorize, double_precision):
    model, sites = DEPENDENT[name]
    experiment = Experiment(model, "y", vectorize=vectorize)
    assert {site.name: (site.packed_dim, site.dependent_support) for site in experiment.targets} == sites
    sample = sample_joint(experiment, 6)
    assert torch.isfinite(sample.theta).all()
    values = unpack_targets(experiment, sample.theta)
    for site in sites:
        torch.testing.assert_close(values[site], sample.values[site])
    # Another point stays inside the support, which moves along.
    moved = unpack_targets(experiment, sample.theta.roll(1, 0))
    assert (moved["b"] > 0).all()
    assert (moved["b"] < moved["a"]).all()


def test_log_dets_of_dependent_supports_are_those_of_autodiff(double_precision):
    experiment = Experiment(uniform_chain, "y")
    sample = sample_joint(experiment, 3)

    def values(theta):
        return torch.cat([value.flatten() for value in unpack_targets(experiment, theta.unsqueeze(0)).values()])

    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(values, sample.theta[row])
        torch.testing.assert_close(sample.log_det[row], torch.linalg.slogdet(jacobian).logabsdet)


def test_the_log_prior_of_dependent_bounds_integrates_to_one(double_precision):
    # Importance sampling with a wide known density in place of a grid: E_r[p / r] = 1.
    experiment = Experiment(bounded_chain, "y")
    proposal = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    theta = proposal.sample((20_000,))
    run = put_targets(experiment, theta, experiment.design_values)
    packed = pack_run(experiment, run, torch.Size([20_000]), False)
    torch.testing.assert_close(packed.theta, theta, rtol=1e-4, atol=1e-4)
    ratio = (packed.log_prior - proposal.log_prob(theta)).exp()
    assert abs(ratio.mean() - 1) <= Z_MAX * ratio.std() / math.sqrt(20_000)


def test_the_log_prior_is_the_density_of_the_packed_targets():
    # Packed LogNormal(0, 0.3) is Normal(0, 0.3), coordinate by coordinate.
    sample = sample_joint(Experiment(event_design, "y"), 20)
    torch.testing.assert_close(sample.log_prior, dist.Normal(0.0, 0.3).log_prob(sample.theta).sum(-1))


def test_the_log_likelihood_of_a_positive_outcome_integrates_to_one_in_packed_coordinates():
    experiment = Experiment(lambda: pyro.sample("y", dist.Gamma(2.0, normal("theta").exp())), "y")
    grid = torch.linspace(-12.0, 12.0, 4_001)
    values = {"theta": torch.tensor(0.7).expand(len(grid)), "y": grid.exp()}
    run = run_rows(experiment.program, len(grid), experiment.shapes, row_values=values)
    sample = pack_run(experiment, run, torch.Size([len(grid)]), True)
    torch.testing.assert_close(sample.y[:, 0], grid, rtol=1e-4, atol=1e-4)
    assert torch.trapezoid(sample.log_likelihood.exp(), grid).item() == pytest.approx(1.0, abs=1e-4)


def test_one_packed_point_without_batch_is_unpacked():
    experiment = Experiment(event_design, "y")
    torch.testing.assert_close(unpack_targets(experiment, torch.zeros(2))["theta"], torch.ones(2))


def test_rows_of_a_sample_are_picked():
    sample = sample_joint(Experiment(several_designs, ["y", "count"]), 9, likelihood=True)
    part = sample[torch.tensor([7, 2])]
    assert part.num_samples == 2
    torch.testing.assert_close(part.theta, sample.theta[[7, 2]])
    torch.testing.assert_close(part.log_likelihood, sample.log_likelihood[[7, 2]])
    torch.testing.assert_close(part.values["count"], sample.values["count"][[7, 2]])


# --- masks on outcomes ----------------------------------------------------------------------------------------------

MEASURED = torch.tensor([True, False, True])


def masked_by_distribution():
    theta = normal("theta")
    return pyro.sample("y", dist.Normal(theta.unsqueeze(-1) * torch.ones(3), 1.0).mask(MEASURED).to_event(1))


def masked_by_handler_in_a_plate():
    theta = normal("theta", torch.zeros(1))
    with pyro.plate("data", 3), poutine.mask(mask=MEASURED):
        return normal("y", theta)


def masked_by_distribution_in_a_plate():
    theta = normal("theta", torch.zeros(1))
    with pyro.plate("data", 3):
        return pyro.sample("y", dist.Normal(theta, 1.0).mask(MEASURED))


@both_ways
@pytest.mark.parametrize(
    "model", [masked_by_distribution, masked_by_handler_in_a_plate, masked_by_distribution_in_a_plate]
)
def test_masked_outcome_entries_are_dropped(model, vectorize):
    experiment = Experiment(model, "y", vectorize=vectorize)
    assert experiment.y_dim == 2
    sample = sample_joint(experiment, 5, likelihood=True)
    torch.testing.assert_close(sample.y, sample.values["y"][:, MEASURED])
    expected = dist.Normal(sample.theta, 1.0).log_prob(sample.y).sum(-1)
    torch.testing.assert_close(sample.log_likelihood, expected)

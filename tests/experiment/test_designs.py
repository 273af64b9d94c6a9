"""Laws of designs: a batch of them agrees with its members one by one, and wrong ones are refused."""

import math

import pyro
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Experiment, eig_nmc, sample_joint
from pyro_voed.experiment.designs import pack_designs, unpack_designs
from pyro_voed.experiment.packing import pack_run
from pyro_voed.experiment.programs import run_rows
from tests.experiment.cases import (
    Z_MAX,
    assert_same_distribution,
    candidates,
    event_design,
    normal,
    scalar_design_beside_a_plate,
    several_designs,
    with_designs,
)


@with_designs
@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
def test_a_batch_of_designs_agrees_with_its_members_draw_by_draw(case, batch):
    plain = Experiment(*case)
    designs = candidates(plain, *batch)
    experiment = plain.laid_out(designs)
    assert experiment.takes_design_rows, "these models all take a design an experiment"
    batched = sample_joint(experiment, 5, designs, likelihood=experiment.is_explicit)
    assert batched.theta.shape[:-1] == batched.y.shape[:-1] == (5, *batch)
    random = [site.name for site in (*experiment.targets, *experiment.observations) if not site.is_deterministic]
    if experiment.nuisance:
        return  # nuisance draws are not kept, so rows cannot be replayed
    for member in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)).tolist():
        index = tuple(member)
        own = {name: value[index] for name, value in designs.items()}
        values = {name: batched.values[name][(slice(None), *index)] for name in random}
        run = run_rows(plain.program, 5, plain.shapes, designs=own, row_values=values)
        alone = pack_run(plain, run, torch.Size([5]), experiment.is_explicit)
        for name in ("theta", "y", "log_prior", "log_likelihood"):
            expected, got = getattr(alone, name), getattr(batched, name)
            if expected is not None:
                torch.testing.assert_close(got[(slice(None), *index)], expected, rtol=1e-4, atol=1e-4)


@with_designs
def test_a_batch_of_designs_agrees_with_its_members_in_distribution(case):
    plain = Experiment(*case)
    designs = candidates(plain, 3)
    batched = sample_joint(plain.laid_out(designs), 4_000, designs)
    looped = sample_joint(plain, 4_000, designs)
    for member in range(3):
        alone = sample_joint(plain, 4_000, {name: value[member] for name, value in designs.items()})
        for other in (batched, looped):
            assert_same_distribution(other.theta[:, member], alone.theta)
            assert_same_distribution(torch.tanh(other.y[:, member]), torch.tanh(alone.y))


@pytest.mark.parametrize("times", [None, torch.tensor([3.0, 4.0])], ids=["left out", "unbatched"])
def test_a_design_without_a_batch_is_shared_by_the_batch_of_another(times):
    designs = {"dose": torch.tensor([0.1, 5.0])} | ({} if times is None else {"times": times})
    experiment = Experiment(several_designs, ["y", "count"]).laid_out(designs)
    sample = sample_joint(experiment, 2_000, designs)
    assert sample.y.shape == (2_000, 2, 3)
    times = torch.tensor([1.0, 2.0]) if times is None else times
    expected = designs["dose"][:, None] * torch.exp(-sample.values["theta"].unsqueeze(-1) * times)
    assert_same_distribution(((sample.values["y"] - expected) / 0.1).flatten(0, 1), torch.randn(4_000, 2))


def test_a_model_that_takes_only_one_design_is_looped_over():
    def model():
        xi = pyro.param("xi", torch.tensor(0.7))
        if xi > 1.0:  # no batch of designs gets through
            xi = xi * 2
        return normal("y", xi * normal("theta"), 0.5)

    designs = {"xi": torch.tensor([0.5, 2.0])}
    with pytest.warns(UserWarning, match="one after the other"):
        experiment = Experiment(model, "y").laid_out(designs)
    sample = sample_joint(experiment, 1_000, designs)
    residual = (sample.y[..., 0] - sample.theta[..., 0] * torch.tensor([0.5, 4.0])) / 0.5
    assert_same_distribution(residual.reshape(-1, 1), torch.randn(2_000, 1))


def test_a_design_batch_of_the_size_of_a_plate_is_not_mistaken_for_it():
    designs = {"xi": torch.tensor([0.1, 1.0, 10.0])}
    experiment = Experiment(scalar_design_beside_a_plate, "y").laid_out(designs)
    assert sample_joint(experiment, 3, designs).y.shape == (3, 3, 3)
    spread = sample_joint(experiment, 2_000, designs).y.std(0)
    expected = (0.25 + designs["xi"] ** 2).sqrt()[:, None].expand(3, 3)
    # The relative standard error of a Gaussian standard deviation is 1 / sqrt(2 n).
    assert ((spread / expected - 1).abs() <= Z_MAX / math.sqrt(4_000)).all()


def test_chunks_of_a_design_batch_keep_its_shape():
    experiment = Experiment(event_design, "y")
    designs = candidates(experiment, 2, 3)
    sample = sample_joint(experiment.laid_out(designs), 11, designs, max_bytes=1)
    assert sample.y.shape == (11, 2, 3, 3)
    # Each of the three values in an interval comes as its place and as its angle.
    assert sample.designs.shape == (2, 3, 6)


def test_densities_see_designs_finite_at_the_ends_of_an_interval_and_get_them_back():
    def model():
        share = pyro.param("share", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        dose = pyro.param("dose", torch.tensor(0.7), constraint=constraints.positive)
        shift = pyro.param("shift", torch.zeros(2))
        normal("y", share * dose * normal("theta") + shift.sum(-1), 0.5)

    designs = {
        "share": torch.tensor([0.0, 0.3, 2.0]),
        "dose": torch.tensor([0.5, 1.0, 4.0]),
        "shift": torch.zeros(3, 2),
    }
    experiment = Experiment(model, "y")
    packed = pack_designs(experiment, designs)
    assert packed.shape == (3, 2 + 1 + 2)
    assert torch.isfinite(packed).all()
    for name, value in unpack_designs(experiment, packed).items():
        torch.testing.assert_close(value, designs[name])


WRONG_DESIGNS = {
    # What else can be wrong is in tests/faults/test_messages.py.
    "unknown": ({"x": torch.tensor([0.5])}, ["x", "xi"]),
    "too few dimensions": ({"xi": torch.tensor(0.5)}, ["xi", "(*batch, 3)"]),
    "one of the batch outside": ({"xi": torch.tensor([[0.5, 0.5, 0.5], [0.5, -0.5, 0.5]])}, ["xi", "constraint"]),
}


@pytest.mark.parametrize("name", WRONG_DESIGNS)
def test_wrong_designs_are_refused(name):
    designs, words = WRONG_DESIGNS[name]
    with pytest.raises(ValueError, match="designs") as caught:
        sample_joint(Experiment(event_design, "y"), 3, designs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unequal_design_batches_are_refused():
    with pytest.raises(ValueError, match="one batch shape"):
        sample_joint(Experiment(several_designs, ["y", "count"]), 3, {"dose": torch.ones(2), "times": torch.ones(3, 2)})


@pytest.mark.parametrize("values", [[0.2, 0.5, 0.8], [[0.2, 0.5, 0.8], [0.3, 0.3, 0.3]]], ids=["one", "two"])
def test_designs_may_be_lists(values):
    result = eig_nmc(event_design, "y", designs={"xi": values}, num_outer_samples=20, seed=0)
    assert result.eig.shape == torch.tensor(values).shape[:-1]
    torch.testing.assert_close(result.designs["xi"], torch.tensor(values))

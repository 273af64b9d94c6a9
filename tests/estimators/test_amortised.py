"""Laws of densities amortised over designs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Fresh, amortise_eig, certify, flow_posterior
from pyro_voed.problems import implicit_toy
from tests.closed_forms import check_bounds, gain_eig, scaled
from tests.estimators.cases import small_flow

Z = 4.0
DESIGNS = torch.tensor([0.0, 0.6, 1.2, 2.0])
EXACT = gain_eig(DESIGNS)
SMALL = {"density": small_flow, "seed": 0, "progress": False}


def kinds_of_design():
    dose = pyro.param("dose", torch.tensor(1.0), constraint=constraints.positive)
    place = pyro.param("place", torch.tensor([0.5, 0.5]), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(dose * place.sum(-1) * theta, 1.0))


def no_design():
    pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(0.0, 1.0)), 1.0))


@pytest.fixture(scope="module")
def amortised():
    return amortise_eig(scaled, "y", training=Fresh(num_steps=250, batch_size=256), **SMALL)


def test_an_amortised_density_bounds_every_design(amortised):
    curve = amortised.at({"xi": DESIGNS}, seed=0)
    check_bounds(curve, EXACT, 0.05)
    # Besides, a few experiments are run at each design first.
    assert 0 <= curve.num_simulations - 4 * curve.num_samples <= 4 * 5


def test_an_amortised_result_answers_like_any_other(amortised):
    one = amortised.at({"xi": torch.tensor(1.0)}, num_samples=500, seed=0)
    assert one.eig.shape == ()
    assert abs(one.eig - gain_eig(1.0)) < 0.05 + Z * one.standard_error
    assert amortised.at(num_samples=100).eig.shape == ()
    curve = amortised.at({"xi": DESIGNS}, num_samples=200)
    sure = certify(curve, width=0.2, confidence=0.9999, seed=0)
    assert ((sure.interval[0] < EXACT) & (EXACT < sure.interval[1])).all()
    assert flow_posterior(curve, torch.tensor(0.3), 10, design_index=1).flat("theta").shape == (10,)
    with pytest.raises(ValueError, match="xi"):
        amortised.at({"xi": torch.tensor([3.0])})


def test_a_posterior_at_one_design_is_that_of_a_member(amortised):
    many = amortised.at({"xi": torch.tensor([0.5, 2.0])}, num_samples=100, seed=0)
    for index, xi in enumerate((0.5, 2.0)):
        one = amortised.at({"xi": torch.tensor(xi)}, num_samples=100, seed=0)
        draws = flow_posterior(one, torch.tensor(1.0), 200, seed=1).matrix()
        expected = flow_posterior(many, torch.tensor(1.0), 200, design_index=index, seed=1).matrix()
        torch.testing.assert_close(draws, expected)


def test_a_thousand_designs_take_a_thousand_small_batches(amortised):
    designs = torch.linspace(0.0, 2.0, 1_000)
    curve = amortised.at({"xi": designs}, seed=0)
    assert curve.num_samples == 100
    standardised = (curve.eig - gain_eig(designs)) / curve.standard_error
    # The mean of a thousand standardised errors: the bound's own gap, and 1 / sqrt(1000) of chance.
    assert -1.0 < standardised.mean() < Z / 1_000**0.5


def test_a_proposal_is_needed_where_there_is_no_interval_and_checked():
    with pytest.raises(ValueError, match=r"design 'dose' has the constraint .*, which is no interval"):
        amortise_eig(kinds_of_design, "y")

    def proposal(number):
        return {"dose": 0.5 + torch.rand(number), "place": torch.rand(number, 2)}

    training = Fresh(num_steps=200, batch_size=256, learning_rate=5e-3)
    amortised = amortise_eig(kinds_of_design, "y", proposal=proposal, training=training, **SMALL)
    designs = {"dose": torch.tensor([0.6, 1.4]), "place": torch.tensor([[0.2, 0.3], [0.9, 0.9]])}
    check_bounds(amortised.at(designs, seed=0), gain_eig(designs["dose"] * designs["place"].sum(-1)), 0.1)
    with pytest.raises(ValueError, match=r"proposal: expected designs .* got none of \['place'\]"):
        amortise_eig(kinds_of_design, "y", proposal=lambda number: {"dose": torch.rand(number)})
    with pytest.raises(ValueError, match="proposal: expected 'dose' of shape"):
        amortise_eig(kinds_of_design, "y", proposal=lambda number: proposal(number + 1))


def test_an_implicit_model_is_amortised_too():
    training = Fresh(num_steps=100, batch_size=256)
    amortised = amortise_eig(implicit_toy.implicit_toy(), "y", "theta", training=training, **SMALL)
    designs = torch.tensor([0.2, 0.8])
    curve = amortised.at({amortised.experiment.design_labels[0]: designs}, seed=0)
    assert (curve.eig - Z * curve.standard_error < implicit_toy.exact_eig(designs)).all()


def test_a_model_without_design_is_refused():
    with pytest.raises(ValueError, match="has no design"):
        amortise_eig(no_design, "y")

"""Laws of ensembles and of candidate learning rates."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Fresh, Pool, certify, eig_flow, flow_posterior
from pyro_voed.densities import StackedDensity
from pyro_voed.design import optimise_design
from pyro_voed.problems import linear_gaussian
from tests.closed_forms import check_bounds, gain_eig, scaled
from tests.estimators.cases import small_flow

Z = 4.0
DESIGNS = torch.tensor([0.0, 0.6, 1.2, 2.0])
EXACT = gain_eig(DESIGNS)
QUIET = {"seed": 0, "progress": False}
SMALL = {"density": small_flow, "num_samples": 2_000, **QUIET}
ENSEMBLE = {"designs": {"xi": DESIGNS}, "ensemble": True, **SMALL}


def mixed_targets():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    switch = pyro.sample("switch", dist.Bernoulli(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(xi * theta + 3.0 * switch, 1.0))


@pytest.fixture(scope="module")
def ensemble():
    return eig_flow(scaled, "y", training=Fresh(num_steps=150), **ENSEMBLE)


def test_every_member_of_an_ensemble_bounds_its_own_design(ensemble):
    assert isinstance(ensemble.density, StackedDensity)
    assert ensemble.eig.shape == (4,)
    # Conjugate, so the flow's first layer can be exact: what is left is training.
    check_bounds(ensemble, EXACT, 0.05)


def test_an_ensemble_keeps_a_design_batch_of_two_dimensions():
    grid = {"xi": DESIGNS.reshape(2, 2)}
    result = eig_flow(scaled, "y", training=Fresh(num_steps=50), **{**ENSEMBLE, "designs": grid})
    assert result.eig.shape == result.standard_error.shape == (2, 2)
    check_bounds(result, EXACT.reshape(2, 2), 0.15)


def test_an_ensemble_can_be_certified_asked_for_posteriors_and_trained_further(ensemble):
    sure = certify(ensemble, width=0.2, seed=0)
    assert sure.interval.shape == (2, 4)
    assert ((sure.interval[0] < EXACT) & (EXACT < sure.interval[1])).all()
    draws = flow_posterior(ensemble, torch.tensor(2.0), 4_000, design_index=3, seed=0).flat("theta")
    # Posterior of theta given y = 2 at xi = 2: N(0.8, 0.2); the density is learnt, so 0.05 is left for its own error.
    assert abs(draws.mean() - 0.8) < 0.05 + Z * 0.2**0.5 / 4_000**0.5
    as_it_is = {"density": ensemble.density, "training": Fresh(num_steps=0)}
    again = eig_flow(scaled, "y", **{**ENSEMBLE, **as_it_is, "seed": 1})
    assert (again.eig - ensemble.eig).abs().max() < Z * (2 * ensemble.standard_error.max() ** 2).sqrt()
    with pytest.raises(ValueError, match="expected an ensemble of 2 members, one for each design, got 4"):
        eig_flow(scaled, "y", **{**ENSEMBLE, **as_it_is, "designs": {"xi": DESIGNS[:2]}})


@pytest.mark.slow
def test_an_ensemble_learns_from_a_pool():
    check_bounds(eig_flow(scaled, "y", training=Pool(4_000), **ENSEMBLE), EXACT, 0.1)


def test_the_best_rate_is_chosen_and_reported_on_other_draws():
    training = Fresh(num_steps=40, learning_rate=[0.3, 5e-3])
    single = eig_flow(scaled, "y", training=training, **SMALL)
    shared = eig_flow(scaled, "y", designs={"xi": DESIGNS}, training=training, **SMALL)
    for result in (single, shared):
        assert result.learned.learning_rate.item() == pytest.approx(5e-3)
    assert single.eig - Z * single.standard_error < gain_eig(0.5)
    own = eig_flow(scaled, "y", training=training, **{**ENSEMBLE, "designs": {"xi": DESIGNS[1:]}})
    assert own.learned.learning_rate.tolist() == pytest.approx([5e-3] * 3)


@pytest.mark.slow
def test_rates_are_tried_in_turn_on_a_pool():
    pooled = eig_flow(scaled, "y", training=Pool(500, learning_rate=[1e-5, 5e-3]), **QUIET)
    assert pooled.learned.learning_rate.item() == pytest.approx(5e-3)


@pytest.mark.parametrize("rates", [[], [1e-3, 0.0], -1.0])
def test_rates_out_of_range_are_refused(rates):
    for training in (Fresh, Pool):
        with pytest.raises(ValueError, match="learning_rate"):
            training(learning_rate=rates)


@pytest.mark.parametrize("projected", [False, True])
def test_starts_climb_together_each_to_its_own_end(projected):
    projection = (lambda designs: {"xi": designs["xi"].clamp(0.1, 1.5)}) if projected else None
    starts = {"xi": torch.tensor([0.2, 1.0])}
    training = Fresh(num_steps=100, design_learning_rate=0.1)
    best = optimise_design(scaled, "y", starts=starts, constraints=projection, training=training, **SMALL)
    assert best.start_eigs.shape == (3,)
    assert best.history.bound.shape == (100,)
    assert best.path["xi"].shape == best.path_steps.shape
    assert best.designs["xi"] > (1.45 if projected else 1.6)
    check_bounds(best.final, gain_eig(best.designs["xi"]), 0.05)
    assert pyro.param("xi").item() == pytest.approx(best.designs["xi"].item())


@pytest.mark.parametrize("targets", ["switch", ["switch", "theta"]])
def test_an_ensemble_has_discrete_and_mixed_targets_too(targets):
    common = {"designs": {"xi": torch.tensor([0.0, 1.0])}, "training": Fresh(num_steps=60), **QUIET}
    own = eig_flow(mixed_targets, "y", targets, ensemble=True, **common)
    shared = eig_flow(mixed_targets, "y", targets, **common)
    # Both are lower bounds of the same information, trained for a moment only.
    assert (own.eig > 0.2).all()
    assert (own.eig - shared.eig).abs().max() < 0.2


def test_a_single_design_needs_no_ensemble():
    model = linear_gaussian.linear_gaussian()
    result = eig_flow(model, "y", "theta", ensemble=True, training=Fresh(num_steps=2), **SMALL)
    assert result.eig.shape == ()
    assert not isinstance(result.density, StackedDensity)

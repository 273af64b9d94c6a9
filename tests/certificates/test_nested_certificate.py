"""Laws of certificates from prior draws: two sides without training, and intervals that hold as often as they say."""

import pytest
import torch

from pyro_voed import certify, eig_nmc, eig_pce, max_regret
from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten
from pyro_voed.problems.linear_gaussian import dependent_nuisance
from tests.closed_forms import gain_eig, scaled

DESIGNS = torch.tensor([0.3, 0.9, 1.8])
EXACT = gain_eig(DESIGNS)
REPEATS = 200


def quick(model, *labels, **kwargs):
    return eig_nmc(model, *labels, num_outer_samples=100, num_inner_samples=100, seed=0, **kwargs)


@pytest.mark.parametrize(
    ("model", "labels", "exact"),
    [
        (linear_gaussian.linear_gaussian(), ("y", "theta"), 1.1989476),
        (finite.finite(), ("y", "theta"), 0.12580366909),
        (michaelis_menten.michaelis_menten(michaelis_menten.START_DESIGNS), ("y", "theta"), 2.4069),
    ],
)
def test_an_interval_from_prior_draws_holds_the_exact_value(model, labels, exact):
    """At the confidence of four standard errors a side: 6e-5 a model."""
    result = certify(quick(model, *labels), width=0.1, confidence=1 - 6e-5, seed=0)
    low, high = result.interval.tolist()
    assert low < exact < high
    assert high - low < 0.15
    assert result.certificate.certified
    assert result.certificate.lower < result.certificate.upper
    assert result.certificate.num_flow_samples == (0,)


def test_either_side_can_be_certified_over_a_batch_of_designs():
    common = {"num_outer_samples": 100, "num_inner_samples": 100, "designs": {"xi": DESIGNS}, "seed": 0}
    for estimate in (eig_nmc, eig_pce):
        result = certify(estimate(scaled, "y", **common), width=0.05, confidence=1 - 6e-5, seed=0)
        assert result.interval.shape == (2, 3)
        assert (result.interval[0] < EXACT).all()
        assert (EXACT < result.interval[1]).all()
    regret, chosen = max_regret(result)
    assert chosen == 2
    assert 0.0 < regret < 0.1


def test_the_same_seed_gives_the_same_interval_and_the_caller_keeps_his_stream():
    estimate = quick(scaled, "y")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = certify(estimate, width=0.1, seed=5).interval
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(certify(estimate, width=0.1, seed=5).interval, first)


def test_a_budget_bounds_the_simulations():
    result = certify(quick(scaled, "y"), width=1e-4, max_simulations=200_000, seed=0)
    assert result.certificate.num_simulations <= 200_000
    assert not result.certificate.width_reached
    assert result.interval[0] < gain_eig(0.5) < result.interval[1]


def test_models_without_the_densities_needed_are_refused():
    with pytest.raises(NotImplementedError, match="needs the density of the outcome"):
        quick(implicit_toy.implicit_toy(), "y", "theta")
    with pytest.raises(NotImplementedError, match="are drawn too and are not targets"):
        certify(quick(dependent_nuisance(), "y", "theta"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("width", [0.05, 0.2])
@pytest.mark.parametrize(("model", "labels", "exact"), [(linear_gaussian.linear_gaussian(), ("y", "theta"), 1.1989476)])
def test_intervals_from_prior_draws_cover(model, labels, exact, width):
    """At least 182 of 200 hold the exact value; exact 95 % intervals fail that with probability 0.006."""
    estimate = quick(model, *labels)
    intervals = torch.stack([certify(estimate, width=width, seed=seed).interval for seed in range(REPEATS)])
    held = ((intervals[:, 0] < exact) & (exact < intervals[:, 1])).sum()
    assert held >= 182

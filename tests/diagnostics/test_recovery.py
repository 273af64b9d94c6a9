"""Recovery, posterior predictive checks and the gap between bounds against closed forms.

Thresholds are four standard errors, so each fails about 1 time in 16,000 where the code is right; coverage of stated
errors is taken over 1,000 columns, where the share has standard error 0.007, with room of three of them and 0.01 for
quantities that are only nearly normal. Seeds are fixed besides.
"""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Fresh, eig_marginal
from pyro_voed.certificates.gap import bound_gap
from pyro_voed.diagnostics.predictive import _place, posterior_predictive_check
from pyro_voed.diagnostics.recovery import recovery
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.estimators import eig_flow, eig_nmc
from pyro_voed.inference import flow_posterior
from pyro_voed.problems.linear_gaussian import DEFAULT_EIG, linear_gaussian
from pyro_voed.results import Certificate, EIGResult

THRESHOLD = 4.0
NUM_COLUMNS, NUM_DRAWS = 1_000, 20


def conjugate(num_simulations, num_draws=NUM_DRAWS, *, dim=1, scale=1.0, bias=0.0):
    """theta ~ N(0, 1), y ~ N(theta, 1): draws of N(y / 2, 1 / 2), `scale` times as wide and `bias` too high."""
    truths = torch.randn(num_simulations, dim)
    y = truths + torch.randn_like(truths)
    draws = 0.5 * y.unsqueeze(1) + bias + scale * math.sqrt(0.5) * torch.randn(num_simulations, num_draws, dim)
    return SimulatedPosteriors(truths, draws, tuple(f"theta[{index}]" for index in range(dim)))


FIELDS = {
    # Exact values of N(y / 2, 1 / 2), the error of a mean and a variance from NUM_DRAWS included.
    "correlation": 0.5 / math.sqrt(0.5 + 0.5 / NUM_DRAWS),
    "nrmse": math.sqrt(0.5 * (1 + 1 / NUM_DRAWS)),
    "contraction": 0.5,
    "z_mean": 0.0,
    "z_sd": math.sqrt((1 + 1 / NUM_DRAWS) * (NUM_DRAWS - 1) / (NUM_DRAWS - 3)),
}


@pytest.mark.parametrize(("field", "exact"), FIELDS.items(), ids=FIELDS)
def test_values_and_their_errors_are_right(field, exact):
    result = recovery(conjugate(400, dim=NUM_COLUMNS))
    values, errors = getattr(result, field), getattr(result, f"{field}_error")
    # A ratio's bias is of the order of the square of its error; the mean over columns may show it.
    mean_error = values.std() / math.sqrt(NUM_COLUMNS)
    assert abs(values.mean() - exact) < THRESHOLD * mean_error + errors.square().mean()
    covered = ((values - exact).abs() < 1.96 * errors).double().mean()
    assert abs(covered - 0.95) < 0.03


def test_contraction_is_not_clamped():
    result = recovery(conjugate(2_000, scale=2.0))
    assert result.contraction < 0
    assert abs(result.contraction + 1.0) < THRESHOLD * result.contraction_error


def test_a_bias_and_a_wrong_width_show_in_z():
    biased = recovery(conjugate(1_000, 200, bias=0.5))
    assert abs(biased.z_mean + 0.5 / math.sqrt(0.5)) < THRESHOLD * biased.z_mean_error + 0.01
    narrow = recovery(conjugate(1_000, 200, scale=0.8))
    assert abs(narrow.z_sd - 1.25) < THRESHOLD * narrow.z_sd_error + 0.01
    assert narrow.contraction > 1 - narrow.nrmse**2 + THRESHOLD * narrow.contraction_error


def test_large_offsets_lose_no_digits():
    simulated = conjugate(200)
    exact = SimulatedPosteriors(simulated.truths.double(), simulated.draws.double(), simulated.columns)
    moved = SimulatedPosteriors(exact.truths + 1e6, exact.draws + 1e6, exact.columns)
    first, second = recovery(exact), recovery(moved)
    for field in FIELDS:
        assert torch.allclose(getattr(first, field), getattr(second, field), atol=1e-6)


def test_intervals_hold_their_mass():
    result = recovery(conjugate(4_000, 200), mass=0.8)
    low, high = result.interval
    held = ((result.truths > low) & (result.truths < high)).double().mean().item()
    # Interpolated quantiles of 200 draws miss by less than 1 / 200.
    assert abs(held - 0.8) < THRESHOLD * math.sqrt(0.16 / 4_000) + 0.005


def test_draws_that_do_not_vary_are_not_hidden():
    simulated = conjugate(50)
    simulated.draws[3] = 1.0
    assert not recovery(simulated).z_sd.isfinite()


def test_what_cannot_be_recovered_is_refused():
    with pytest.raises(ValueError, match="at least 5 experiments, got 4"):
        recovery(conjugate(4))
    with pytest.raises(ValueError, match="at least 4 draws of each experiment, got 3"):
        recovery(conjugate(10, 3))
    with pytest.raises(ValueError, match="mass: expected"):
        recovery(conjugate(10), mass=1.0)
    constant = SimulatedPosteriors(torch.ones(10, 1), torch.randn(10, 20, 1), ("theta",))
    with pytest.raises(ValueError, match=r"columns \['theta'\] constant"):
        recovery(constant)


def test_recovery_prints_every_number_with_its_error():
    lines = str(recovery(conjugate(50, dim=2))).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("theta[0]  correlation ")
    assert lines[1].count("+-") == 5


@pytest.fixture(scope="module")
def trained():
    return eig_flow(
        linear_gaussian(), "y", "theta", training=Fresh(num_steps=300), references=[eig_marginal, eig_nmc], seed=0
    )


OUTCOME = torch.tensor([1.0, 2.0, 1.5])


def test_predictive_outcomes_are_those_of_the_posterior(trained):
    # y = X theta + unit noise: the mean of each outcome is X times that of theta, its variance the noise's larger.
    statistics = {f"y[{i}]": lambda outcome, i=i: outcome["y"][:, i] for i in range(3)}
    check = posterior_predictive_check(trained, OUTCOME, statistics, 4_000, seed=0)
    design = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    signal = flow_posterior(trained, OUTCOME, 4_000, seed=1).flat("theta") @ design.T
    for drawn, exact in ((check.draws, signal), (check.draws.square(), signal.square() + 1)):
        error = torch.hypot(drawn.std(0), exact.std(0)) / math.sqrt(4_000)
        assert ((drawn.mean(0) - exact.mean(0)).abs() < THRESHOLD * error).all()
    assert torch.equal(check.observed, OUTCOME.double())
    assert check.names == ("y[0]", "y[1]", "y[2]")


def test_an_outcome_the_model_cannot_make_is_found(trained):
    def difference(outcome):  # of two measurements of one coefficient: noise alone, N(0, 2)
        return outcome["y"][:, 1] - outcome["y"][:, 2]

    odd = torch.tensor([0.0, 4.0, -4.0])
    check = posterior_predictive_check(trained, odd, difference, 2_000, seed=0)
    assert check.p_values < 0.01
    assert check.quantile > 0.99
    usual = posterior_predictive_check(trained, OUTCOME, difference, 2_000, seed=0)
    exact = torch.special.ndtr(torch.tensor(0.5 / math.sqrt(2.0)))
    assert abs(usual.quantile - exact) < THRESHOLD * usual.quantile_error
    assert abs(usual.p_values - 2 * (1 - exact)) < 2 * THRESHOLD * usual.quantile_error


def test_p_values_of_exchangeable_statistics_are_uniform():
    draws = torch.randn(99, 4_000).double()
    p_values = _place(("t",) * 4_000, torch.randn(4_000).double(), draws).p_values
    for level in (0.02, 0.1, 0.5):
        assert abs((p_values <= level + 1e-9).double().mean() - level) < THRESHOLD * math.sqrt(level / 4_000)


def test_ties_count_half():
    placed = _place(("t",), torch.zeros(1).double(), torch.tensor([[-1.0], [0.0], [0.0], [1.0]]).double())
    assert placed.quantile.item() == 0.5
    assert placed.p_values.item() == 1.0


def test_predictive_checks_keep_seeds_and_the_callers_stream(trained):
    total = lambda outcome: outcome["y"].sum(-1)  # noqa: E731
    state = torch.get_rng_state()
    first, second = (posterior_predictive_check(trained, OUTCOME, total, 50, seed=2) for _ in range(2))
    assert torch.equal(first.draws, second.draws)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = [posterior_predictive_check(trained, OUTCOME, total, 50).draws for _ in range(2)]
    assert not torch.equal(*fresh)
    assert str(first).splitlines()[1].startswith("statistic  observed 4.5, predicted")


def test_bad_statistics_are_refused(trained):
    def check(statistic):
        return posterior_predictive_check(trained, OUTCOME, statistic, 50, seed=0)

    with pytest.raises(TypeError, match="statistic"):
        check({"mean": 3.0})
    with pytest.raises(ValueError, match="expected at least one"):
        check({})
    with pytest.raises(TypeError, match="expected it to return a tensor"):
        check(lambda outcome: 1.0)
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(1, 3\)"):
        check(lambda outcome: outcome["y"])
    with pytest.raises(ArithmeticError, match="not finite"):
        check(lambda outcome: outcome["y"][:, 0] / 0.0)


def test_deterministic_targets_cannot_be_simulated_from():
    def model():
        root = pyro.sample("root", dist.Normal(0.0, 1.0))
        square = pyro.deterministic("square", root**2)
        pyro.sample("y", dist.Normal(square, 1.0))

    result = eig_flow(Experiment(model, "y", "square", prior_entropy=1.0), training=Fresh(num_steps=2), seed=0)
    with pytest.raises(NotImplementedError, match=r"\['square'\] are deterministic"):
        posterior_predictive_check(result, torch.tensor(1.0), lambda outcome: outcome["y"], 50)


def test_each_member_of_a_batch_is_simulated_at_its_own_design():
    designs = {"xi": torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])}
    result = eig_flow(linear_gaussian(), "y", "theta", designs=designs, training=Fresh(num_steps=50), seed=0)
    check = posterior_predictive_check(
        result, torch.zeros(3), lambda outcome: outcome["y"][:, 0], 4_000, design_index=0, seed=0
    )
    # Without a design there is noise alone, N(0, 1), whatever the targets are.
    assert abs(check.draws.mean()) < THRESHOLD / math.sqrt(4_000)
    assert abs(check.draws.var() - 1.0) < THRESHOLD * math.sqrt(2 / 4_000)


def test_the_gap_bounds_the_divergence_of_the_flow(trained):
    gap = bound_gap(trained)
    divergence = DEFAULT_EIG - trained.eig
    assert gap.gap - divergence > -THRESHOLD * gap.standard_error
    assert gap.gap.item() == pytest.approx((gap.upper - trained.eig).item())
    assert gap.source in ("marginal", "nmc")
    assert str(gap).startswith("expected KL from posterior to density at most")


def estimate(eig, error, bound="upper", **fields):
    return EIGResult(
        torch.as_tensor(eig),
        torch.as_tensor(error),
        bound,
        "eig_flow",
        0,
        0,
        0.0,
        {},
        (),
        (),
        density=object(),
        **fields,
    )


def certificate(upper, error):
    upper, error = torch.as_tensor(upper), torch.as_tensor(error)
    return Certificate(
        torch.stack([upper - 1, upper]), 0.95, upper, error, upper, error, error, True, True, (), (), (), 0, 0.0
    )


def test_the_tightest_upper_bound_is_taken():
    loose, tight = estimate(3.0, 0.01), estimate(2.0, 0.04)
    both = estimate(1.0, 0.03, "lower", marginal=loose, nmc=tight)
    gap = bound_gap(both)
    assert (gap.source, gap.gap.item()) == ("nmc", 1.0)
    assert gap.standard_error.item() == pytest.approx(0.05)
    assert bound_gap(replace(both, nmc=None)).source == "marginal"
    assert bound_gap(replace(both, certificate=certificate(1.5, 0.01))).source == "certificate"
    batch = estimate([1.0, 1.0], [0.1, 0.1], "lower", nmc=estimate([1.5, 0.9], [0.1, 0.1]))
    assert torch.allclose(bound_gap(batch).gap, torch.tensor([0.5, -0.1]))
    assert "worst of 2 designs" in str(bound_gap(batch))


def test_results_without_two_sides_are_refused():
    with pytest.raises(ValueError, match="holds no upper bound"):
        bound_gap(estimate(1.0, 0.1, "lower"))
    with pytest.raises(ValueError, match="expected a lower bound by a density"):
        bound_gap(estimate(1.0, 0.1, "neither", nmc=estimate(2.0, 0.1)))
    with pytest.raises(ValueError, match="expected a lower bound by a density"):
        bound_gap(eig_nmc(linear_gaussian(), "y", "theta", num_outer_samples=10, seed=0))

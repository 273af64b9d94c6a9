"""Calibration checks on posteriors that are exact, and on ones made wrong in a known way.

A check at confidence 95 % fails on exact posteriors 5 % of the time; of 400 repeats the rejected share is held to that
within four binomial errors either way (a check that hardly ever fails is wrong too). P-values on exact posteriors must
exceed 1e-4, which they miss 1 time in 10,000. Other thresholds: see `cases`.
"""

import math
from dataclasses import replace

import pytest
import torch

from pyro_voed.diagnostics.calibration import PASSED, _direction, sbc
from pyro_voed.diagnostics.coverage import expected_coverage
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.diagnostics.tarp import tarp
from pyro_voed.diagnostics.uniformity import (
    NUM_NULL_SETS,
    random_ranks,
    uniformity_band,
    uniformity_p_values,
)
from tests.diagnostics.cases import THRESHOLD, conjugate, near

NUM_REPEATS = 400
LEAST_P = 1e-4


CHECKS = {"sbc": sbc, "coverage": expected_coverage, "tarp": tarp}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_exact_posteriors_fail_as_often_as_stated(check):
    rejected = sum(not check(conjugate(60, 20, dim=2)).passed for _ in range(NUM_REPEATS))
    assert near(rejected / NUM_REPEATS, 0.05, NUM_REPEATS)


def verdicts(simulated):
    coverage = expected_coverage(simulated, seed=0)
    ranks, balls = sbc(simulated, seed=0), tarp(simulated, seed=0)
    assert not any(result.passed for result in (ranks, coverage, balls))
    return {ranks.verdicts[0], coverage.joint.verdict, coverage.columns[0].verdict, balls.verdict}


@pytest.mark.parametrize(("scale", "verdict"), [(0.8, "too narrow"), (1.2, "too wide")])
@pytest.mark.parametrize("dim", [1, 3])
def test_a_wrong_width_fails_every_check_in_its_direction(scale, verdict, dim):
    # In one dimension each check found it in all of 100 repeats with half as many experiments.
    assert verdicts(conjugate(2_000, 100, dim=dim, scale=scale)) == {verdict}


@pytest.mark.parametrize(("bias", "verdict"), [(0.3, "biased up"), (-0.3, "biased down"), (4.0, "biased up")])
def test_a_bias_is_named(bias, verdict):
    result = sbc(conjugate(1_000, 100, bias=bias), seed=0)
    assert not result.passed
    assert result.verdicts == (verdict,)


def test_bias_and_width_are_measured():
    result = sbc(conjugate(2_000, 500, bias=0.3), seed=0)
    assert abs(result.bias - 0.3) < THRESHOLD * result.bias_error
    assert abs(result.needed_scale - 1.0) < THRESHOLD * result.needed_scale_error
    for scale in (0.8, 1.2):
        result = sbc(conjugate(2_000, 500, scale=scale), seed=0)
        assert abs(result.needed_scale - 1 / scale) < THRESHOLD * result.needed_scale_error
        assert abs(result.bias) < THRESHOLD * result.bias_error


def test_one_wrong_column_is_found_among_right_ones():
    right, wrong = conjugate(1_000, 100, dim=3), conjugate(1_000, 100, scale=0.7)
    simulated = SimulatedPosteriors(
        torch.cat([right.truths, wrong.truths], 1), torch.cat([right.draws, wrong.draws], 2), ("a", "b", "c", "d")
    )
    ranks, coverage = sbc(simulated, seed=0), expected_coverage(simulated, seed=0)
    for words, p_values, passed in (
        (ranks.verdicts, ranks.p_values.tolist(), ranks.passed),
        ([r.verdict for r in coverage.columns], [r.p_value for r in coverage.columns], coverage.passed),
    ):
        assert not passed
        assert words[3] == "too narrow"
        assert min(p_values[:3]) > LEAST_P


def test_only_tarp_and_the_joint_region_see_dependence():
    # Truths of the two columns are equal but for a little, draws are independent, each with the right marginal.
    common, own = torch.randn(1_000, 1), torch.randn(1_000, 2)
    truths, draws = math.sqrt(0.95) * common + math.sqrt(0.05) * own, torch.randn(1_000, 100, 2)
    simulated = SimulatedPosteriors(
        truths, draws, ("a", "b"), None, -0.5 * truths.square().sum(-1), -0.5 * draws.square().sum(-1)
    )
    assert sbc(simulated, seed=0).p_value > LEAST_P
    assert min(region.p_value for region in expected_coverage(simulated, seed=0).columns) > LEAST_P
    assert not tarp(simulated, seed=0).passed
    assert expected_coverage(simulated, seed=0).joint.p_value < LEAST_P


def test_the_prior_in_place_of_the_posterior_passes():
    # What these checks cannot see, and the documentation says so.
    simulated = SimulatedPosteriors(torch.randn(1_000, 1), torch.randn(1_000, 100, 1), ("theta",))
    assert min(check(simulated, seed=0).p_value for check in CHECKS.values()) > LEAST_P


def test_discrete_quantities_are_calibrated_by_ties_broken_at_random():
    prior, flip = 0.3, 0.2
    truths = (torch.rand(2_000) < prior).double()
    y = torch.where(torch.rand(2_000) < flip, 1 - truths, truths)
    given_one = prior * (1 - flip) / (prior * (1 - flip) + (1 - prior) * flip)
    given_zero = prior * flip / (prior * flip + (1 - prior) * (1 - flip))
    posterior = torch.where(y == 1, given_one, given_zero)
    draws = (torch.rand(2_000, 50) < posterior.unsqueeze(1)).double()
    simulated = SimulatedPosteriors(truths.unsqueeze(1), draws.unsqueeze(-1), ("on",))
    assert min(check(simulated, seed=0).p_value for check in CHECKS.values()) > LEAST_P
    # Intervals and balls see no more of two values than that both are there; ranks tell which comes too often.
    wrong = SimulatedPosteriors(truths.unsqueeze(1), (torch.rand(2_000, 50, 1) < 0.5).double(), ("on",))
    assert sbc(wrong, seed=0).verdicts == ("biased up",)


def test_ranks_are_uniform_over_every_place():
    # Of 2 draws: ranks 0, 1 and 2, also where all values are equal.
    for draws in (torch.randn(3_000, 2), torch.zeros(3_000, 2)):
        values = torch.randn(3_000) if draws.any() else torch.zeros(3_000)
        counts = random_ranks(values, draws).bincount(minlength=3)
        assert len(counts) == 3
        assert all(near(count.item() / 3_000, 1 / 3, 3_000) for count in counts)


@pytest.mark.parametrize(("num_simulations", "num_draws"), [(50, 10), (200, 19), (300, 99)])
def test_band_and_p_value_hold_jointly_and_agree(num_simulations, num_draws):
    probabilities = tuple(k / (num_draws + 1) for k in range(1, num_draws + 1))
    ranks = torch.randint(0, num_draws + 1, (4_000, num_simulations))
    below = torch.zeros(4_000, num_draws + 1, dtype=torch.long)
    counts = below.scatter_add_(1, ranks, torch.ones_like(ranks)).cumsum(1)[:, :-1].T
    p_values = uniformity_p_values(counts, num_simulations, probabilities)
    for level in (0.01, 0.05, 0.5):
        low, high = uniformity_band(num_simulations, probabilities, level)
        shares = counts.double() / num_simulations
        outside = ((shares < low.unsqueeze(1)) | (shares > high.unsqueeze(1))).any(0)
        assert torch.equal(outside, p_values <= level)
        error = math.sqrt(level * (1 - level) * (1 / 4_000 + 1 / NUM_NULL_SETS))
        # Whole numbers may put the size somewhat below the level, by a quarter at these sizes.
        assert 0.75 * level - THRESHOLD * error < outside.double().mean() < level + THRESHOLD * error


def leaves(curves, result):
    """Whether each curve, `(num_levels, num_curves)`, leaves the band anywhere."""
    room = 1e-12
    low, high = result.lower.unsqueeze(1), result.upper.unsqueeze(1)
    return ((curves < low - room) | (curves > high + room)).any(0).tolist()


def test_a_check_fails_exactly_where_its_curve_leaves_the_band():
    failures = set()
    for scale in (1.0, 0.9, 0.8, 0.7) * 8:
        simulated = conjugate(80, 20, dim=3, scale=scale)
        ranks, coverage, balls = (check(simulated) for check in CHECKS.values())
        shares = torch.stack([region.coverage for region in coverage.regions], 1)
        for result, curves, words in (
            (ranks, ranks.ecdf, ranks.verdicts),
            (coverage, shares, [region.verdict for region in coverage.regions]),
            (balls, balls.coverage.unsqueeze(1), [balls.verdict]),
        ):
            outside = leaves(curves, result)
            assert result.passed != any(outside)
            assert [word != PASSED for word in words] == outside
            failures.add((type(result), result.passed))
    assert len(failures) == 6  # each has passed and each has failed


def test_p_values_reach_below_what_was_simulated():
    p_value = uniformity_p_values(torch.tensor([[500], [500]]), 500, (0.4, 0.6)).item()
    assert 0 < p_value < 1 / NUM_NULL_SETS


def test_errors_of_bias_and_width_are_right():
    # 2,000 columns of uniform ranks: the share within 1.96 errors has standard error 0.005.
    ranks = torch.randint(0, 51, (150, 2_000))
    bias, bias_error, scale, scale_error = _direction(ranks, 50)
    for estimate, error in ((bias, bias_error), (scale - 1, scale_error)):
        assert abs((estimate.abs() < 1.96 * error).double().mean() - 0.95) < 0.02


def test_coverage_is_the_one_known_in_closed_form():
    # A central interval of mass a of a posterior 0.8 times as wide holds the truth with 2 Phi(0.8 z) - 1.
    result = expected_coverage(conjugate(4_000, 200, scale=0.8), seed=0)
    z = torch.special.ndtri(0.5 + 0.5 * result.levels)
    exact = 2 * torch.special.ndtr(0.8 * z) - 1
    for region in result.regions:
        # A finite number of draws widens what ranks can tell by about 1 / num_draws.
        assert ((region.coverage - exact).abs() < THRESHOLD * region.standard_error + 0.005).all()
        assert abs(region.excess - (exact - result.levels).mean()) < THRESHOLD * region.excess_error + 0.005


def test_joint_regions_need_log_densities():
    simulated = conjugate(100, 20, densities=False)
    assert expected_coverage(simulated, seed=0).joint is None
    assert expected_coverage(conjugate(100, 20), joint=False, seed=0).joint is None
    with pytest.raises(ValueError, match="need log_density"):
        expected_coverage(simulated, joint=True)
    broken = conjugate(100, 20)
    broken.log_density[3] = math.nan
    with pytest.raises(ValueError, match="log_density: 1 of 100 values are NaN"):
        expected_coverage(broken)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_cannot_be_tested_is_refused(check):
    with pytest.raises(ValueError, match="expected at least 20 experiments, got 19"):
        check(conjugate(19, 20))
    with pytest.raises(ValueError, match=r"confidence: expected a number in \(0, 1\)"):
        check(conjugate(50, 20), confidence=1.0)


def test_bad_levels_references_and_columns_are_refused():
    for levels in ((), (0.5, 0.5), (0.5, 0.4), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="levels: expected increasing"):
            expected_coverage(conjugate(50, 20), levels)
    with pytest.raises(ValueError, match="num_references: expected at least 1"):
        tarp(conjugate(50, 20), num_references=0)
    with pytest.raises(ValueError, match=r"columns \[0\] constant"):
        tarp(SimulatedPosteriors(torch.ones(50, 1), torch.ones(50, 20, 1), ("a",)))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_seeds_fix_results_and_the_caller_keeps_the_stream(check):
    simulated = SimulatedPosteriors(torch.rand(50, 1).round(), torch.rand(50, 20, 1).round(), ("on",))
    state = torch.get_rng_state()
    assert str(check(simulated, seed=3)) == str(check(simulated, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert str(check(simulated)) != str(check(simulated))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_units_do_not_matter(check):
    simulated = conjugate(100, 20, dim=2)
    scale, offset = torch.tensor([1e3, 1e-3]), torch.tensor([1e4, -1.0])
    moved = replace(simulated, truths=simulated.truths * scale + offset, draws=simulated.draws * scale + offset)
    assert str(check(moved, seed=0)) == str(check(simulated, seed=0))


def test_results_print_their_columns():
    simulated = conjugate(100, 20, dim=2)
    lines = str(sbc(simulated, seed=0)).splitlines()
    assert lines[0].startswith("simulation-based calibration")
    assert [line.split()[0] for line in lines[1:]] == ["theta[0]", "theta[1]"]
    lines = str(expected_coverage(simulated, seed=0)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["joint", "theta[0]", "theta[1]"]
    assert "coverage less level" in str(tarp(simulated, seed=0))

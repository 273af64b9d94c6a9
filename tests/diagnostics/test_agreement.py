"""Accuracies against the Bayes accuracy of known pairs of distributions.

In 430 repeats under equality the stated error was 1.0 to 1.2 times the true one and one result was more than 3 of them
off. Thresholds: see `cases`.
"""

import math

import pytest
import torch

from pyro_voed.diagnostics import agreement, c2st
from pyro_voed.diagnostics.agreement import _moments
from pyro_voed.diagnostics.draws import matched_draws
from tests.diagnostics.cases import THRESHOLD, chain, normal


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def averaged(num_repeats, *draws_of):
    """Mean accuracy of several pairs, and its standard error."""
    results = [c2st(*(draw() for draw in draws_of), seed=seed) for seed in range(num_repeats)]
    mean = sum(result.accuracy for result in results) / num_repeats
    return mean, math.sqrt(sum(result.standard_error**2 for result in results)) / num_repeats


SIZES = {"1-d": (500, 500, 1), "2-d": (1000, 1000, 2), "5-d": (500, 500, 5), "unequal": (300, 1200, 2)}


@pytest.mark.parametrize(("num_first", "num_second", "dim"), SIZES.values(), ids=SIZES)
def test_equality_and_a_large_shift_have_the_bayes_accuracy(num_first, num_second, dim):
    equal = c2st(normal(num_first, dim), normal(num_second, dim), seed=0)
    assert abs(equal.accuracy - 0.5) < THRESHOLD * equal.standard_error
    assert equal.num_draws == (num_first, num_second)
    # Two deviations apart: Phi(1). The classifier may fall short of it, by 0.03 in five dimensions at these sizes.
    apart, best = c2st(normal(num_first, dim, 2.0), normal(num_second, dim), seed=0), normal_cdf(1.0)
    assert -0.03 - THRESHOLD * apart.standard_error < apart.accuracy - best < THRESHOLD * apart.standard_error


def test_small_shifts_in_two_dimensions():
    mean, error = averaged(4, lambda: normal(1000, 2, 1.0), lambda: normal(1000, 2))
    assert abs(mean - normal_cdf(0.5)) < THRESHOLD * error
    # One run detects it at 4.5 standard errors on average; four together do so almost surely.
    mean, error = averaged(4, lambda: normal(1000, 2, 0.3), lambda: normal(1000, 2))
    assert 0.5 + THRESHOLD * error < mean < normal_cdf(0.15) + THRESHOLD * error


def test_differences_beyond_the_first_two_moments_are_detected():
    bent = torch.randn(1000, 2)
    bent[:, 1] = (bent[:, 1] + 0.7 * (bent[:, 0] ** 2 - 1)) / math.sqrt(1 + 2 * 0.7**2)
    result = c2st(bent, torch.randn(1000, 2), seed=0)
    assert result.accuracy > 0.5 + THRESHOLD * result.standard_error


def test_stated_error_covers_repeats():
    # A 95 % interval as stated covers 0.5 in at least 42 of 50 repeats; an exact one fails that 1 time in 250.
    results = [c2st(torch.randn(100, 1), torch.randn(100, 1), num_seeds=2) for _ in range(50)]
    assert sum(abs(result.accuracy - 0.5) < 1.96 * result.standard_error for result in results) >= 42


def test_units_do_not_matter():
    first, second = normal(300, 2, 1.0), normal(300, 2)
    scale, offset = torch.tensor([1e3, 1e-3]), torch.tensor([1e4, -1.0])
    elsewhere = c2st(first * scale + offset, second * scale + offset, seed=0)
    assert elsewhere.accuracy == pytest.approx(c2st(first, second, seed=0).accuracy, abs=0.01)


def test_seeds_random_stream_and_grad_mode():
    first, second = torch.randn(200, 2), torch.randn(200, 2)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert c2st(first, second, seed=3).accuracy == c2st(first, second, seed=3).accuracy
        assert not torch.is_grad_enabled()
    agreement(first, torch.randn(400, 2), num_draws=100, num_seeds=1, seed=0)
    fresh = [c2st(first, second, num_seeds=1).accuracy for _ in range(2)]
    assert fresh[0] != fresh[1]
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(400, 2)
    for _ in range(2):
        torch.randint(2**31 - 1, ())
    assert torch.equal(torch.get_rng_state(), after)  # seed=None costs the caller one draw and no more


def test_agreement_tells_a_right_posterior_from_a_shifted_one():
    reference = normal(2000, 2)
    right = agreement(normal(1000, 2), reference, seed=0)
    for result in (right.c2st, right.control):
        assert abs(result.accuracy - 0.5) < THRESHOLD * result.standard_error
    wrong = agreement(normal(1000, 2, 1.0), reference, seed=0)
    assert wrong.c2st.accuracy > 0.5 + THRESHOLD * wrong.c2st.standard_error
    # The power check moves the reference's own draws, by a distance whose Bayes accuracy is known.
    assert right.power.accuracy > 0.5 + 2 * right.power.standard_error
    assert right.power.accuracy < normal_cdf(0.15) + THRESHOLD * right.power.standard_error
    assert right.control.num_draws == right.power.num_draws == (1000, 1000)


def test_moments_and_their_errors():
    # 2,000 independent columns: the share covered by a 95 % interval has standard error 0.005; four of them.
    sample, reference = 3.0 + 2.0 * torch.randn(400, 2_000), 1.0 + 4.0 * torch.randn(600, 2_000)
    difference, difference_error, ratio, ratio_error = _moments(*matched_draws(sample, reference))
    for estimate, error in ((difference, difference_error), (ratio, ratio_error)):
        covered = ((estimate - 0.5).abs() < 1.96 * error).double().mean().item()
        assert abs(covered - 0.95) < 0.02


def test_chains_are_thinned_and_chains_that_disagree_show_in_the_control():
    # Each draw is stored five times in a row, as a sticky chain would: only a fifth of them count.
    sticky = chain({"theta": torch.randn(4, 200, 2).repeat_interleave(5, dim=1)}, effective=800)
    result = agreement(torch.randn(600, 2), sticky, num_draws=600, num_seeds=1, seed=0)
    assert result.c2st.num_draws == (600, 600)
    assert result.control.num_draws == (400, 400)
    assert abs(result.control.accuracy - 0.5) < THRESHOLD * result.control.standard_error
    assert result.mean_difference_error[0].item() == pytest.approx(math.sqrt(1 / 600 + 1 / 800), rel=0.1)
    apart = chain({"theta": torch.randn(2, 400, 1) + torch.tensor([-1.0, 1.0]).view(2, 1, 1)}, 800)
    assert agreement(torch.randn(400, 1), apart, num_draws=400, num_seeds=1, seed=0).control.accuracy > 0.75


def test_agreement_prints_the_three_side_by_side():
    lines = str(agreement(torch.randn(200, 2), torch.randn(400, 2), num_draws=200, num_seeds=1, seed=0)).splitlines()
    assert [line.split(" C2ST")[0].strip() for line in lines[:3]] == [
        "sample against reference",
        "reference against itself (control)",
        "reference shifted by 0.3 sd (power)",
    ]
    assert len(lines) == 5
    assert lines[3].startswith("column 0  mean")


def test_too_few_effective_draws_are_refused():
    few = chain({"theta": torch.randn(1, 2000, 1)}, effective=300)
    with pytest.raises(ValueError, match=r"reference: .* 1000 effective draws, got 300 in column 'theta"):
        agreement(torch.randn(2000, 1), few)
    with pytest.raises(ValueError, match=r"reference: expected at least 200 effective draws"):
        agreement(torch.randn(150, 1), torch.randn(150, 1), num_draws=150)

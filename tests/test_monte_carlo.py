"""Laws of averages and of what their errors rest on.

Means are compared in standard errors: an exact one lies beyond `MANY` = 4.5 of them with probability 7e-6. Spreads are
compared over `REPEATS` independent repeats, whose standard deviation has a relative error of about 1 / sqrt(2 REPEATS),
and are allowed 4.5 of those.
"""

import math

import pytest
import torch

from pyro_voed.monte_carlo import controlled_terms, difference_errors, log_mean_exp, mean_and_standard_error, pareto_k

MANY = 4.5
REPEATS = 200
SPREAD = MANY / math.sqrt(2 * REPEATS)


# --- averages -------------------------------------------------------------------------------------------------------


def test_log_mean_exp_is_the_logarithm_of_the_mean():
    values = torch.randn(3, 4, 5).double()
    for dim in (0, 1, -1):
        torch.testing.assert_close(log_mean_exp(values, dim), values.exp().mean(dim).log())


def test_log_mean_exp_neither_overflows_nor_loses_zeros():
    assert log_mean_exp(torch.tensor([1e4, 1e4])).item() == 1e4
    assert log_mean_exp(torch.tensor([-1e4, -1e4])).item() == -1e4
    assert log_mean_exp(torch.tensor([0.0, -torch.inf])).item() == pytest.approx(-math.log(2))
    assert log_mean_exp(torch.tensor([-torch.inf, -torch.inf])).item() == -torch.inf


def test_errors_of_differences_are_those_of_the_differences_of_terms():
    # What all members share is a million times what tells them apart.
    apart = torch.randn(1_000, 2, 2).double()
    terms = 1e6 * torch.randn(1_000, 1, 1).double() + apart
    errors = difference_errors(terms)
    flat = terms.flatten(1)
    for first in range(4):
        for second in range(4):
            _, expected = mean_and_standard_error(flat[:, first] - flat[:, second])
            torch.testing.assert_close(errors[first, second], expected, rtol=1e-6, atol=1e-9)
    assert difference_errors(terms[:, 0, 0]) is None
    assert difference_errors(torch.zeros(2, 1_001)) is None


def test_the_standard_error_is_the_spread_of_the_mean():
    terms = 3.0 + 2.0 * torch.randn(50, REPEATS)
    mean, error = mean_and_standard_error(terms)
    assert mean.shape == error.shape == (REPEATS,)
    assert error.pow(2).mean().sqrt().item() == pytest.approx(mean.std().item(), rel=2 * SPREAD)


def test_the_mean_of_many_large_terms_keeps_its_digits():
    # Summed in single precision these lose a tenth of the standard error.
    terms = 1e4 + torch.randn(100_000)
    mean, error = mean_and_standard_error(terms)
    assert mean.item() == pytest.approx(terms.double().mean().item(), abs=1e-3)
    assert error.item() == pytest.approx(terms.double().std().item() / math.sqrt(100_000), rel=1e-5)


def test_terms_that_are_not_finite_show():
    for bad in (torch.inf, -torch.inf, torch.nan):
        mean, error = mean_and_standard_error(torch.tensor([1.0, bad, 2.0]))
        assert not mean.isfinite()
        assert not error.isfinite()


# --- controls -------------------------------------------------------------------------------------------------------


def linear_case(num_samples, num_repeats, explained=3.0, left=1.0):
    """Terms 2 + explained * c + left * e, whose control c is standard normal; the repeats are the batch."""
    controls = torch.randn(num_samples, num_repeats, 1).double()
    return 2.0 + explained * controls[..., 0] + left * torch.randn(num_samples, num_repeats).double(), controls


def test_controls_leave_the_mean():
    mean, error = mean_and_standard_error(controlled_terms(*linear_case(400, REPEATS)))
    scores = (mean - 2.0) / error
    assert abs(scores.mean()) <= MANY / math.sqrt(REPEATS)
    assert scores.std().item() == pytest.approx(1.0, abs=2 * SPREAD)


def test_controls_leave_the_mean_of_terms_that_depend_on_them_otherwise():
    # A square is not explained by a line, and a fit to the same draws would be biased by order 1 / num_samples.
    controls = torch.randn(100, 4_000, 1).double()
    mean, _ = mean_and_standard_error(controlled_terms(controls[..., 0] ** 2 + controls[..., 0] ** 3, controls))
    assert abs(mean.mean() - 1.0) <= MANY * mean.std() / math.sqrt(4_000)


@pytest.mark.parametrize(("explained", "left"), [(3.0, 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_controls_lower_the_variance_to_what_they_leave_unexplained(explained, left):
    terms, controls = linear_case(400, REPEATS, explained, left)
    plain, _ = mean_and_standard_error(terms)
    mean, error = mean_and_standard_error(controlled_terms(terms, controls))
    assert plain.std().item() == pytest.approx(math.hypot(explained, left) / 20, rel=SPREAD)
    # The fitted coefficient costs one part in the size of a half.
    assert mean.std().item() == pytest.approx(left / 20 * (1 + 1 / 200), rel=SPREAD)
    assert error.mean().item() == pytest.approx(left / 20, rel=0.05)


def test_several_controls_explain_together_dependent_ones_too():
    controls = torch.randn(1_000, 3).double()
    terms = 1.0 + controls @ torch.tensor([1.0, -2.0, 0.5]).double()
    torch.testing.assert_close(controlled_terms(terms, controls), torch.ones(1_000).double(), atol=1e-6, rtol=0)
    dependent = torch.cat([controls, 3.0 * controls[:, :1], torch.zeros(1_000, 1)], -1)
    torch.testing.assert_close(controlled_terms(terms, dependent), torch.ones(1_000).double(), atol=1e-3, rtol=0)


def test_unrelated_controls_cost_next_to_nothing():
    terms = torch.randn(400, REPEATS).double()
    plain, plain_error = mean_and_standard_error(terms)
    mean, error = mean_and_standard_error(controlled_terms(terms, torch.randn(400, REPEATS, 2).double()))
    # Two coefficients from 200 draws: the variance grows by one part in a hundred.
    assert (error / plain_error).mean().item() == pytest.approx(1.0, abs=0.02)
    assert mean.std().item() == pytest.approx(plain.std().item(), rel=0.1)


@pytest.mark.parametrize("shape", [(1_000, 1), (1_000, 2), (500, 0), (150, 2)])
def test_controls_that_do_not_vary_are_none_or_have_few_draws_leave_the_terms(shape):
    terms = torch.randn(shape[0])
    controls = torch.zeros(*shape) if shape[0] == 1_000 else torch.randn(*shape)
    kept = controlled_terms(terms, controls)
    torch.testing.assert_close(kept, terms)
    assert shape[0] == 1_000 or torch.equal(kept, terms)
    assert kept.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_visible_in_terms_and_spoils_none_in_controls(bad):
    terms, controls = torch.randn(1_000), torch.randn(1_000, 1)
    controls[3] = bad
    assert controlled_terms(terms, controls).isfinite().all()
    terms[7] = bad
    assert (~controlled_terms(terms, torch.randn(1_000, 1)).isfinite()).nonzero().flatten().tolist() == [7]


def test_each_member_of_a_batch_has_coefficients_of_its_own():
    controls = torch.randn(400, 2, 3, 2).double()
    terms = torch.randn(400, 2, 3).double() + controls[..., 0] * torch.arange(6.0).reshape(2, 3)
    together = controlled_terms(terms, controls)
    assert together.shape == (400, 2, 3)
    for row in range(2):
        for column in range(3):
            alone = controlled_terms(terms[:, row, column], controls[:, row, column])
            torch.testing.assert_close(together[:, row, column], alone)


# --- tails ----------------------------------------------------------------------------------------------------------


def generalised_pareto(k, num_samples, num_repeats):
    """Draws by the inverse of the distribution function."""
    uniform = torch.rand(num_samples, num_repeats).double()
    return (uniform**-k - 1) / k


@pytest.mark.parametrize("k", [-0.5, 0.2, 0.5, 0.8, 1.2])
@pytest.mark.parametrize("side", [1, -1])
def test_the_tail_index_of_generalised_pareto_draws_is_theirs(k, side):
    estimates = pareto_k(side * generalised_pareto(k, 10_000, 25))
    # The prior of ten observations at 1/2 joins the 300 of the tail; the rest of the bias is of order 1 / 300.
    expected = (300 * k + 10 * 0.5) / 310
    assert abs(estimates.mean() - expected) <= 0.03 + MANY * estimates.std() / math.sqrt(25)


def test_the_spread_of_the_tail_index_is_that_of_maximum_likelihood():
    # Asymptotically (1 + k) / sqrt(tail size) (Smith 1987), less what the prior takes.
    estimates = pareto_k(generalised_pareto(0.5, 10_000, 50))
    assert estimates.std().item() == pytest.approx(1.5 / math.sqrt(300) * 300 / 310, rel=MANY / math.sqrt(100))


@pytest.mark.parametrize("num_samples", [500, 10_000])
def test_gaussian_terms_have_no_heavy_tail(num_samples):
    # The larger of two estimates of about 0 with standard deviation 1 / sqrt(tail size).
    estimates = pareto_k(torch.randn(num_samples, 30).double())
    assert estimates.max() < 0.5
    assert abs(estimates.mean()) <= 0.25


def test_a_mean_without_variance_is_seen_and_one_with_is_not():
    light = torch.distributions.StudentT(torch.tensor(10.0).double()).sample((10_000, 20))
    heavy = torch.distributions.Cauchy(torch.tensor(0.0).double(), 1.0).sample((10_000, 20))
    assert (pareto_k(light) < 0.7).all()
    assert (pareto_k(heavy) > 0.7).all()


def test_the_tail_index_sees_neither_place_nor_scale():
    terms = torch.randn(2_000, 3).double() ** 3
    torch.testing.assert_close(pareto_k(100.0 + 7.0 * terms), pareto_k(terms), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pareto_k(-terms), pareto_k(terms))


def test_a_batch_of_tail_indices_is_that_of_its_members():
    terms = torch.randn(300, 2, 3)
    together = pareto_k(terms)
    assert together.shape == (2, 3)
    assert together[1, 2] == pareto_k(terms[:, 1, 2])
    assert pareto_k(terms[:, 0, 0]).shape == ()


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1, 0.5])
def test_terms_of_two_values_have_no_heavy_tail(share):
    # Discrete targets and outcomes give terms of a few values, bounded, whose mean is safe.
    assert all(pareto_k((torch.rand(5_000) < share).double()) < 0.7 for _ in range(10))
    terms = torch.tensor([-0.9, -0.3, 0.2, 0.4]).double()[
        torch.multinomial(torch.tensor([0.01, 0.4, 0.4, 0.19]), 5_000, True)
    ]
    assert pareto_k(terms) < 0.7


def test_constant_or_few_terms_have_no_tail_or_an_unknown_one():
    assert pareto_k(torch.ones(500)) == -torch.inf
    for num_samples in (2, 4):
        assert pareto_k(torch.randn(num_samples)).shape == ()

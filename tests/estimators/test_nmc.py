"""Nested Monte Carlo's own ways: inner draws re-used or independent, chunks, outcomes that inner draws cannot make."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import eig_nmc
from tests.estimators.cases import CASES, NESTED, SIDE, Case, agree, estimate


def test_re_used_and_independent_inner_draws_agree():
    re_used = estimate("nmc", CASES["linear_gaussian"], num_outer_samples=4_000)
    sizes = {"num_outer_samples": 2_000, "num_inner_samples": 2_000, "seed": 2}
    agree(re_used, estimate("nmc independent", CASES["linear_gaussian"], **sizes), 0.01)


@pytest.mark.parametrize("case", ["linear_gaussian", "two outcomes, linked", "Poisson", "in a plate", "masked"])
def test_re_used_draws_do_not_depend_on_their_chunks(case):
    sizes = {"num_outer_samples": 211, "seed": 4}
    whole = estimate("nmc", CASES[case], **sizes)
    for max_bytes in (1, 100_000):
        chunked = estimate("nmc", CASES[case], max_bytes=max_bytes, **sizes)
        torch.testing.assert_close(chunked.eig, whole.eig, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunked.standard_error, whole.standard_error, rtol=1e-4, atol=1e-5)


def test_independent_draws_in_chunks_agree_with_themselves():
    sizes = {"num_outer_samples": 400, "num_inner_samples": 50}
    whole, chunked = (
        estimate("nmc independent", CASES["scalar"], seed=seed, max_bytes=size, **sizes)
        for seed, size in ((4, 2**28), (5, 1_000))
    )
    agree(whole, chunked)


def drawn_above(width):
    """A target on an interval, and a uniform outcome of width one above it."""

    def model():
        theta = pyro.sample("theta", dist.Uniform(0.0, width))
        pyro.sample("y", dist.Uniform(theta, theta + 1.0))

    return model


@pytest.mark.parametrize("name", NESTED)
def test_outcomes_outside_their_support_do_not_pass_for_likely(name):
    # Inner draws further than one from an outcome cannot have made it.
    # E[-log p(y)] with p(y) = min(y, 1, 5 - y) / 4, and p(y | theta) = 1.
    exact = -2 * (0.5 * math.log(0.25) - 0.25) / 4 - 3 / 4 * math.log(0.25)
    result = estimate(name, Case(drawn_above(4.0), exact))
    assert abs(result.eig - exact) <= 0.02 + SIDE * result.standard_error


def test_no_inner_draw_near_an_outcome_is_an_error_not_a_number():
    with pytest.raises(ArithmeticError, match=r"eig_nmc: for \d+ of 50 outer draws"):
        eig_nmc(drawn_above(1e6), "y", num_outer_samples=50)

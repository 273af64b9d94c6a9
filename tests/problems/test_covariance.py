"""The covariance problem: its density, its table and what its sites mean."""

import math

import torch
from pyro import poutine
from torch.distributions import MultivariateNormal

from pyro_voed import Experiment, sample_joint
from pyro_voed.problems import covariance as cv

Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""

SPREAD = torch.tensor(cv.TABLE_SCALES)


def table_matrix():
    correlation = cv.correlations(cv.table_values())["correlation"]
    matrix = torch.eye(12)
    matrix[torch.tril_indices(12, 12, -1).unbind()] = correlation
    matrix = matrix + matrix.tril(-1).mT
    return SPREAD[:, None] * matrix * SPREAD


def assert_rows_of_the_table(y):
    # An entry's standard error is sqrt((1 + r^2) / n) in units of the scales.
    error = (torch.cov(y.mT) - table_matrix()).abs() / (SPREAD[:, None] * SPREAD)
    assert (error < Z_MAX * math.sqrt(2 / len(y))).all()


def test_rows_have_the_covariance_of_scales_and_correlations():
    values = cv.table_values()
    y = poutine.condition(cv.covariance(num_rows=200_000), data=values)()
    assert_rows_of_the_table(y)
    assert (y.mean(0).abs() < Z_MAX * SPREAD / math.sqrt(200_000)).all()


def test_the_likelihood_is_that_of_a_full_covariance_matrix():
    trace = poutine.trace(cv.covariance(4, 6)).get_trace()
    trace.compute_log_prob()
    values = {name: trace.nodes[name]["value"] for name in ("mean", "scale", "correlation")}
    factor = values["scale"].double().diag() @ values["correlation"].double()
    rows = MultivariateNormal(values["mean"].double(), factor @ factor.mT)
    expected = rows.log_prob(trace.nodes["y"]["value"].double())
    torch.testing.assert_close(trace.nodes["y"]["log_prob"].double(), expected, rtol=1e-3, atol=1e-3)


def test_prior_correlations_are_uniform():
    # Each correlation of a uniform matrix of K variables has r^2 of mean 1 / (K + 1) and is symmetric.
    sample = sample_joint(Experiment(cv.covariance(5, 2), "y"), 20_000)
    correlation = cv.correlations(sample.values)["correlation"]
    assert correlation.shape == (20_000, 10)
    for moment, expected in ((correlation, 0.0), (correlation.square(), 1 / 6)):
        error = moment.std(0) / math.sqrt(20_000)
        assert ((moment.mean(0) - expected).abs() < Z_MAX * error).all()


def test_correlations_keep_leading_dimensions_and_read_row_by_row():
    values = {name: value.expand(2, 3, *value.shape) for name, value in cv.table_values().items()}
    meant = cv.correlations(values)
    assert {name: tuple(value.shape) for name, value in meant.items()} == {
        "mean": (2, 3, 12),
        "scale": (2, 3, 12),
        "correlation": (2, 3, 66),
    }
    table = torch.tensor([entry for row in cv.TABLE_CORRELATIONS for entry in row])
    torch.testing.assert_close(meant["correlation"][1, 2], table)


def test_the_table_is_a_covariance_matrix():
    assert [len(row) for row in cv.TABLE_CORRELATIONS] == list(range(1, 12))
    assert torch.linalg.eigvalsh(table_matrix()).min() > 0.01


def test_observed_rows_follow_the_table_and_their_seed():
    before = torch.get_rng_state()
    y = cv.observed_rows()
    assert torch.equal(torch.get_rng_state(), before)
    assert y.shape == (263, 12)
    assert torch.equal(y, cv.observed_rows())
    assert not torch.equal(y, cv.observed_rows(seed=1))
    assert_rows_of_the_table(cv.observed_rows(100_000))

"""Critic terms: closed forms on tiny matrices."""

import math

import pytest
import torch

from pyro_voed.bounds.critic import (
    donsker_varadhan,
    donsker_varadhan_terms,
    info_nce,
    info_nce_terms,
    nwj,
    nwj_terms,
    tuba,
    tuba_terms,
)

SCORES = torch.tensor([[2.0, 0.5], [-1.0, 1.0]], dtype=torch.double)
ALL = [info_nce, nwj, tuba, donsker_varadhan]


def test_terms_on_a_two_by_two_matrix():
    expected = [2 - math.log((math.exp(2) + math.exp(0.5)) / 2), 1 - math.log((math.exp(-1) + math.exp(1)) / 2)]
    assert info_nce_terms(SCORES).tolist() == pytest.approx(expected)
    assert nwj_terms(SCORES).tolist() == pytest.approx([2 - math.exp(0.5 - 1), 1 - math.exp(-1 - 1)])
    log_product = math.log((math.exp(0.5) + math.exp(-1)) / 2)
    assert donsker_varadhan_terms(SCORES).tolist() == pytest.approx([2 - log_product, 1 - log_product])
    log_baseline = torch.tensor([0.3, -0.2], dtype=torch.double)
    expected = [1 + 2 - 0.3 - math.exp(0.5 - 0.3), 1 + 1 + 0.2 - math.exp(-1 + 0.2)]
    assert tuba_terms(SCORES, log_baseline).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("terms", ALL, ids=lambda terms: terms.name)
def test_each_design_of_a_batch_has_its_own_terms(terms):
    scores = torch.randn(5, 5, 2, 3, dtype=torch.double)
    log_baseline = torch.randn(5, 2, 3, dtype=torch.double)
    together = terms(scores, log_baseline)
    assert together.shape == (5, 2, 3)
    torch.testing.assert_close(together[:, 1, 2], terms(scores[:, :, 1, 2], log_baseline[:, 1, 2]))


def test_no_info_nce_term_exceeds_log_num():
    assert info_nce_terms(100 * torch.randn(32, 32)).max() <= math.log(32) + 1e-5


def test_sides_are_declared():
    assert [terms.bound for terms in ALL] == ["lower", "lower", "lower", "neither"]

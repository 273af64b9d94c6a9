"""The door of everything that compares two sets of draws."""

import pytest
import torch

from pyro_voed.diagnostics import agreement, c2st, empirical_kl, mmd, sliced_wasserstein
from pyro_voed.diagnostics.draws import matched_draws
from tests.diagnostics.cases import chain


def test_columns_are_matched_by_name_or_by_place_and_chains_thinned():
    a, b = torch.randn(1, 1000, 1), torch.randn(1, 1000)
    first, second = matched_draws(chain({"b": b, "a": a}, 1e9), chain({"a": a, "b": b}, effective=250))
    assert first.columns == second.columns == ("b", "a[0]")
    assert torch.equal(first.matrix, second.matrix)
    assert torch.equal(first.thinned(), first.matrix)
    assert torch.equal(second.thinned(), first.matrix[::4])
    unnamed = matched_draws(chain({"b": b, "a": a}, 1000), torch.randn(200, 2))[1]
    assert unnamed.columns == ("b", "a[0]")
    assert len(unnamed.thinned()) == 200


GOOD = torch.randn(200, 2)
BAD = {
    "few": (torch.randn(99, 2), "second: expected at least 100 draws, got 99"),
    "vector": (torch.randn(200), r"second: expected shape \(any, any\), got \(200,\)"),
    "dimension": (torch.randn(200, 3), r"second: expected the columns \['column 0', 'column 1'\] of first"),
    "not finite": (torch.full((200, 2), torch.nan), "second: 400 of 400 values are not finite"),
    "constant": (GOOD * torch.tensor([1.0, 0.0]), r"second: .* columns \[1\] constant"),
}


@pytest.mark.parametrize(("second", "message"), BAD.values(), ids=BAD)
def test_bad_draws_are_refused(second, message):
    with pytest.raises(ValueError, match=message):
        matched_draws(GOOD, second)


def test_other_names_are_refused():
    first, second = (chain({name: torch.randn(1, 200)}, 200) for name in ("theta", "phi"))
    with pytest.raises(ValueError, match=r"sample: expected the columns \['theta'\] of reference, got \['phi'\]"):
        matched_draws(first, second, ("reference", "sample"))


@pytest.mark.parametrize("compare", [c2st, mmd, sliced_wasserstein, empirical_kl, agreement])
def test_everything_enters_by_this_door(compare):
    with pytest.raises(ValueError, match="expected the columns"):
        compare(GOOD, torch.randn(200, 3))

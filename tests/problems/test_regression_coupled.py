"""The EIG of coupled designs against the closed form, nested Monte Carlo, and what it must refuse."""

import pytest
import torch

from pyro_voed import eig_nmc, eig_pce
from pyro_voed.problems.regression import exact_eig, regression, unit_rows
from pyro_voed.problems.regression_coupled import coupled_eig

# Differences of four standard errors: each comparison fails by chance once in 15,000.
WIDTH = 4.0


def near_identity(size, spread, seed=0):
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return unit_rows({"xi": torch.eye(size) + spread * noise})["xi"]


def test_a_signed_permutation_has_its_exact_value():
    design = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found, error = coupled_eig(design, num_outcomes=16)
    exact, exact_error = exact_eig(design)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(error, exact_error)


@pytest.mark.filterwarnings("ignore:.*inner draws leave:UserWarning")
@pytest.mark.parametrize("design", [near_identity(2, 0.2), near_identity(3, 0.1, seed=1)], ids=["two", "three"])
def test_it_lies_between_nested_bounds(design):
    found, error = coupled_eig(design, num_outcomes=256)
    lower, upper = (f(regression(design), "y", num_outer_samples=4_000, seed=0) for f in (eig_pce, eig_nmc))
    assert found - lower.eig > -WIDTH * torch.hypot(lower.standard_error.double(), error)
    assert found - upper.eig < WIDTH * torch.hypot(upper.standard_error.double(), error)


def test_errors_are_those_of_repeats():
    found = [coupled_eig(near_identity(3, 0.1), num_outcomes=32, num_parts=16, seed=seed) for seed in range(24)]
    values, errors = (torch.stack(part) for part in zip(*found, strict=True))
    # The ratio of variances is chi-square over 23: outside [0.3, 2.4] once in 2,000 repeats.
    assert 0.3 < values.var() / errors.square().mean() < 2.4


def test_designs_far_from_a_permutation_are_refused():
    design = unit_rows({"xi": torch.randn(20, 20, generator=torch.Generator().manual_seed(0))})["xi"]
    with pytest.raises(ArithmeticError, match="too far from a signed permutation"):
        coupled_eig(design, num_outcomes=8, num_parts=8)

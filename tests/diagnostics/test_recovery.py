"""Recovery against closed forms; thresholds: see `cases`.

Coverage of stated errors is taken over 1,000 columns, where the share has standard error 0.007, with room of three of
them and 0.01 for quantities that are only nearly normal.
"""

import math
from dataclasses import replace

import pytest
import torch

from pyro_voed.diagnostics.recovery import recovery
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from tests.diagnostics.cases import THRESHOLD, conjugate

NUM_COLUMNS, NUM_DRAWS = 1_000, 20

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
    result = recovery(conjugate(400, NUM_DRAWS, dim=NUM_COLUMNS))
    values, errors = getattr(result, field), getattr(result, f"{field}_error")
    # A ratio's bias is of the order of the square of its error; the mean over columns may show it.
    mean_error = values.std() / math.sqrt(NUM_COLUMNS)
    assert abs(values.mean() - exact) < THRESHOLD * mean_error + errors.square().mean()
    covered = ((values - exact).abs() < 1.96 * errors).double().mean()
    assert abs(covered - 0.95) < 0.03


def test_contraction_is_not_clamped():
    result = recovery(conjugate(2_000, NUM_DRAWS, scale=2.0))
    assert result.contraction < 0
    assert abs(result.contraction + 1.0) < THRESHOLD * result.contraction_error


def test_a_bias_and_a_wrong_width_show_in_z():
    biased = recovery(conjugate(1_000, 200, bias=0.7))
    assert abs(biased.z_mean + 0.7) < THRESHOLD * biased.z_mean_error + 0.01
    narrow = recovery(conjugate(1_000, 200, scale=0.8))
    assert abs(narrow.z_sd - 1.25) < THRESHOLD * narrow.z_sd_error + 0.01
    assert narrow.contraction > 1 - narrow.nrmse**2 + THRESHOLD * narrow.contraction_error


def test_units_do_not_matter_and_large_offsets_lose_no_digits():
    simulated = conjugate(200, NUM_DRAWS)
    for scale, offset in ((1.0, 1e6), (1e3, 5.0)):
        moved = replace(simulated, truths=scale * simulated.truths + offset, draws=scale * simulated.draws + offset)
        for field in FIELDS:
            for name in (field, f"{field}_error"):
                assert torch.allclose(getattr(recovery(moved), name), getattr(recovery(simulated), name), atol=1e-6)


def test_intervals_hold_their_mass():
    result = recovery(conjugate(4_000, 200), mass=0.8)
    low, high = result.interval
    held = ((result.truths > low) & (result.truths < high)).double().mean().item()
    # Interpolated quantiles of 200 draws miss by less than 1 / 200.
    assert abs(held - 0.8) < THRESHOLD * math.sqrt(0.16 / 4_000) + 0.005


def test_draws_that_do_not_vary_are_not_hidden_and_perfect_recovery_has_no_error():
    simulated = conjugate(50, NUM_DRAWS)
    simulated.draws[3] = 1.0
    assert not recovery(simulated).z_sd.isfinite()
    truths = torch.randn(50, 2)
    perfect = recovery(SimulatedPosteriors(truths, truths[:, None].expand(-1, 4, -1), ("a", "b")))
    assert perfect.nrmse.tolist() == perfect.nrmse_error.tolist() == [0.0, 0.0]


def test_what_cannot_be_recovered_is_refused():
    with pytest.raises(ValueError, match="at least 5 experiments, got 4"):
        recovery(conjugate(4, NUM_DRAWS))
    with pytest.raises(ValueError, match="at least 4 draws of each experiment, got 3"):
        recovery(conjugate(10, 3))
    with pytest.raises(ValueError, match="mass: expected"):
        recovery(conjugate(10, NUM_DRAWS), mass=1.0)
    constant = SimulatedPosteriors(torch.ones(10, 1), torch.randn(10, 20, 1), ("theta",))
    with pytest.raises(ValueError, match=r"columns \['theta'\] constant"):
        recovery(constant)


def test_recovery_prints_every_number_with_its_error():
    lines = str(recovery(conjugate(50, NUM_DRAWS, dim=2))).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("theta[0]  correlation ")
    assert lines[1].count("+-") == 5

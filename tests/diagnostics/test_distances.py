"""Distances against closed forms; thresholds: see `cases`."""

import math

import pytest
import torch
from scipy import stats

from pyro_voed.diagnostics.distances import (
    empirical_kl,
    mmd,
    neighbour_kl,
    sliced_wasserstein,
    wasserstein_power,
)
from pyro_voed.diagnostics.mmd_terms import gaussian_kernel, median_distance, mmd_squared, squared_distances
from tests.diagnostics.cases import THRESHOLD, near, normal


def quick_mmd(first, second, **options):
    return mmd(first, second, **{"num_permutations": 99, **options})


def quick_wasserstein(first, second, **options):
    return sliced_wasserstein(first, second, **{"num_permutations": 39, "num_projections": 15, **options})


TESTS = {"mmd": quick_mmd, "sliced_wasserstein": quick_wasserstein}
ALL = {**TESTS, "empirical_kl": lambda first, second, **_: empirical_kl(first, second)}


def gaussian_mmd_squared(dim, shift, scale, bandwidth):
    """Squared MMD of N(0, I) and N(shift e_1, scale^2 I), the first normal's variance being 1."""

    def expected_kernel(variance, distance):
        total = bandwidth**2 + variance
        return (bandwidth**2 / total) ** (dim / 2) * math.exp(-0.5 * distance**2 / total)

    same = expected_kernel(2.0, 0.0) + expected_kernel(2.0 * scale**2, 0.0)
    return same - 2 * expected_kernel(1.0 + scale**2, shift)


GAUSSIANS = {
    # dim, shift, scale, draws of the first and of the second
    "equal": (2, 0.0, 1.0, 400, 400),
    "shift": (1, 0.7, 1.0, 400, 600),
    "scale": (2, 0.0, 1.5, 600, 400),
    "both": (3, 0.5, 0.7, 500, 500),
}


@pytest.mark.parametrize(("dim", "shift", "scale", "num_first", "num_second"), GAUSSIANS.values(), ids=GAUSSIANS)
@pytest.mark.parametrize("bandwidth", [0.5, 2.0])
def test_mmd_of_gaussians(dim, shift, scale, num_first, num_second, bandwidth):
    result = quick_mmd(
        normal(num_first, dim, shift, scale), normal(num_second, dim), bandwidth=bandwidth, standardise=False, seed=0
    )
    exact = gaussian_mmd_squared(dim, shift, scale, bandwidth)
    assert abs(result.value - exact) < THRESHOLD * result.standard_error
    assert abs(result.equal_value) < result.standard_error
    assert result.num_draws == (num_first, num_second)


def test_mmd_is_the_double_sum_and_several_bandwidths_average():
    first, second = normal(7, 2), normal(5, 2, 1.0)
    pooled = torch.cat([first, second])
    kernels = gaussian_kernel(squared_distances(pooled, pooled), [0.5, 2.0]).tolist()
    x, y = range(7), range(7, 12)
    within = [
        sum(kernels[i][j] for i in part for j in part if i != j) / (len(part) * (len(part) - 1)) for part in (x, y)
    ]
    across = sum(kernels[i][j] for i in x for j in y) / 35
    assert mmd_squared(torch.tensor(kernels), 7)[0] == pytest.approx(sum(within) - 2 * across)
    first, second = normal(100, 2), normal(100, 2, 1.0)
    each = [quick_mmd(first, second, bandwidth=width).value for width in (1.0, 3.0)]
    both = quick_mmd(first, second, bandwidth=1.0, bandwidth_factors=(1.0, 3.0)).value
    assert both == pytest.approx(sum(each) / 2)


KL_CASES = {"equal": (2, 0.0, 1.0), "shift": (1, 1.0, 1.0), "scale": (1, 0.0, 0.5), "both": (2, 0.5, 0.7)}


@pytest.mark.parametrize(("dim", "shift", "scale"), KL_CASES.values(), ids=KL_CASES)
@pytest.mark.parametrize("num_neighbours", [1, 4])
def test_kl_of_gaussians(dim, shift, scale, num_neighbours):
    result = empirical_kl(normal(1500, dim, shift, scale), normal(1200, dim), num_neighbours=num_neighbours)
    exact = 0.5 * (dim * scale**2 + shift**2 - dim) - dim * math.log(scale)
    # The bias, measured over 30 repeats of each case, is below 0.02 nats.
    assert abs(result.value - exact) < THRESHOLD * result.standard_error + 0.02
    assert result.p_value is None


def test_kl_errs_downwards_where_the_first_reaches_beyond_the_second():
    result = empirical_kl(normal(1500, 2, scale=1.5), normal(1200, 2))
    assert 0 < result.value < 2 * 0.5 * (1.5**2 - 1) - 2 * math.log(1.5)


def test_kl_by_hand():
    # Own neighbours 1, 1 and 2 away; 0.5, 0.5 and 2.5 away from the other set: log of 0.5 * 0.5 * 1.25, over 3.
    value = neighbour_kl(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0]]), 1)
    assert value.item() == pytest.approx(math.log(0.5 * 0.5 * 1.25) / 3 + math.log(2 / 2))


def test_wasserstein_of_shifted_draws_is_the_shift():
    draws = normal(200, 1)
    result = quick_wasserstein(draws + 2.5, draws, standardise=False, seed=0)
    assert result.value == pytest.approx(2.5)
    # A shift by delta moves the projection on u by u . delta, whose mean square is |delta|^2 / dim.
    draws = normal(150, 3)
    result = quick_wasserstein(
        draws + torch.tensor([1.0, 2.0, 2.0]), draws, standardise=False, num_permutations=1, num_projections=2000
    )
    assert abs(result.value - 3.0 / math.sqrt(3)) < THRESHOLD * result.standard_error
    assert result.value == pytest.approx(3.0 / math.sqrt(3), abs=0.05)


@pytest.mark.parametrize(("shift", "scale"), [(1.0, 1.0), (0.0, 2.0), (0.5, 1.5)])
def test_wasserstein_of_gaussians(shift, scale):
    # In one dimension W_2^2 = shift^2 + (scale - 1)^2; the upward bias at these sizes is below 0.02.
    result = quick_wasserstein(normal(1500, 1, shift, scale), normal(1000, 1), standardise=False, seed=0)
    exact = math.hypot(shift, scale - 1)
    assert abs(result.value - exact) < THRESHOLD * result.standard_error + 0.02


@pytest.mark.parametrize(("num_first", "num_second"), [(1, 1), (5, 5), (6, 9), (7, 4)])
def test_wasserstein_of_any_two_sizes(num_first, num_second):
    first, second = normal(num_first, 1)[:, 0].sort().values, normal(num_second, 1)[:, 0].sort().values
    exact = stats.wasserstein_distance(first.numpy(), second.numpy())
    assert wasserstein_power(first, second, 1.0).item() == pytest.approx(exact)
    # Both repeated up to a common size, draws are paired in order.
    paired = first.repeat_interleave(num_second) - second.repeat_interleave(num_first)
    assert wasserstein_power(first, second, 3.0).item() == pytest.approx((paired.abs() ** 3).mean().item())


@pytest.mark.parametrize("distance", TESTS.values(), ids=TESTS)
def test_p_values_are_uniform_under_equality(distance):
    # 120 repeats; the share at or below a fifth has standard error 0.037. Unequal sizes, unequal units.
    units = torch.tensor([1.0, 50.0])
    small = [
        distance(normal(100, 2) * units, normal(150, 2) * units, num_permutations=19).p_value <= 0.2 for _ in range(120)
    ]
    assert near(sum(small) / 120, 0.2, 120)


@pytest.mark.parametrize("distance", TESTS.values(), ids=TESTS)
def test_known_differences_are_detected(distance):
    # Each of these shows with a p-value of 1 / 40 or less in all of 50 repeats.
    for first in (normal(400, 2, shift=0.5), normal(400, 2, scale=1.4)):
        result = distance(first, normal(400, 2), seed=0)
        assert result.p_value <= 1 / 40
        assert result.value > result.equal_value


# Stated over true error, measured over 100 to 300 repeats: MMD 1.25 where equal, 1.0 to 1.1 elsewhere; sliced
# Wasserstein 1.5 to 1.7 and 0.95 to 1.15; KL 0.85 to 1.1. The spread of 100 repeats is known to a tenth.
ERRORS = {"mmd": (1.0, 1.5), "sliced_wasserstein": (1.2, 2.0), "empirical_kl": (0.7, 1.3)}
ERRORS_APART = {"mmd": (0.8, 1.3), "sliced_wasserstein": (0.8, 1.4), "empirical_kl": (0.65, 1.3)}


@pytest.mark.parametrize(("shift", "ratios"), [(0.0, ERRORS), (1.0, ERRORS_APART)], ids=["equal", "apart"])
@pytest.mark.parametrize("name", ALL)
def test_stated_error_is_that_of_repeats(name, shift, ratios):
    results = [ALL[name](normal(200, 2, shift), normal(200, 2), num_permutations=1) for _ in range(100)]
    spread = torch.tensor([result.value for result in results]).std()
    stated = torch.tensor([result.standard_error for result in results]).square().mean().sqrt()
    low, high = ratios[name]
    assert low < (stated / spread).item() < high


@pytest.mark.parametrize("distance", ALL.values(), ids=ALL)
def test_units_do_not_matter(distance):
    first, second = normal(150, 2, 1.0), normal(150, 2)
    scale, offset = torch.tensor([1e3, 1e-3]), torch.tensor([1e4, -1.0])
    there = distance(first * scale + offset, second * scale + offset, seed=0)
    here = distance(first, second, seed=0)
    assert there.value == pytest.approx(here.value, rel=1e-6)
    assert there.p_value == here.p_value


@pytest.mark.parametrize("distance", TESTS.values(), ids=TESTS)
def test_seeds_and_the_callers_stream(distance):
    first, second = normal(100, 2), normal(100, 2)
    state = torch.get_rng_state()
    assert distance(first, second, seed=3).equal_value == distance(first, second, seed=3).equal_value
    assert torch.equal(torch.get_rng_state(), state)
    assert distance(first, second).equal_value != distance(first, second).equal_value


def test_results_print_with_error_and_sizes():
    result = quick_mmd(normal(100, 1, 3.0), normal(120, 1), seed=0)
    assert str(result).startswith(f"MMD^2 {result.value:.4f} +- {result.standard_error:.4f} (")
    assert str(result).endswith("p = 0.01; 100 draws against 120)")
    assert "p =" not in str(empirical_kl(normal(100, 1), normal(100, 1)))


def test_repeated_draws_have_no_divergence():
    standing = normal(100, 2).repeat_interleave(2, dim=0)
    with pytest.raises(ValueError, match="a draw of first is repeated in it, for 200 of 200 draws"):
        empirical_kl(standing, normal(200, 2))
    shared = normal(200, 2)
    with pytest.raises(ValueError, match="a draw of first is in second too, for 150 of 150 draws"):
        empirical_kl(shared[:150], shared)
    assert math.isfinite(empirical_kl(standing, normal(200, 2), num_neighbours=2).value)


REFUSED = {
    "bandwidth: expected a finite number above 0": lambda *draws: mmd(*draws, bandwidth=0.0),
    "bandwidth_factors is empty": lambda *draws: mmd(*draws, bandwidth_factors=()),
    "order: expected a finite number of at least 1": lambda *draws: sliced_wasserstein(*draws, order=0.5),
    "num_neighbours: expected fewer than 5": lambda *draws: empirical_kl(*draws, num_neighbours=5),
    "all draws are equal": lambda *draws: median_distance(torch.zeros(5, 2)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_settings_are_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message](normal(100, 2), normal(100, 2))


def test_discrete_draws_have_a_bandwidth():
    # Nine of ten are 0, so most pairs are equal.
    rare = torch.bernoulli(torch.full((200, 1), 0.1))
    assert median_distance(rare) == 1.0
    assert mmd(rare, torch.bernoulli(torch.full((200, 1), 0.4)), num_permutations=99).p_value == 0.01

import math

import pytest
import torch

from pyro_voed.densities import rational_quadratic_spline
from pyro_voed.densities.spline import MIN_FRACTION, MIN_SLOPE, bin_map, positive_slope, spline_bins, spline_size

BOUND = 4.0
NUM_BINS = 6


def slow_spline(x, raw):
    """Evaluate one point as Durkan et al. (2019) write it: equation 4 and its derivative, in plain floats."""
    widths, heights, slopes = (part.tolist() for part in raw.split([NUM_BINS, NUM_BINS, NUM_BINS - 1]))

    def knots(parts):
        exponentials = [math.exp(part) for part in parts]
        edges = [-BOUND]
        for value in exponentials:
            share = MIN_FRACTION + (1 - NUM_BINS * MIN_FRACTION) * value / sum(exponentials)
            edges.append(edges[-1] + 2 * BOUND * share)
        return edges

    inner = [MIN_SLOPE + (1 - MIN_SLOPE) * math.log1p(2.0**value) / math.log(2.0) for value in slopes]
    xs, ys, ds = knots(widths), knots(heights), [1.0, *inner, 1.0]
    if not -BOUND <= x < BOUND:
        return x, 0.0
    k = max(index for index in range(NUM_BINS) if xs[index] <= x)
    s = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
    xi = (x - xs[k]) / (xs[k + 1] - xs[k])
    denominator = s + (ds[k + 1] + ds[k] - 2 * s) * xi * (1 - xi)
    y = ys[k] + (ys[k + 1] - ys[k]) * (s * xi**2 + ds[k] * xi * (1 - xi)) / denominator
    slope = s**2 * (ds[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + ds[k] * (1 - xi) ** 2) / denominator**2
    return y, math.log(slope)


@pytest.fixture
def raw():
    return torch.randn(spline_size(NUM_BINS), 300, dtype=torch.float64)


@pytest.fixture
def inputs():
    return torch.linspace(-1.5 * BOUND, 1.5 * BOUND, 300, dtype=torch.float64)


def test_agrees_with_a_slow_implementation(raw, inputs):
    outputs, log_slopes = rational_quadratic_spline(inputs, raw, bound=BOUND)
    slow = torch.tensor([slow_spline(x, column) for x, column in zip(inputs.tolist(), raw.T, strict=True)])
    torch.testing.assert_close(torch.stack([outputs, log_slopes], -1), slow.double(), rtol=1e-6, atol=1e-6)


def test_slope_is_that_of_autograd(raw, inputs):
    inputs.requires_grad_()
    outputs, log_slopes = rational_quadratic_spline(inputs, raw, bound=BOUND)
    (slopes,) = torch.autograd.grad(outputs.sum(), inputs)
    torch.testing.assert_close(log_slopes.exp(), slopes)


def test_gradients_are_right(raw, inputs):
    inputs, raw = inputs[::30].clone().requires_grad_(), raw[:, ::30].clone().requires_grad_()
    for inverse in (False, True):
        torch.autograd.gradcheck(
            lambda x, r, inverse=inverse: rational_quadratic_spline(x, r, bound=BOUND, inverse=inverse), (inputs, raw)
        )
    torch.autograd.gradgradcheck(lambda x, r: rational_quadratic_spline(x, r, bound=BOUND), (inputs, raw))


def test_inverts(raw, inputs):
    outputs, log_slopes = rational_quadratic_spline(inputs, raw, bound=BOUND)
    back, log_slopes_back = rational_quadratic_spline(outputs, raw, bound=BOUND, inverse=True)
    torch.testing.assert_close(back, inputs, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(log_slopes_back, -log_slopes, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_of_the_inverse_is_rounding(dtype):
    raw = torch.randn(spline_size(NUM_BINS), 20_000, dtype=dtype)
    inputs = 3.0 * torch.randn(20_000, dtype=dtype)
    outputs, log_slopes = rational_quadratic_spline(inputs, raw, bound=BOUND)
    back, _ = rational_quadratic_spline(outputs, raw, bound=BOUND, inverse=True)
    # An output rounds by a few BOUND * eps, which moves the input by that over the slope; narrow bins see some tens.
    assert ((back - inputs).abs() * log_slopes.exp()).max() < 200.0 * BOUND * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_parameters_give_the_identity(inputs, dtype):
    inputs = inputs.to(dtype)
    outputs, log_slopes = rational_quadratic_spline(inputs, inputs.new_zeros(spline_size(NUM_BINS), 1), bound=BOUND)
    tolerance = 4.0 * BOUND * torch.finfo(dtype).eps
    torch.testing.assert_close(outputs, inputs, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(log_slopes, torch.zeros_like(inputs), rtol=0.0, atol=tolerance)


def test_knots_are_met_exactly(raw):
    sizes, slopes = raw.split([2 * NUM_BINS, NUM_BINS - 1])
    bins = spline_bins(sizes, positive_slope(slopes), bin_map(NUM_BINS, BOUND, raw))
    for left, bottom, slope in zip(bins[0], bins[2], bins[4], strict=True):
        outputs, log_slopes = rational_quadratic_spline(left, raw, bound=BOUND)
        torch.testing.assert_close(outputs, bottom)
        torch.testing.assert_close(log_slopes.exp(), slope)


def test_identity_beyond_the_bound_even_at_wild_parameters():
    inputs = torch.tensor([-1e6, -BOUND, BOUND, 1e6])
    raw = (50.0 * torch.randn(spline_size(NUM_BINS), 4)).requires_grad_()
    outputs, log_slopes = rational_quadratic_spline(inputs, raw, bound=BOUND)
    torch.testing.assert_close(outputs, inputs)
    torch.testing.assert_close(log_slopes, torch.zeros(4), rtol=0.0, atol=1e-4)
    (gradient,) = torch.autograd.grad(outputs.sum() + log_slopes.sum(), raw)
    assert gradient.isfinite().all()


def test_wild_parameters_stay_finite_and_monotonic():
    raw = 20.0 * torch.randn(spline_size(NUM_BINS), 1)
    inputs = torch.linspace(-BOUND, BOUND, 1000)
    outputs, log_slopes = rational_quadratic_spline(inputs, raw.expand(-1, 1000), bound=BOUND)
    assert log_slopes.isfinite().all()
    assert (outputs.diff() > -1e-5).all()


def test_refuses_a_wrong_number_of_parameters():
    with pytest.raises(ValueError, match="3 K - 1 parameters"):
        rational_quadratic_spline(torch.zeros(2), torch.zeros(7, 2), bound=BOUND)

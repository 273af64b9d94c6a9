"""Rational-quadratic splines against equation 4 of Durkan et al. (2019) written in plain floats, and in extremes."""

import math

import pytest
import torch

from pyro_voed.densities import rational_quadratic_spline
from pyro_voed.densities.spline import MIN_FRACTION, MIN_SLOPE, spline_size

BOUND = 4.0
NUM_BINS = 6
DTYPES = [torch.float32, torch.float64]
RAW = torch.randn(spline_size(NUM_BINS), 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
INPUTS = torch.linspace(-1.5 * BOUND, 1.5 * BOUND, 300, dtype=torch.float64)


def spline(inputs, raw, **options):
    return rational_quadratic_spline(inputs, raw, bound=BOUND, **options)


def slow_spline(x, raw):
    widths, heights, slopes = (part.tolist() for part in raw.split([NUM_BINS, NUM_BINS, NUM_BINS - 1]))

    def knots(parts):
        total, edges = sum(math.exp(part) for part in parts), [-BOUND]
        for part in parts:
            share = MIN_FRACTION + (1 - NUM_BINS * MIN_FRACTION) * math.exp(part) / total
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


def test_agrees_with_the_equations():
    slow = torch.tensor([slow_spline(x, column) for x, column in zip(INPUTS.tolist(), RAW.T, strict=True)])
    torch.testing.assert_close(torch.stack(spline(INPUTS, RAW), -1), slow.double(), rtol=1e-6, atol=1e-6)


def test_gradients_are_right():
    inputs, raw = INPUTS[::30].clone().requires_grad_(), RAW[:, ::30].clone().requires_grad_()
    torch.autograd.gradcheck(spline, (inputs, raw))
    torch.autograd.gradcheck(lambda x, r: spline(x, r, inverse=True), (inputs, raw))
    torch.autograd.gradgradcheck(spline, (inputs, raw))
    (slopes,) = torch.autograd.grad(spline(inputs, raw)[0].sum(), inputs)
    torch.testing.assert_close(spline(inputs, raw)[1].exp(), slopes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverts_up_to_rounding(dtype):
    raw, inputs = torch.randn(spline_size(NUM_BINS), 20_000, dtype=dtype), 3.0 * torch.randn(20_000, dtype=dtype)
    outputs, log_slopes = spline(inputs, raw)
    back, log_slopes_back = spline(outputs, raw, inverse=True)
    # An output rounds by a few BOUND * eps, which moves the input by that over the slope; narrow bins see some tens.
    assert ((back - inputs).abs() * log_slopes.exp()).max() < 200.0 * BOUND * torch.finfo(dtype).eps
    assert dtype is torch.float32 or (log_slopes_back + log_slopes).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_parameters_give_the_identity(dtype):
    inputs, tolerance = INPUTS.to(dtype), 4.0 * BOUND * torch.finfo(dtype).eps
    mapped = spline(inputs, inputs.new_zeros(spline_size(NUM_BINS), 1))
    torch.testing.assert_close(mapped, (inputs, torch.zeros_like(inputs)), rtol=0.0, atol=tolerance)


def test_wild_parameters_give_finite_increasing_maps_that_end_in_the_identity():
    inputs = torch.tensor([-1e6, -BOUND, BOUND, 1e6])
    raw = (50.0 * torch.randn(spline_size(NUM_BINS), 4)).requires_grad_()
    outputs, log_slopes = spline(inputs, raw)
    torch.testing.assert_close(outputs, inputs)
    torch.testing.assert_close(log_slopes, torch.zeros(4), rtol=0.0, atol=1e-4)
    (gradient,) = torch.autograd.grad(outputs.sum() + log_slopes.sum(), raw)
    assert gradient.isfinite().all()
    outputs, log_slopes = spline(torch.linspace(-BOUND, BOUND, 1000), 20.0 * torch.randn(spline_size(NUM_BINS), 1))
    assert log_slopes.isfinite().all()
    assert (outputs.diff() > -1e-5).all()


def test_refuses_a_wrong_number_of_parameters():
    with pytest.raises(ValueError, match="3 K - 1 parameters"):
        spline(torch.zeros(2), torch.zeros(7, 2))

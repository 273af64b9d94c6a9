r"""Monotonic rational-quadratic splines as pure functions of packed raw parameters.

On each of :math:`K` bins :math:`[x_k, x_{k+1}]` of width :math:`w`, height :math:`h`, mean slope :math:`s = h / w` and
knot slopes :math:`d_0, d_1`, with :math:`\xi = (x - x_k) / w`, :math:`t = \xi (1 - \xi)`, :math:`e = d_0 - s` and
:math:`\delta = d_0 + d_1 - 2 s`,

.. math::
    y = y_k + h \Big( \xi + t\, \frac{e - \xi \delta}{s + \delta t} \Big), \qquad
    \frac{dy}{dx} = \Big( \frac{s}{s + \delta t} \Big)^2 \big( d_0 + (d_1 - d_0)\, \xi - \delta t \big) .

These are equations 4 and 5 of Durkan, Bekasov, Murray and Papamakarios (2019, "Neural Spline Flows"), rearranged around
the straight line so that :math:`s = d_0 = d_1 = 1` gives the identity without cancellation. Dividing their inverse
(equations 6 to 8) by :math:`h s` leaves one coefficient: with :math:`v = (y - y_k) / h` and
:math:`a = (v \delta - e) / s`, the position :math:`\xi` solves :math:`a \xi^2 + (1 - a)\, \xi = v`.

The knots span :math:`[-B, B]`; beyond it the map is the identity, so the outer slopes are one.

On a CPU the number of operations, not their size, sets the time, so there are few. The six quantities of each bin are
linear in the bin fractions and slopes: one matrix product gives them all, cumulative sums included, and one `gather`
picks them. There is no branch on a value and no in-place write, so everything runs under `torch.func.vmap`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MIN_FRACTION = 1e-3
"""Least share of the interval that a bin's width or height takes."""

MIN_SLOPE = 1e-3
"""Least slope at a knot."""


Values = Float[Tensor, "*batch"]
Bins = Float[Tensor, "6 num_bins *#batch"]


def spline_size(num_bins: int) -> int:
    """Return how many raw parameters one spline takes: widths, heights and the slopes at the inner knots."""
    return 3 * num_bins - 1


def positive_slope(raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Map raw parameters to slopes above `MIN_SLOPE`: zero to one, growing linearly, so never overflowing."""
    return F.softplus(raw, beta=math.log(2.0)) * (1.0 - MIN_SLOPE) + MIN_SLOPE


def bin_map(num_bins: int, bound: float, like: Tensor) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """Return the matrix and offset that turn fractions and slopes into the six quantities of each bin.

    The columns are :math:`K` width fractions, :math:`K` height fractions and :math:`K - 1` inner slopes; the rows hold
    left knot and width in x, left knot and height in y, left slope and right slope, :math:`K` of each.
    """
    below = like.new_ones(num_bins, num_bins).tril(-1)
    own = torch.eye(num_bins, dtype=like.dtype, device=like.device)
    span = 2.0 * bound * (1.0 - num_bins * MIN_FRACTION)
    least = 2.0 * bound * MIN_FRACTION
    axis = span * torch.cat([below, own])
    slopes = torch.cat([own.roll(1, 0)[:, :-1], own[:, :-1]])
    # The inner slopes start at `positive_slope`; the outer two have no column, so that the offset, one, is left.
    axis_offset = torch.cat([below.sum(-1) * least - bound, own.sum(-1) * least])
    offset = torch.cat([axis_offset, axis_offset, 1.0 - slopes.sum(-1)])
    return torch.block_diag(axis, axis, slopes), offset.unsqueeze(-1)


def spline_bins(
    sizes: Float[Tensor, "num_sizes *#batch"],
    slopes: Float[Tensor, "num_slopes *#batch"],
    maps: tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows 1"]],
) -> Float[Tensor, "6 num_bins ..."]:
    """Return the six quantities of each bin (see `bin_map`, which gives `maps`) from raw sizes and positive slopes."""
    matrix, offset = maps
    num_bins = matrix.shape[0] // 6
    shares = sizes.unflatten(0, (2, num_bins)).softmax(1).flatten(0, 1)
    packed = torch.cat([shares, slopes])
    return torch.addmm(offset, matrix, packed.flatten(1)).view(6, num_bins, *packed.shape[1:])


def spline_forward(inputs: Values, bins: Bins, *, bound: float) -> tuple[Values, Values]:
    """Return the spline's values and slopes (not their logarithms) at the inputs."""
    inside = inputs.clamp(-bound, bound)
    left, width, bottom, height, slope_left, slope_right = _pick(bins, inside, axis=0)
    mean_slope = height / width
    position = (inside - left) / width
    bend = position - position * position
    excess = slope_left - mean_slope
    delta = excess + (slope_right - mean_slope)
    curved = delta * bend
    denominator = mean_slope + curved
    rise = position + (excess - position * delta) * (bend / denominator)
    # Beyond the interval the clamped part stays at the end and the rest passes unchanged: the identity, slope one.
    outputs = bottom + height * rise + (inputs - inside)
    ratio = mean_slope / denominator
    slope = ratio * ratio * (torch.lerp(slope_left, slope_right, position) - curved)
    return outputs, slope


def spline_inverse(outputs: Values, bins: Bins, *, bound: float) -> Values:
    """Return the inputs at which the spline takes the given values."""
    inside = outputs.clamp(-bound, bound)
    left, width, bottom, height, slope_left, slope_right = _pick(bins, inside, axis=2)
    mean_slope = height / width
    fraction = (inside - bottom) / height
    excess = slope_left - mean_slope
    delta = excess + (slope_right - mean_slope)
    quadratic = (fraction * delta - excess) / mean_slope
    linear = 1.0 - quadratic
    # Positive in exact arithmetic; the clamp keeps rounding from giving a square root, or its gradient, of nothing.
    discriminant = (linear * linear + 4.0 * quadratic * fraction).clamp_min(torch.finfo(outputs.dtype).tiny)
    position = 2.0 * fraction / (linear + discriminant.sqrt())
    return left + width * position + (outputs - inside)


def rational_quadratic_spline(
    inputs: Values, raw: Float[Tensor, "num_parameters *#batch"], *, bound: float, inverse: bool = False
) -> tuple[Values, Values]:
    """Map inputs through a monotonic rational-quadratic spline, or back.

    Args:
        inputs: Points on the real line.
        raw: Unconstrained parameters of :math:`K` bins, `spline_size(K)` of them: :math:`K` widths and :math:`K`
            heights (softmax) and :math:`K - 1` inner slopes. Zeros give the identity.
        bound: Half the width of the interval that is bent; beyond it the map is the identity.
        inverse: Whether to map back.

    Returns:
        The outputs, and the logarithm of the slope of the direction taken.

    Example:
        >>> raw = torch.linspace(-1.0, 1.0, spline_size(4))[:, None].expand(-1, 3)
        >>> x = torch.tensor([-7.0, 0.5, 2.0])
        >>> y, log_slope = rational_quadratic_spline(x, raw, bound=5.0)
        >>> back, log_slope_back = rational_quadratic_spline(y, raw, bound=5.0, inverse=True)
        >>> torch.allclose(back, x, atol=1e-5), torch.allclose(log_slope_back, -log_slope, atol=1e-5)
        (True, True)
    """
    num_bins, remainder = divmod(raw.shape[0] + 1, 3)
    if remainder or num_bins < 2:
        raise ValueError(
            f"raw: expected 3 K - 1 parameters for K >= 2 bins in the first dimension, got {raw.shape[0]}. "
            "Use spline_size(num_bins)."
        )
    sizes, slopes = raw.split([2 * num_bins, num_bins - 1])
    bins = spline_bins(sizes, positive_slope(slopes), bin_map(num_bins, bound, raw))
    if inverse:
        preimages = spline_inverse(inputs, bins, bound=bound)
        _, slope = spline_forward(preimages, bins, bound=bound)
        return preimages, -slope.log()
    outputs, slope = spline_forward(inputs, bins, bound=bound)
    return outputs, slope.log()


def _pick(bins: Bins, values: Values, *, axis: int) -> tuple[Tensor, ...]:
    """Return the six quantities of the bin that holds each value; row `axis` of `bins` has the left knots."""
    index = (values >= bins[axis, 1:]).sum(0)
    bins = bins.expand(*bins.shape[:2], *values.shape)
    return bins.gather(1, index.expand(6, 1, *values.shape)).squeeze(1).unbind(0)

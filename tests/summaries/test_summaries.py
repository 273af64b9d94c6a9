"""Laws of the summary networks: shapes, symmetries, masks, scales, stacks, and gradients to every weight."""

import pytest
import torch
from torch import nn

from pyro_voed.densities import AffineCouplingFlow, StackedDensity, Standardise, StandardisedDensity, Whitening
from pyro_voed.densities.whitening import context_layout
from pyro_voed.summaries import (
    ComposedSummary,
    ConvolutionalSummary,
    DeepSetSummary,
    RecurrentSummary,
    SetTransformerSummary,
    row_moments,
)
from pyro_voed.summaries.moments import row_extremes
from tests.summaries.cases import DIM, SETS, STACKABLE, SUMMARIES

every_summary = pytest.mark.parametrize("make", SUMMARIES.values(), ids=SUMMARIES)
every_set = pytest.mark.parametrize("make", SETS.values(), ids=SETS)


def shuffled(x, row_dim):
    rows = x.unflatten(-1, (-1, row_dim))
    return rows[..., torch.randperm(rows.shape[-2]), :].flatten(-2)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@every_summary
def test_leading_dimensions_pass_through(make):
    summary, x = make().double(), normal(4, 2, DIM)
    together = summary(x)
    assert together.shape[:2] == (4, 2)
    torch.testing.assert_close(together, torch.stack([summary(block) for block in x]))
    torch.testing.assert_close(together[1, 1], summary(x[1, 1, None])[0])


@every_summary
def test_every_entry_and_every_weight_count(make):
    summary, x = make().double(), normal(64, DIM).requires_grad_()
    # Squares of random combinations, so that no gradient vanishes by symmetry.
    out = summary(x)
    (out @ normal(out.shape[-1])).square().mean().backward()
    assert (x.grad != 0).all()
    assert not [name for name, weight in summary.named_parameters() if weight.grad is None or not weight.grad.any()]


@every_set
def test_set_networks_ignore_the_order_of_rows(make):
    summary, x = make().double(), normal(6, 10 * 3)
    torch.testing.assert_close(summary(x), summary(shuffled(x, 3)))
    # And not the order of the columns.
    assert not torch.allclose(summary(x), summary(x.unflatten(-1, (-1, 3)).flip(-1).flatten(-2)), atol=1e-3)


@every_set
def test_absent_rows_do_not_count_and_present_ones_do(make):
    summary = make(masked=True).double()
    present = torch.cat([normal(5, 7, 3), normal(5, 7, 1) * 0 + 1], -1)
    absent = torch.cat([100 * normal(5, 4, 3), torch.zeros(5, 4, 1)], -1)
    short = summary(present.flatten(-2))
    torch.testing.assert_close(summary(shuffled(torch.cat([present, absent], 1).flatten(-2), 4)), short)
    equal = present[:, :1].expand(-1, 3, -1)
    assert not torch.allclose(summary(equal.flatten(-2)), summary(equal[:, :2].flatten(-2)))


@every_set
def test_vectors_that_are_not_rows_are_refused(make):
    with pytest.raises(ValueError, match="whole rows"):
        make()(torch.randn(2, 10))


def test_series_of_another_length_are_refused():
    for summary in (RecurrentSummary(8, 3), ConvolutionalSummary(8, 3)):
        with pytest.raises(ValueError, match="8 times 3 numbers"):
            summary(torch.randn(2, 30))
    any_length = RecurrentSummary(8, 3, join="last")
    assert any_length(torch.randn(2, 30)).shape == (2, 16)
    with pytest.raises(ValueError, match="any number of times 3 numbers, got 31"):
        any_length(torch.randn(2, 31))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepSetSummary(0), "row_dim"),
        (lambda: SetTransformerSummary(3, hidden_dim=10), "multiple of num_heads"),
        (lambda: ConvolutionalSummary(4), "num_steps"),
        (lambda: ComposedSummary([DeepSetSummary(2)], [torch.arange(4)], 3, ""), "numbers from 0 to 2"),
        (lambda: ComposedSummary([DeepSetSummary(2)], [], 3, ""), "one index for each part"),
    ],
)
def test_sizes_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_moments_are_those_of_the_rows():
    rows = normal(5, 20, 4) * torch.tensor([0.1, 1.0, 1.0, 50.0]) + torch.tensor([0.0, 0.0, 100.0, 0.0])
    mean, log_variance, log_square, correlation, partial = row_moments(rows, cross=True).split([4, 4, 4, 6, 6], -1)
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(log_variance, (rows.var(1, unbiased=False) + 1e-8).log())
    torch.testing.assert_close(log_square, (rows.square().mean(1) + 1e-8).log())
    close = {"rtol": 1e-5, "atol": 1e-5}  # variances have a floor
    matrices = torch.stack([torch.corrcoef(one.T) for one in rows])
    torch.testing.assert_close(correlation, matrices.flatten(1)[:, [4, 8, 9, 12, 13, 14]], **close)
    # Of the first two columns the partial correlation is the correlation itself, but for the pull of one row.
    torch.testing.assert_close(partial[:, 0].tanh(), correlation[:, 0] * 20 / 21, **close)
    # The last with the third, given the first two: from the residuals of regressions on these.
    precision = torch.linalg.inv((20 * matrices + torch.eye(4)) / 21)
    given = -precision[:, 3, 2] / (precision[:, 3, 3] * precision[:, 2, 2]).sqrt()
    torch.testing.assert_close(partial[:, 5].tanh(), given, **close)
    weights = torch.cat([torch.full((5, 14, 1), 1 / 14), torch.zeros(5, 6, 1)], 1).double()
    torch.testing.assert_close(row_moments(rows, weights, cross=True), row_moments(rows[:, :14], cross=True), **close)


@pytest.mark.parametrize("rows", [torch.randn(4, 6, 8), torch.zeros(2, 5, 3)], ids=["more columns than rows", "equal"])
def test_moments_and_their_gradients_are_finite(rows):
    moments = row_moments(rows.requires_grad_(), cross=True)
    moments.square().sum().backward()
    assert torch.isfinite(moments).all()
    assert torch.isfinite(rows.grad).all()


def test_columns_of_exchangeable_rows_share_a_scale_and_masks_keep_theirs():
    x = torch.randn(500, 4 * 3) * torch.tensor([1.0, 10.0, 0.1] * 4) + torch.tensor([0.0, 5.0, 0.0] * 4)
    scaling = Standardise(12, DeepSetSummary(3).layout(12)[1].tolist()).fit_(x)
    assert all((scaling.scale.unflatten(0, (4, 3))[:, column].unique().numel() == 1) for column in range(3))
    pooled = x.unflatten(1, (4, 3)).flatten(0, 1)
    torch.testing.assert_close(scaling.mean[:3], pooled.mean(0))
    torch.testing.assert_close(scaling.scale[:3], pooled.std(0), rtol=2e-3, atol=0.0)
    masked = Standardise(8, DeepSetSummary(3, masked=True).layout(8)[1].tolist()).fit_(torch.randn(100, 8) + 3.0)
    assert torch.equal(masked.mean[[3, 7]], torch.zeros(2))
    assert torch.equal(masked.scale[[3, 7]], torch.ones(2))


def behind(summary):
    dim = 30 if isinstance(summary, DeepSetSummary) else DIM
    flow = AffineCouplingFlow(2, summary(torch.zeros(2, dim)).shape[1])
    for weight in flow.parameters():
        nn.init.normal_(weight, std=0.1)
    whitening = Whitening(dim, *context_layout(summary, dim, num_designs=0)).fit_(torch.randn(50, dim))
    return StandardisedDensity(flow, Standardise(2), whitening, summary)


def test_a_posterior_of_a_set_ignores_the_order_of_rows():
    # With a mean and a scale for every entry it would not.
    density, theta, y = behind(DeepSetSummary(3, 8)).double(), normal(20, 2), normal(20, 30)
    torch.testing.assert_close(density.log_prob(theta, y), density.log_prob(theta, shuffled(y, 3)))


@pytest.mark.parametrize("make", STACKABLE.values(), ids=STACKABLE)
def test_stacked_densities_with_summaries_agree_with_their_members(make):
    members = [behind(make()).double() for _ in range(3)]
    dim = members[0].context_dim
    theta, y = normal(5, 3, 2), normal(5, 3, dim)
    expected = torch.stack([one.log_prob(theta[:, i], y[:, i]) for i, one in enumerate(members)], -1)
    torch.testing.assert_close(StackedDensity(members).log_prob(theta, y), expected)


def test_extremes_leave_absent_rows_out():
    rows = normal(5, 7, 2)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]).double().reshape(7, 1).expand(5, 7, 1) / 4
    present = rows[:, [0, 1, 3, 4]]
    expected = torch.cat([present.amin(1), present.amax(1)], -1)
    assert torch.equal(row_extremes(rows, weights), expected)
    assert torch.equal(row_extremes(present), expected)

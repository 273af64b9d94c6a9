"""Laws of the summary networks: shapes, symmetries, masks, and gradients to every weight."""

import pytest
import torch
from torch import nn

from pyro_voed.densities import AffineCouplingFlow, StackedDensity, Standardise, StandardisedDensity
from pyro_voed.summaries import (
    ComposedSummary,
    ConvolutionalSummary,
    DeepSetSummary,
    FeedForwardSummary,
    RecurrentSummary,
    SetTransformerSummary,
    row_moments,
)

SETS = {
    "deep set": lambda **more: DeepSetSummary(3, 8, **more),
    "deep set, correlations": lambda **more: DeepSetSummary(3, 8, cross=True, **more),
    "deep set, no moments": lambda **more: DeepSetSummary(3, 8, moments=False, **more),
    "transformer": lambda **more: SetTransformerSummary(3, 8, hidden_dim=16, **more),
    "transformer, inducing": lambda **more: SetTransformerSummary(3, 8, hidden_dim=16, num_inducing=2, **more),
}
DIM = 24
ALL = {name: (lambda make=make: make()) for name, make in SETS.items()} | {
    "feed forward": lambda: FeedForwardSummary(DIM, 8),
    "LSTM": lambda: RecurrentSummary(8, 3, 8),
    "GRU, one way, last": lambda: RecurrentSummary(8, 3, 8, cell=nn.GRU, bidirectional=False, join="last"),
    "LSTM, two layers, last": lambda: RecurrentSummary(8, 3, 8, num_layers=2, join="last"),
    "convolutional": lambda: ConvolutionalSummary(8, 3, 8),
    "composed": lambda: ComposedSummary([DeepSetSummary(2, 8)], [torch.arange(20)], dim=DIM, description="pairs"),
}


def shuffled(x, row_dim, order):
    return x.unflatten(-1, (-1, row_dim))[..., order, :].flatten(-2)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_leading_dimensions_pass_through(make):
    summary = make()
    x = torch.randn(4, 2, DIM)
    together = summary(x)
    assert together.shape[:2] == (4, 2)
    alone = torch.stack([torch.stack([summary(row[None])[0] for row in block]) for block in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_weight_has_a_gradient(make):
    summary = make()
    # Squares of random combinations, so that no gradient vanishes by symmetry.
    out = summary(torch.randn(64, DIM))
    (out @ torch.randn(out.shape[-1])).square().mean().backward()
    dead = [name for name, weight in summary.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not dead


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_entry_reaches_the_summary(make):
    summary = make().double()
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    out = summary(x)
    (out * torch.randn_like(out)).sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("make", SETS.values(), ids=SETS)
def test_set_networks_ignore_the_order_of_rows(make):
    summary = make().double()
    x = torch.randn(6, 10 * 3, dtype=torch.float64)
    torch.testing.assert_close(summary(x), summary(shuffled(x, 3, torch.randperm(10))))
    # And not the order of the columns.
    assert not torch.allclose(summary(x), summary(x.unflatten(-1, (-1, 3)).flip(-1).flatten(-2)), atol=1e-3)


@pytest.mark.parametrize("make", SETS.values(), ids=SETS)
def test_rows_that_are_not_there_do_not_count(make):
    summary = make(masked=True).double()
    rows = torch.randn(5, 7, 3, dtype=torch.float64)
    there = torch.ones(5, 7, 1, dtype=torch.float64)
    short = summary(torch.cat([rows, there], -1).flatten(-2))
    filler = torch.randn(5, 4, 3, dtype=torch.float64) * 100
    longer = torch.cat([torch.cat([rows, filler], -2), torch.cat([there, torch.zeros(5, 4, 1)], -2)], -1)
    torch.testing.assert_close(summary(longer[:, torch.randperm(11)].flatten(-2)), short)


@pytest.mark.parametrize("make", SETS.values(), ids=SETS)
def test_masked_sets_know_their_size(make):
    summary = make(masked=True)
    rows = torch.randn(1, 1, 4).expand(1, 3, 4).clone()
    rows[..., -1] = 1.0
    assert not torch.allclose(summary(rows.flatten(-2)), summary(rows[:, :2].flatten(-2)))


@pytest.mark.parametrize("make", SETS.values(), ids=SETS)
def test_vectors_that_are_no_rows_are_refused(make):
    with pytest.raises(ValueError, match="whole rows"):
        make()(torch.randn(2, 10))


def test_series_of_another_length_are_refused():
    for summary in (RecurrentSummary(8, 3), ConvolutionalSummary(8, 3)):
        with pytest.raises(ValueError, match="8 times 3 numbers"):
            summary(torch.randn(2, 30))
    assert RecurrentSummary(8, 3, join="last")(torch.randn(2, 30)).shape == (2, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepSetSummary(0), "row_dim"),
        (lambda: SetTransformerSummary(3, hidden_dim=10), "multiple of num_heads"),
        (lambda: ConvolutionalSummary(4), "num_steps"),
        (lambda: ComposedSummary([DeepSetSummary(2)], [torch.arange(4)], 3, ""), "numbers from 0 to 2"),
        (lambda: ComposedSummary([DeepSetSummary(2)], [], 3, ""), "one index a part"),
    ],
)
def test_sizes_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_moments_are_those_of_the_rows():
    rows = torch.randn(5, 20, 4, dtype=torch.float64) * torch.tensor([0.1, 1.0, 1.0, 50.0])
    rows[..., 2] += 100.0
    moments = row_moments(rows, cross=True).split([4, 4, 4, 6, 6], -1)
    mean, log_variance, log_square, correlation, partial = moments
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(log_variance, (rows.var(1, unbiased=False) + 1e-8).log())
    torch.testing.assert_close(log_square, (rows.square().mean(1) + 1e-8).log())
    expected = torch.stack([torch.corrcoef(one.T) for one in rows]).flatten(1)[:, [4, 8, 9, 12, 13, 14]]
    torch.testing.assert_close(correlation, expected, rtol=1e-5, atol=1e-5)  # but for the floor of variances
    # Of the first two columns the partial correlation is the correlation itself, but for the pull of one row.
    torch.testing.assert_close(partial[:, 0].tanh(), correlation[:, 0] * 20 / 21, rtol=1e-5, atol=1e-5)
    # The last with the third, given the first two: from the residuals of regressions on these.
    shrunk = (20 * torch.stack([torch.corrcoef(one.T) for one in rows]) + torch.eye(4)) / 21
    precision = torch.linalg.inv(shrunk)
    given = -precision[:, 3, 2] / (precision[:, 3, 3] * precision[:, 2, 2]).sqrt()
    torch.testing.assert_close(partial[:, 5].tanh(), given, rtol=1e-5, atol=1e-5)


def test_more_columns_than_rows_have_finite_moments_and_gradients():
    rows = torch.randn(4, 6, 8, requires_grad=True)
    moments = row_moments(rows, cross=True)
    moments.square().sum().backward()
    assert torch.isfinite(moments).all()
    assert torch.isfinite(rows.grad).all()


def test_weights_are_as_good_as_leaving_rows_out():
    rows = torch.randn(3, 9, 4, dtype=torch.float64)
    weights = torch.cat([torch.full((3, 6, 1), 1 / 6), torch.zeros(3, 3, 1)], 1).double()
    torch.testing.assert_close(row_moments(rows, weights, cross=True), row_moments(rows[:, :6], cross=True))


def test_equal_rows_have_finite_moments_and_gradients():
    rows = torch.zeros(2, 5, 3, requires_grad=True)
    row_moments(rows, cross=True).sum().backward()
    assert torch.isfinite(rows.grad).all()


def test_columns_of_exchangeable_rows_share_a_scale():
    x = torch.randn(500, 4 * 3) * torch.tensor([1.0, 10.0, 0.1] * 4) + torch.tensor([0.0, 5.0, 0.0] * 4)
    scaling = Standardise(12, DeepSetSummary(3).column_groups(12)).fit_(x)
    assert all((scaling.scale.unflatten(0, (4, 3))[:, column].unique().numel() == 1) for column in range(3))
    pooled = x.unflatten(1, (4, 3)).flatten(0, 1)
    torch.testing.assert_close(scaling.mean[:3], pooled.mean(0))
    torch.testing.assert_close(scaling.scale[:3], pooled.std(0), rtol=2e-3, atol=0.0)


def test_what_says_that_a_row_is_there_keeps_its_scale():
    scaling = Standardise(8, DeepSetSummary(3, masked=True).column_groups(8)).fit_(torch.randn(100, 8) + 3.0)
    assert (scaling.mean[[3, 7]] == 0).all()
    assert (scaling.scale[[3, 7]] == 1).all()


def test_a_posterior_of_a_set_ignores_the_order_of_rows():
    # With a mean and a scale for every entry it would not.
    summary = DeepSetSummary(3, 8)
    scaling = Standardise(30, summary.column_groups(30)).fit_(torch.randn(50, 30))
    flow = AffineCouplingFlow(2, summary(torch.zeros(2, 30)).shape[1])
    for weight in flow.parameters():
        nn.init.normal_(weight, std=0.1)
    density = StandardisedDensity(flow, Standardise(2), scaling, summary)
    theta, y = torch.randn(20, 2), torch.randn(20, 30)
    moved = shuffled(y, 3, torch.randperm(10))
    torch.testing.assert_close(density.log_prob(theta, y), density.log_prob(theta, moved), rtol=1e-4, atol=1e-4)


STACKABLE = {name: make for name, make in ALL.items() if "LSTM" not in name and "GRU" not in name}


@pytest.mark.parametrize("make", STACKABLE.values(), ids=STACKABLE)
def test_stacked_densities_with_summaries_agree_with_their_members(make):
    members = []
    for _ in range(3):
        summary = make()
        flow = AffineCouplingFlow(2, summary(torch.zeros(2, DIM)).shape[1])
        nn.init.normal_(flow.gaussian.out.weight if hasattr(flow.gaussian, "out") else flow.trunk[0].weight, std=0.1)
        members.append(StandardisedDensity(flow, Standardise(2), Standardise(DIM), summary))
    theta, y = torch.randn(5, 3, 2), torch.randn(5, 3, DIM)
    expected = torch.stack([one.log_prob(theta[:, i], y[:, i]) for i, one in enumerate(members)], -1)
    torch.testing.assert_close(StackedDensity(members).log_prob(theta, y), expected, rtol=1e-4, atol=1e-4)

"""Outcomes as networks see them: heavy tails bent, rows whitened, nothing lost and nothing torn apart."""

import pytest
import torch

from pyro_voed.densities.whitening import FAR, Whitening, context_layout, fixed_features_of
from pyro_voed.summaries import ComposedSummary, DeepSetSummary, FeedForwardSummary


def covariance_of(z):
    return torch.cov(z.mT, correction=0)


@pytest.mark.parametrize("small", [1e-1, 1e-3, 1e-5])
def test_small_directions_come_out_at_size_one(small):
    # In single precision, in which the entries themselves are given, to a thousandth of their size and below.
    x = torch.randn(5_000, 1) + small * torch.randn(5_000, 3)
    z = Whitening(3).fit_(x)(x)
    torch.testing.assert_close(covariance_of(z), torch.eye(3).double(), rtol=0, atol=1e-2)


def test_directions_of_rounding_are_dropped():
    x = torch.randn(1_000, 1) + 5.0
    z = Whitening(2).fit_(x.expand(-1, 2))(torch.cat([x, x + 2 * torch.finfo(x.dtype).eps], 1))
    # What two entries have in common, shared by them, and nothing of their difference.
    assert (z[:, 0] - z[:, 1]).abs().max() < 1e-5
    assert z.std(0).tolist() == pytest.approx([0.5**0.5] * 2, rel=1e-3)


def test_independent_entries_are_only_standardised():
    x = torch.randn(50_000, 3) * torch.tensor([1.0, 10.0, 0.1]) + 4.0
    z, alone = Whitening(3).fit_(x)(x), (x - x.mean(0)) / x.std(0)
    # Correlations of 50,000 independent draws are below .025 but once in 1e7.
    assert (z - alone.double()).abs().max() < 5 * 0.025


@pytest.mark.parametrize(("num", "dim"), [(100, 60), (60, 200)])
def test_a_short_pilot_is_shrunk_and_new_outcomes_stay_near_size_one(num, dim):
    mixing = torch.eye(dim) + 0.3 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) / dim**0.5
    x = torch.randn(num + 5_000, dim) @ mixing
    z = Whitening(dim).fit_(x[:num])(x[num:])
    assert 0.7 < z.std() < 1.5


def test_rows_of_a_set_are_whitened_alike_and_may_be_permuted():
    rows = torch.randn(2_000, 4, 1) + torch.tensor([1.0, 0.1, 0.1]) * torch.randn(2_000, 4, 3)
    layout = context_layout(DeepSetSummary(row_dim=3), 12, num_designs=0)
    whitening = Whitening(12, *layout).fit_(rows.flatten(1))
    z = whitening(rows.flatten(1)).unflatten(1, (4, 3))
    torch.testing.assert_close(covariance_of(z.flatten(0, 1)), torch.eye(3).double(), rtol=0, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(whitening(rows[:, order].flatten(1)).unflatten(1, (4, 3)), z[:, order])


def test_entries_of_different_rows_and_masks_are_kept_apart():
    parts = [DeepSetSummary(1, masked=True), FeedForwardSummary(2), torch.nn.Linear(2, 4)]
    entries = [torch.arange(4), torch.tensor([4, 5]), torch.tensor([6, 7])]
    summary = ComposedSummary(parts, entries, dim=9, description="")
    rows, columns = context_layout(summary, 10, num_designs=1)
    assert [columns[1], columns[3]] == [-1, -1]
    assert columns[0] == columns[2]
    together = [[j for j in range(10) if rows[j] == rows[i]] for i in range(10)]
    assert together == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6], [7], [8], [9]]
    x = torch.randn(300, 10)
    x[:, 1], x[:, 3] = 1.0, 0.0
    z = Whitening(10, rows, columns).fit_(x)(x)
    assert torch.equal(z[:, [1, 3]].float(), x[:, [1, 3]])


HEAVY_TAILED = {
    "Cauchy": lambda: torch.distributions.StudentT(1.0).sample((5_000, 1)),
    "exponentials of normals": lambda: torch.exp(3.0 * torch.randn(5_000, 1)),
    "a marker of what is missing": lambda: torch.where(torch.rand(5_000, 1) < 0.05, -999.0, torch.randn(5_000, 1)),
    "wild readings": lambda: torch.where(torch.rand(5_000, 1) < 0.01, 1e6, torch.randn(5_000, 1)),
}


@pytest.mark.parametrize("name", HEAVY_TAILED)
def test_tails_are_bent_so_that_the_bulk_can_be_seen(name):
    x = HEAVY_TAILED[name]()
    whitening = Whitening(1).fit_(x)
    z = whitening(x)
    bulk = (x > x.quantile(0.25)) & (x < x.quantile(0.75))
    assert whitening.bent.all()
    assert z[bulk].std() > 0.1  # 1e-6 to 0.02 of what are standardised only
    assert z.abs().max() < FAR + 3.0
    order = x[:, 0].argsort()
    assert (z[order, 0].diff() >= 0.0).all()
    assert (z[order, 0].diff() > 0.0).equal(x[order, 0].diff() > 0.0)


@pytest.mark.parametrize("draw", [torch.randn, torch.rand, lambda *shape: torch.poisson(torch.full(shape, 1e4))])
def test_other_outcomes_are_not_bent(draw):
    assert not Whitening(2).fit_(draw(2_000, 2)).bent.any()


def test_what_is_bent_stays_so_at_the_edge_and_not_beyond():
    tails = torch.randn(2_000, 1)
    whitening = Whitening(1)
    for furthest, bent in ((15.0, False), (30.0, True), (15.0, True), (4.0, False), (15.0, False)):
        assert whitening.fit_(tails.clamp(-3.0, 3.0).index_fill(0, torch.tensor([0]), furthest)).bent.item() is bent


def test_outcomes_that_no_pilot_saw_are_drawn_in_and_kept_in_order():
    whitening = Whitening(1).fit_(torch.randn(1_000, 1))
    x = torch.linspace(-1e6, 1e6, 10_001)[:, None]
    z = whitening(x)
    assert (z.diff(dim=0) > 0).all()
    assert z.abs().max() < 25.0
    inside = torch.linspace(-5, 5, 11)[:, None]
    torch.testing.assert_close(whitening(inside).diff(dim=0).std(), torch.tensor(0.0).double(), atol=1e-9, rtol=0)


def test_what_is_known_without_weights():
    x = torch.randn(7, 20).double()
    moments = fixed_features_of(DeepSetSummary(row_dim=2), x)
    assert moments.shape == (7, 10)
    assert moments.dtype == torch.double
    assert fixed_features_of(None, x) is x
    assert fixed_features_of(FeedForwardSummary(20), x) is x
    assert fixed_features_of(None, torch.randn(3, 1_000)).shape == (3, 0)


def test_it_stays_in_double_precision_where_a_model_is_moved():
    whitening = Whitening(2).fit_(torch.randn(100, 2)).to(torch.float32)
    assert whitening.matrix_0.dtype == whitening.scaling.mean.dtype == torch.double


def test_values_that_come_again_and_again_are_set_apart():
    x = torch.randn(2_000, 2).clamp(-1.0, 1.5)
    x[:, 1] = torch.randn(2_000)
    white = Whitening(2, [0, 1], [0, 1]).fit_(x)
    z = white(x)
    order = x[:, 0].argsort()
    steps = z[order, 0].diff()
    assert (steps >= 0).all(), "monotone"
    # A standard deviation in raw units, a little less where the jumps have widened the spread.
    inside = order[(x[order, 0] > -1.0) & (x[order, 0] < 1.5)]
    low, high = z[x[:, 0] == -1.0, 0], z[x[:, 0] == 1.5, 0]
    assert z[inside[0], 0] - low.max() > 0.4
    assert high.min() - z[inside[-1], 0] > 0.4
    assert (white.jumps[:, 1] == 0).all()


@pytest.mark.parametrize(
    "values",
    [torch.poisson(torch.full((2_000,), 5.0)), torch.bernoulli(torch.full((2_000,), 0.3)), torch.zeros(2_000)],
    ids=["counts", "labels", "constant"],
)
def test_counts_and_labels_are_left_as_they_are(values):
    assert (Whitening(1).fit_(values.unsqueeze(-1)).jumps == 0).all()


def test_what_is_set_apart_stays_so_while_its_share_shrinks():
    x = torch.randn(2_000, 1)
    white = Whitening(1).fit_(x.clamp(min=-1.0))
    rare = torch.where(torch.arange(2_000).unsqueeze(-1) < 20, -1.0, x.abs())
    assert (white.fit_(rare).jumps > 0).any()
    assert (Whitening(1).fit_(rare).jumps == 0).all()
    assert (white.fit_(x).jumps == 0).all()

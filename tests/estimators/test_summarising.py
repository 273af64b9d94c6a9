"""Which summary an outcome gets: exchangeable rows are found where they are, and only there.

Exchangeability is a yes or no that random permutations answer: a symmetric model passes up to rounding always, and one
that is not fails unless a permutation happens to be one of its symmetries (probability below 1e-4 at these sizes).
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyro_voed import amortise_eig, eig_critic, eig_flow, optimise_design, resolve
from pyro_voed.estimators.summarising import exchangeable_rows, outcome_summary
from pyro_voed.problems.michaelis_menten import michaelis_menten
from pyro_voed.problems.twelve_variances import twelve_variances
from pyro_voed.summaries import (
    ComposedSummary,
    ConvolutionalSummary,
    DeepSetSummary,
    FeedForwardSummary,
    RecurrentSummary,
)


def normal(shape, event_dim):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(event_dim)


def rows_in_a_plate():
    mean = pyro.sample("mean", normal([3], 1))
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1))


def rows_right_of_columns():
    with pyro.plate("columns", 3, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8, dim=-1):
            pyro.sample("y", dist.Normal(mean, 1.0))


def rows_without_a_plate():
    mean = pyro.sample("mean", normal([3], 1))
    pyro.sample("y", dist.Normal(mean.unsqueeze(-2), 1.0).expand([*mean.shape[:-1], 8, 3]).to_event(2))


def rows_with_nuisance():
    slope = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 8):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 0.3))
        pyro.sample("y", dist.Normal(slope * x + shift, 1.0))


def counts_of_replicates():
    rate = pyro.sample("mean", dist.Gamma(3.0, 1.0))
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Poisson(rate))


def replicates_at_one_design():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.unit_interval)
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Normal(xi * mean, 1.0))


def own_design_for_each_row():
    # All equal at first: only at that design are the rows exchangeable.
    xi = pyro.param("xi", lambda: 0.5 * torch.ones(8), constraint=constraints.unit_interval)
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Normal(xi * mean, 1.0))


def own_target_for_each_row():
    with pyro.plate("rows", 8):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0))


def series():
    decay = pyro.sample("mean", dist.Uniform(1.0, 5.0))
    times = torch.arange(8.0)
    covariance = torch.exp(-(times[:, None] - times).abs() / decay[..., None, None])
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(8), covariance))


def ring():
    # Rolling the ring leaves it as it is; other permutations do not.
    strength = pyro.sample("mean", dist.Uniform(0.1, 0.4))
    neighbours = torch.eye(8).roll(1, 0) + torch.eye(8).roll(-1, 0)
    precision = torch.eye(8) - strength[..., None, None] * neighbours
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(8), precision_matrix=precision))


def computed_outcome():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", normal([8], 1))
    pyro.deterministic("y", mean.unsqueeze(-1) + noise)


FOUND = {
    "plate": (rows_in_a_plate, ("y",), (8, 3)),
    "rows right of columns": (rows_right_of_columns, ("y",), (8, 3)),
    "no plate": (rows_without_a_plate, ("y",), (8, 3)),
    "counts": (counts_of_replicates, ("y",), (8, 1)),
    "replicates at one design": (replicates_at_one_design, ("y",), (8, 1)),
}
NOT_FOUND = {
    "own designs": own_design_for_each_row,
    "own targets": own_target_for_each_row,
    "series": series,
    "ring": ring,
    "Michaelis-Menten": michaelis_menten(torch.full((7,), 0.5)),
}


@pytest.mark.parametrize(("model", "names", "shape"), FOUND.values(), ids=FOUND)
@pytest.mark.parametrize("vectorize", [True, False])
def test_exchangeable_rows_are_found(model, names, shape, vectorize):
    (rows,) = exchangeable_rows(resolve(model, "y", "mean", vectorize=vectorize))
    assert rows.names == names
    assert rows.entries.shape == shape
    assert sorted(rows.entries.flatten().tolist()) == list(range(rows.entries.numel()))


def test_rows_of_two_sites_go_together_with_the_nuisance_of_their_plate():
    (rows,) = exchangeable_rows(resolve(rows_with_nuisance, ["x", "y"], "mean"))
    assert rows.names == ("x", "y")
    assert rows.entries.tolist() == [[index, index + 8] for index in range(8)]
    # x unobserved: it is nuisance of the same plate, and y alone makes the rows.
    (rows,) = exchangeable_rows(resolve(rows_with_nuisance, "y", "mean"))
    assert rows.names == ("y",)


def test_columns_are_told_from_rows():
    (rows,) = exchangeable_rows(resolve(rows_right_of_columns, "y", "mean"))
    assert rows.entries[0].tolist() == [0, 8, 16]


@pytest.mark.parametrize("model", NOT_FOUND.values(), ids=NOT_FOUND)
def test_other_rows_are_left_alone(model):
    for _ in range(5):
        assert exchangeable_rows(resolve(model, "y")) == []


def test_rows_without_a_density_are_left_alone():
    assert exchangeable_rows(resolve(computed_outcome, "y", "mean")) == []


def picked(model, **more):
    return outcome_summary(resolve(model, "y", **more), None)


def test_short_outcomes_get_no_summary():
    assert picked(own_design_for_each_row) is None


def test_long_outcomes_get_one():
    def long_series():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean.unsqueeze(-1) * torch.linspace(0, 1, 100), 1.0).to_event(1))

    def many_short_ones():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        weights = torch.linspace(0, 1, 100).reshape(10, 10)
        pyro.sample("y", dist.Normal(mean[..., None, None] * weights, 1.0).to_event(2))

    summary = picked(long_series)
    assert isinstance(summary.parts[0], ConvolutionalSummary)
    assert "100 steps of y" in summary.description
    summary = picked(many_short_ones)
    assert isinstance(summary.parts[0], FeedForwardSummary)
    assert "100 entries of y" in summary.description


def test_correlations_are_given_where_the_targets_ask_for_them():
    assert not picked(twelve_variances(6)).parts[0].cross
    assert picked(rows_in_a_plate).parts[0].cross


def test_the_result_says_what_was_picked():
    result = eig_flow(rows_in_a_plate, "y", "mean", num_steps=20, num_samples=100, seed=0)
    assert result.summary == "deep set of 8 exchangeable rows of y"
    assert result.summary in str(result)
    result = eig_flow(rows_in_a_plate, "y", "mean", summary=nn.Identity(), num_steps=2, num_samples=100, seed=0)
    assert result.summary == "Identity"


def test_a_caller_names_parts_by_site():
    def model():
        mean = pyro.sample("mean", normal([2], 1))
        with pyro.plate("rows", 6):
            pyro.sample("a", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("b", dist.Normal(mean[..., 0], 1.0))
        pyro.sample("c", dist.Normal(mean[..., :1] * torch.linspace(0, 1, 20), 1.0).to_event(1))
        pyro.sample("d", dist.Normal(mean[..., 1], 1.0))

    experiment = resolve(model, ["a", "b", "c", "d"], "mean")
    given = {("a", "b"): DeepSetSummary(3, 5), "c": RecurrentSummary(20, summary_dim=4)}
    summary = outcome_summary(experiment, given)
    y = torch.randn(7, experiment.y_dim)
    own = torch.cat([y[:, :12].unflatten(1, (6, 2)), y[:, 12:18, None]], -1).flatten(1)
    expected = torch.cat([given["a", "b"](own), given["c"](y[:, 18:38]), y[:, 38:]], -1)
    torch.testing.assert_close(summary(y), expected)
    result = eig_flow(model, ["a", "b", "c", "d"], "mean", summary=given, num_steps=20, num_samples=100, seed=0)
    assert result.summary == "DeepSetSummary of a and b, RecurrentSummary of c"


@pytest.mark.filterwarnings("ignore:outcome there.0. is constant")
def test_sets_of_varying_size_are_masked_by_a_site():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        size = pyro.sample("size", dist.Categorical(torch.ones(6)))
        there = pyro.deterministic("there", (torch.arange(6) <= size.unsqueeze(-1)).float())
        pyro.sample("y", dist.Normal(mean.unsqueeze(-1), 1.0).expand([*mean.shape, 6]).to_event(1))
        return there

    summary = {("y", "there"): DeepSetSummary(1, 8, masked=True)}
    result = eig_flow(model, ["y", "there"], "mean", summary=summary, num_steps=600, num_samples=20_000, seed=0)
    # Of n rows the information is log(1 + 4 n) / 2; n is uniform on one to six and tells nothing itself.
    exact = sum(0.5 * torch.log1p(torch.tensor(4.0 * n)) for n in range(1, 7)) / 6
    assert exact - 0.05 - 4 * result.standard_error < result.eig < exact + 4 * result.standard_error


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"z": DeepSetSummary(3)}, ValueError, r"unknown \['z'\]"),
        ({"y": DeepSetSummary(3), ("y",): DeepSetSummary(3)}, ValueError, r"repeated \['y'\]"),
        ({"y": 3}, TypeError, "expected a torch module"),
        (3, TypeError, "expected a torch module"),
        ({"y": DeepSetSummary(5)}, ValueError, "rows along an axis"),
    ],
)
def test_a_wrong_summary_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        outcome_summary(resolve(rows_in_a_plate, "y", "mean"), given)


def test_every_door_takes_summaries():
    common = {"num_steps": 10, "seed": 0}
    model = replicates_at_one_design
    curve = amortise_eig(model, "y", "mean", **common)
    assert curve.at({"xi": torch.rand(3)}, num_samples=100, seed=0).summary == "deep set of 8 exchangeable rows of y"
    assert eig_critic(model, "y", "mean", num_samples=256, **common).bound == "lower"
    best = optimise_design(model, "y", "mean", num_starts=2, num_samples=100, **common)
    assert best.final.summary == "deep set of 8 exchangeable rows of y"
    both = eig_flow(model, "y", "mean", designs={"xi": torch.rand(3)}, ensemble=True, num_samples=100, **common)
    assert both.summary == "deep set of 8 exchangeable rows of y"


def test_recurrent_networks_are_not_stacked():
    with pytest.raises(NotImplementedError, match="recurrent networks stacked"):
        eig_flow(series, "y", "mean", summary=RecurrentSummary(8), learning_rate=[1e-3, 2e-3], num_steps=2, seed=0)


def test_a_composed_summary_is_taken_as_it_is():
    summary = ComposedSummary([DeepSetSummary(3)], [torch.arange(24)], 24, "mine")
    assert outcome_summary(resolve(rows_in_a_plate, "y", "mean"), summary) is summary

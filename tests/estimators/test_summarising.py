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

from pyro_voed import Experiment, Fresh, amortise_eig, eig_critic, eig_flow
from pyro_voed.design import optimise_design
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
from tests.closed_forms import check_bounds
from tests.estimators.cases import normal, param

SET = "deep set of 8 exchangeable rows of y"


def mean_of(dim=None):
    """Draw the target, a number or a vector."""
    return normal("mean") if dim is None else pyro.sample("mean", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def in_rows(draw, *before):
    """A model that draws an outcome in a plate of eight rows, given what was drawn before the plate."""

    def model():
        given = [make() for make in before]
        with pyro.plate("rows", 8):
            draw(*given)

    return model


def right_of_columns():
    with pyro.plate("columns", 3, dim=-2):
        mean = mean_of()
        with pyro.plate("rows", 8, dim=-1):
            normal("y", mean)


def without_a_plate():
    mean = mean_of(3)
    pyro.sample("y", dist.Normal(mean.unsqueeze(-2), 1.0).expand([*mean.shape[:-1], 8, 3]).to_event(2))


def with_nuisance(slope):
    normal("y", slope * normal("x") + normal("shift", 0.0, 0.3))


def series():
    decay, times = pyro.sample("mean", dist.Uniform(1.0, 5.0)), torch.arange(8.0)
    covariance = torch.exp(-(times[:, None] - times).abs() / decay[..., None, None])
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(8), covariance))


def ring():
    # Rolling the ring leaves it as it is; other permutations do not.
    neighbours = torch.eye(8).roll(1, 0) + torch.eye(8).roll(-1, 0)
    precision = torch.eye(8) - pyro.sample("mean", dist.Uniform(0.1, 0.4))[..., None, None] * neighbours
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(8), precision_matrix=precision))


def computed():
    noise = pyro.sample("noise", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    pyro.deterministic("y", mean_of().unsqueeze(-1) + noise)


def design(size):
    return lambda: param("xi", [0.5] * size if size else 0.5, constraints.unit_interval)


def designed(xi, mean):
    normal("y", xi * mean)


rows_in_a_plate = in_rows(lambda mean: pyro.sample("y", dist.Normal(mean, 1.0).to_event(1)), lambda: mean_of(3))
rows_with_nuisance = in_rows(with_nuisance, mean_of)
one_design, own_designs = (in_rows(designed, design(size), mean_of) for size in (0, 8))

FOUND = {
    "plate": (rows_in_a_plate, 3),
    "rows right of columns": (right_of_columns, 3),
    "no plate": (without_a_plate, 3),
    "counts": (
        in_rows(lambda rate: pyro.sample("y", dist.Poisson(rate)), lambda: pyro.sample("mean", dist.Gamma(3.0, 1.0))), 1
    ),
    "replicates at one design": (one_design, 1),
}  # fmt: skip


def rare_at_own_doses():
    mean = mean_of()
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Bernoulli(logits=mean - 3.0 + 0.5 * torch.arange(8.0)))


def never():
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Bernoulli(torch.sigmoid(mean_of() - 60.0)))


NOT_FOUND = {
    # All equal at first: only at that design are the rows exchangeable.
    "own designs": own_designs,
    "own targets": in_rows(lambda: normal("y", mean_of())),
    "series": series,
    "ring": ring,
    # In most experiments all rows are equal, and permuting them changes nothing.
    "rare events at own doses": rare_at_own_doses,
    "no event at all": never,
    "Michaelis-Menten": michaelis_menten(torch.full((7,), 0.5)),
}


@pytest.mark.parametrize(("model", "row_dim"), FOUND.values(), ids=FOUND)
@pytest.mark.parametrize("vectorize", [True, False])
def test_exchangeable_rows_are_found(model, row_dim, vectorize):
    (rows,) = exchangeable_rows(Experiment(model, "y", "mean", vectorize=vectorize))
    assert rows.names == ("y",)
    assert rows.entries.shape == (8, row_dim)
    assert sorted(rows.entries.flatten().tolist()) == list(range(8 * row_dim))


def test_rows_of_two_sites_go_together_with_the_nuisance_of_their_plate():
    (rows,) = exchangeable_rows(Experiment(rows_with_nuisance, ["x", "y"], "mean"))
    assert rows.names == ("x", "y")
    assert rows.entries.tolist() == [[index, index + 8] for index in range(8)]
    # x unobserved: it is nuisance of the same plate, and y alone makes the rows.
    (rows,) = exchangeable_rows(Experiment(rows_with_nuisance, "y", "mean"))
    assert rows.names == ("y",)


def test_columns_are_told_from_rows():
    (rows,) = exchangeable_rows(Experiment(right_of_columns, "y", "mean"))
    assert rows.entries[0].tolist() == [0, 8, 16]


@pytest.mark.parametrize("model", NOT_FOUND.values(), ids=NOT_FOUND)
def test_other_rows_are_left_alone(model):
    for _ in range(5):
        assert exchangeable_rows(Experiment(model, "y")) == []


def test_rows_without_a_density_are_left_alone():
    assert exchangeable_rows(Experiment(computed, "y", "mean")) == []


def picked(model):
    return outcome_summary(Experiment(model, "y"), None)


def test_short_outcomes_get_no_summary():
    assert picked(own_designs) is None


@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [((100,), ConvolutionalSummary, "100 steps of y"), ((10, 10), FeedForwardSummary, "100 entries of y")],
)
def test_long_outcomes_get_one(shape, kind, words):
    def model():
        mean = mean_of()[(..., *[None] * len(shape))] * torch.linspace(0, 1, 100).reshape(shape)
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(len(shape)))

    summary = picked(model)
    assert isinstance(summary.parts[0], kind)
    assert words in summary.description


def test_correlations_are_given_where_the_targets_ask_for_them():
    assert not picked(twelve_variances(6)).parts[0].head.cross
    assert picked(rows_in_a_plate).parts[0].head.cross


def brief(model=rows_in_a_plate, outcomes="y", num_steps=10, **options):
    options = {"training": Fresh(num_steps=num_steps), "num_samples": 100, "seed": 0, **options}
    return eig_flow(model, outcomes, "mean", **options)


def test_the_result_says_what_was_picked():
    result = brief()
    assert result.learned.summary == SET
    assert SET in str(result)
    assert brief(summary=nn.Identity()).learned.summary == "Identity"


def test_a_caller_names_parts_by_site():
    def model():
        mean = mean_of(2)
        with pyro.plate("rows", 6):
            pyro.sample("a", dist.Normal(mean, 1.0).to_event(1))
            normal("b", mean[..., 0])
        pyro.sample("c", dist.Normal(mean[..., :1] * torch.linspace(0, 1, 20), 1.0).to_event(1))
        normal("d", mean[..., 1])

    experiment = Experiment(model, ["a", "b", "c", "d"], "mean")
    given = {("a", "b"): DeepSetSummary(3, 5), "c": RecurrentSummary(20, summary_dim=4)}
    summary = outcome_summary(experiment, given)
    y = torch.randn(7, experiment.y_dim)
    own = torch.cat([y[:, :12].unflatten(1, (6, 2)), y[:, 12:18, None]], -1).flatten(1)
    expected = torch.cat([given["a", "b"](own), given["c"](y[:, 18:38]), y[:, 38:]], -1)
    torch.testing.assert_close(summary(y), expected)
    result = brief(model, ["a", "b", "c", "d"], summary=given)
    assert result.learned.summary == "DeepSetSummary of a and b, RecurrentSummary of c"


@pytest.mark.filterwarnings("ignore:outcome there.0. is constant")
def test_sets_of_varying_size_are_masked_by_a_site():
    def model():
        mean, size = normal("mean", 0.0, 2.0), pyro.sample("size", dist.Categorical(torch.ones(6)))
        pyro.deterministic("there", (torch.arange(6) <= size.unsqueeze(-1)).float())
        pyro.sample("y", dist.Normal(mean.unsqueeze(-1), 1.0).expand([*mean.shape, 6]).to_event(1))

    summary = {("y", "there"): DeepSetSummary(1, 8, masked=True)}
    result = brief(model, ["y", "there"], 600, summary=summary, num_samples=20_000)
    # Of n rows the information is log(1 + 4 n) / 2; n is uniform on one to six and tells nothing itself.
    check_bounds(result, 0.5 * torch.log1p(4.0 * torch.arange(1, 7)).mean(), 0.05)


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
        outcome_summary(Experiment(rows_in_a_plate, "y", "mean"), given)


def test_every_door_takes_summaries():
    model, common = one_design, {"training": Fresh(num_steps=10), "seed": 0}
    curve = amortise_eig(model, "y", "mean", **common)
    assert curve.at({"xi": torch.rand(3)}, num_samples=100, seed=0).learned.summary == SET
    assert eig_critic(model, "y", "mean", num_samples=256, **common).learned.summary == SET
    assert optimise_design(model, "y", "mean", starts=2, num_samples=100, **common).final.learned.summary == SET
    assert brief(model, designs={"xi": torch.rand(3)}, ensemble=True).learned.summary == SET


def test_recurrent_networks_are_not_stacked():
    with pytest.raises(NotImplementedError, match="recurrent networks stacked"):
        brief(series, summary=RecurrentSummary(8), training=Fresh(num_steps=2, learning_rate=[1e-3, 2e-3]))


def test_a_composed_summary_is_taken_as_it_is():
    summary = ComposedSummary([DeepSetSummary(3)], [torch.arange(24)], 24, "mine")
    assert outcome_summary(Experiment(rows_in_a_plate, "y", "mean"), summary) is summary

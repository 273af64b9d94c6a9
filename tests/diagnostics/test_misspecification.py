"""Outcomes of the model itself give uniform p-values, outcomes that it cannot make small ones.

Densities are untrained or hold a known summary: the p-value is right whatever the density has learned. Thresholds: see
`cases`.
"""

import dataclasses
import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_voed import Fresh
from pyro_voed.densities import AffineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.diagnostics.misspecification import misspecification, outlyingness, summarise, whitening
from pyro_voed.estimators import eig_flow
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.inference.flow import trained_density
from pyro_voed.problems.linear_gaussian import linear_gaussian
from tests.diagnostics.cases import THRESHOLD, near, with_density


class Mean(nn.Module):
    """The mean of the outcome: all that this density sees."""

    def forward(self, y):
        return y.mean(-1, keepdim=True)


@pytest.fixture(scope="module")
def untrained():
    return eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=1), seed=0)


@pytest.fixture(scope="module")
def summarised(untrained):
    density = StandardisedDensity(AffineCouplingFlow(2, 1), Standardise(2), Standardise(3), Mean())
    return with_density(untrained, density)


def outcomes(result, num):
    return list(sample_joint(result.experiment, num).y)


@pytest.mark.parametrize("num_outcomes", [1, 4])
def test_p_values_are_uniform_for_the_models_own_outcomes(untrained, num_outcomes):
    # 120 repeats: the share at or below a fifth has standard error 0.037.
    small = []
    for _ in range(120):
        observed = outcomes(untrained, num_outcomes)
        small.append(misspecification(untrained, observed, 100, num_null=19).p_value <= 0.2)
    assert near(sum(small) / 120, 0.2, 120)


def test_p_value_is_the_tail_of_the_density(untrained):
    # Standard normal summaries: a point r away is as far out as exp(-r^2 / 2) of them, in two dimensions.
    radii = torch.tensor([0.5, 1.5, 2.5])
    reference, fresh = torch.randn(2000, 2), torch.randn(2000, 1, 2)
    for radius in radii.tolist():
        statistic, null = outlyingness(torch.tensor([[radius, 0.0]]), reference, fresh)
        tail = math.exp(-0.5 * radius**2)
        # The kernel estimate from 2,000 draws is not quite round: 0.02 is left for that.
        error = math.sqrt(tail * (1 - tail) / 2000)
        assert abs((null >= statistic).double().mean().item() - tail) < THRESHOLD * error + 0.02


@pytest.mark.parametrize(
    ("outcome", "outside"),
    [([0.0, 0.0, 40.0], ("y[2]",)), ([-30.0, 0.0, 0.0], ("y[0]",)), ([25.0, 30.0, 30.0], ("y[0]", "y[1]", "y[2]"))],
)
def test_an_outcome_outside_is_seen_and_named(untrained, outcome, outside):
    result = misspecification(untrained, {"y": torch.tensor(outcome)}, 500, num_null=99, seed=0)
    assert result.p_value == 0.01
    assert result.statistic > result.null.max()
    assert result.outside == outside


def test_an_outcome_inside_every_range_can_still_be_unlike_all(untrained):
    # y[1] and y[2] measure the same coefficient with unit noise: they differ by sqrt(2) or so, not by 7.
    result = misspecification(untrained, torch.tensor([0.0, 3.5, -3.5]), 500, num_null=99, seed=0)
    assert result.p_value <= 0.02
    assert result.outside == ()


def test_several_outcomes_show_what_one_does_not(untrained):
    # Outcomes of too little spread: none is unlikely by itself, twenty together are.
    quiet = [0.3 * y for y in outcomes(untrained, 20)]
    together = misspecification(untrained, quiet, 500, num_null=99, seed=0)
    assert together.p_value == 0.01
    assert together.num_outcomes == 20
    assert together.num_simulations == 500 + 99 * 20
    alone = misspecification(untrained, quiet[0], 500, num_null=99, seed=0)
    assert alone.p_value > 0.1


def test_outcomes_are_compared_by_what_the_density_sees(summarised):
    # A large deviation that leaves the mean as it is does not reach this density; its range is reported all the same.
    hidden = misspecification(summarised, torch.tensor([20.0, -20.0, 0.0]), 500, num_null=99, seed=0)
    assert hidden.summary_dim == 1
    assert hidden.p_value > 0.5
    assert hidden.outside == ("y[0]", "y[1]")
    seen = misspecification(summarised, torch.tensor([6.0, 6.0, 6.0]), 500, num_null=99, seed=0)
    assert seen.p_value == 0.01


def test_the_design_drops_out_of_the_comparison():
    xi = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    result = eig_flow(linear_gaussian(), "y", "theta", designs={"xi": xi}, training=Fresh(num_steps=1), seed=0)
    at_second = misspecification(result, torch.zeros(3), 200, num_null=19, design_index=1, seed=0)
    assert at_second.summary_dim == 3
    # The default design ties y[1] to y[2], the second ties y[0] to y[1].
    torn = torch.tensor([0.0, 5.0, -5.0])
    assert misspecification(result, torn, 500, num_null=99, design_index=0, seed=0).p_value <= 0.02
    with pytest.raises(ValueError, match="design_index"):
        misspecification(result, torn, 200)


def test_a_density_without_a_summary_gives_the_outcome_itself(untrained):
    y = torch.randn(4, 3)
    foreign = with_density(untrained, AffineCouplingFlow(2, 3))
    assert torch.equal(summarise(trained_density(foreign), y), y)
    standardised = summarise(trained_density(untrained), y)
    assert torch.allclose(standardised, untrained.density.context_scaling(y).float())


def test_equal_discrete_outcomes_tie():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Bernoulli(logits=theta + 2.5))

    result = eig_flow(model, "y", "theta", training=Fresh(num_steps=1), seed=0)
    common = misspecification(result, torch.tensor(1.0), 500, num_null=399, seed=0)
    assert common.p_value == 1.0
    # The p-value of the rarer outcome is how often it comes.
    share = 1 - sample_joint(result.experiment, 100_000).y.mean().item()
    rare = misspecification(result, torch.tensor(0.0), 500, num_null=399, seed=0)
    assert abs(rare.p_value - share) < THRESHOLD * math.sqrt(share * (1 - share) / 399) + 1 / 400


def test_redundant_and_constant_directions_are_left_out():
    x = torch.randn(500, 2)
    padded = torch.cat([x, x.sum(1, keepdim=True), torch.full((500, 1), 7.0)], 1)
    plain, left = whitening(x[100:])(x), whitening(padded[100:])(padded)
    assert left.shape == (500, 2)
    # Whitened coordinates are known up to a rotation, which no distance sees.
    assert torch.allclose(torch.cdist(plain, plain), torch.cdist(left, left), atol=1e-3)
    with pytest.raises(ValueError, match="simulated summaries are all equal"):
        whitening(torch.ones(100, 2))


def test_seeds_the_callers_stream_and_the_print(untrained):
    state = torch.get_rng_state()
    found = [misspecification(untrained, torch.zeros(3), 200, num_null=19, seed=2) for _ in range(2)]
    assert torch.equal(found[0].null, found[1].null)
    assert torch.equal(torch.get_rng_state(), state)
    lines = str(found[0]).splitlines()
    assert lines[0].startswith("outcome against simulated: MMD^2 ")
    assert lines[1] == "outside the simulated range: nothing"


def test_what_does_not_fit_is_refused(untrained):
    with pytest.raises(ValueError, match="observations is empty"):
        misspecification(untrained, [])
    with pytest.raises(ValueError, match="expected one experiment's shape"):
        misspecification(untrained, torch.zeros(2))
    with pytest.raises(ValueError, match="num_simulations: expected at least 100"):
        misspecification(untrained, torch.zeros(3), 99)
    with pytest.raises(ValueError, match="learned no density of the targets"):
        misspecification(dataclasses.replace(untrained, learned=None), torch.zeros(3))
    broken = with_density(
        untrained, StandardisedDensity(AffineCouplingFlow(2, 1), Standardise(2), Standardise(3), Broken())
    )
    with pytest.raises(ArithmeticError, match="summaries of 1 of 1 observed outcomes are not finite"):
        misspecification(broken, torch.full((3,), 1e4), 100, num_null=5)


class Broken(nn.Module):
    def forward(self, y):
        return y.mean(-1, keepdim=True).exp()

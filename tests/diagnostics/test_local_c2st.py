"""A posterior known exactly, and the same made wrong in one region of outcomes: seen there and nowhere else.

theta ~ N(0, 1) and y ~ N(theta, 1) give theta | y ~ N(y / 2, 1 / 2). Thresholds: see `cases`.
"""

import dataclasses
import math

import pytest
import torch
from torch import nn

from pyro_voed import Fresh
from pyro_voed.diagnostics.local_c2st import local_c2st, local_classifier_test
from pyro_voed.diagnostics.simulated import simulate_posteriors
from pyro_voed.estimators import eig_flow
from pyro_voed.problems.linear_gaussian import DEFAULT_DESIGN, exact_posterior, linear_gaussian
from tests.diagnostics.cases import near, with_density


def draw(y, shift):
    """Draw from the posterior, off by `shift` where the outcome is above a half."""
    return y / 2 + math.sqrt(0.5) * torch.randn_like(y) + shift * (y > 0.5).float()


def check(outcome, shift, num_simulations=300, num_null=19, **options):
    truths = torch.randn(num_simulations, 1)
    y = truths + torch.randn_like(truths)
    return local_classifier_test(
        truths,
        draw(y, shift),
        y,
        draws_at_outcome=draw(torch.full((200, 1), outcome), shift),
        y_outcome=torch.tensor([outcome]),
        num_null=num_null,
        **options,
    )


class ExactPosterior(nn.Module):
    """The posterior of the default linear-Gaussian experiment, off by `shift` where the first outcome is positive."""

    theta_dim, context_dim, has_rsample = 2, 3, False

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def condition(self, context):
        mean, covariance = exact_posterior(context, torch.tensor(DEFAULT_DESIGN))
        wrong = self.shift * (context[..., :1] > 0).float() * torch.tensor([1.0, 0.0])
        return torch.distributions.MultivariateNormal(mean + wrong, covariance)

    def log_prob(self, theta, context):
        return self.condition(context).log_prob(theta)


@pytest.fixture(scope="module")
def untrained():
    return eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=1), seed=0)


def test_p_values_are_uniform_where_the_posterior_is_right():
    # 30 repeats: the share at or below a fifth has standard error 0.073.
    small = [check(0.5, 0.0, num_simulations=200).p_value <= 0.2 for _ in range(30)]
    assert near(sum(small) / 30, 0.2, 30)


def test_an_error_in_one_region_is_seen_there_and_only_there():
    # Measured over 10 repeats with 500 experiments and half this shift: the smallest p-value each time inside.
    inside = check(1.5, 1.0, num_simulations=1000, num_null=29, seed=0)
    assert inside.p_value == pytest.approx(1 / 30)
    assert inside.statistic > inside.null.mean() + 10 * inside.null.std()
    outside = check(-1.5, 1.0, num_simulations=1000, num_null=29, seed=0)
    assert outside.p_value > 0.1
    assert outside.statistic < 0.1 * inside.statistic


def test_probabilities_say_where_the_mass_is_wrong():
    # q is shifted by 1: truths are below the draws, and the best classifier's log odds are linear in theta.
    result = check(1.5, 1.0, num_simulations=1000, num_null=1, seed=0)
    theta = result.draws[:, 0].double()
    log_odds = (0.75 + 0.5 - theta) / 0.5  # two normals of variance 1/2, at 0.75 and 1.75
    best = torch.sigmoid(log_odds)
    assert (result.probability - best).abs().mean() < 0.1
    assert abs(result.statistic - (best - 0.5).square().mean().item()) < 0.03


def test_the_user_function_on_an_exact_density(untrained):
    for shift, outcome, is_right in ((0.0, 1.0, True), (1.0, 1.5, False)):
        result = with_density(untrained, ExactPosterior(shift))
        simulated = simulate_posteriors(result, 600, 1, seed=1)
        found = local_c2st(simulated, result, torch.tensor([outcome, 0.5, 0.2]), num_draws=300, num_null=29, seed=0)
        assert (found.p_value > 1 / 30) == is_right
        assert found.draws.shape == (300, 2)
        assert found.num_simulations == 600
        assert f"p = {found.p_value:.3g}; 600 experiments)" in str(found)


def test_seeds_and_the_callers_state(untrained):
    result = with_density(untrained, ExactPosterior(0.0))
    simulated = simulate_posteriors(result, 100, 1, seed=1)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = [local_c2st(simulated, result, torch.zeros(3), num_draws=50, num_null=3, seed=4) for _ in range(2)]
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0].null, found[1].null)
    assert found[0].statistic == found[1].statistic


def test_units_do_not_matter():
    truths, y = torch.randn(200, 1), torch.randn(200, 2)
    draws, at_outcome = torch.randn(200, 1), torch.randn(50, 1)

    def statistic(scale, offset):
        return local_classifier_test(
            truths * scale + offset,
            draws * scale + offset,
            y * scale + offset,
            draws_at_outcome=at_outcome * scale + offset,
            y_outcome=torch.full((2,), offset, dtype=torch.double),
            num_null=1,
            seed=0,
        ).statistic

    assert statistic(1.0, 0.0) == pytest.approx(statistic(torch.tensor(1e3).double(), 1e4), rel=1e-2)


def test_what_does_not_fit_is_refused(untrained):
    simulated = simulate_posteriors(untrained, 100, 1, seed=1)
    outcome = torch.zeros(3)
    with pytest.raises(ValueError, match="expected packed outcomes y"):
        local_c2st(dataclasses.replace(simulated, y=None), untrained, outcome)
    with pytest.raises(ValueError, match=r"columns \['size'\] are not among the targets'"):
        local_c2st(dataclasses.replace(simulated, columns=("theta[0]", "size")), untrained, outcome)
    with pytest.raises(ValueError, match="at least 100 experiments"):
        check(0.0, 0.0, num_simulations=99)
    good = {"draws_at_outcome": torch.randn(50, 1), "y_outcome": torch.zeros(1)}
    tensors = [torch.randn(100, 1) for _ in range(3)]
    with pytest.raises(ValueError, match=r"y_outcome: expected shape \(1,\), got \(2,\)"):
        local_classifier_test(*tensors, **{**good, "y_outcome": torch.zeros(2)})
    with pytest.raises(ValueError, match="draws: 100 of 100 values are not finite"):
        local_classifier_test(tensors[0], tensors[1] * math.nan, tensors[2], **good)

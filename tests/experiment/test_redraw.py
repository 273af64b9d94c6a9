"""Laws of redrawn outcomes: one forward run serves many outcomes, and only where that is right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Pool, eig_critic, eig_flow, eig_marginal, info_nce, sample_joint
from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten, nonlinear
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import VALIDATION_COPIES, fit_pool
from tests.experiment.cases import Z_MAX, both_ways, linked, normal


def target_after_outcome():
    theta = normal("theta")
    normal("next_state", theta + normal("y", theta))


def note_of_the_outcome():
    pyro.deterministic("doubled", 2.0 * normal("y", normal("theta")))


@pytest.mark.parametrize(
    ("model", "outcomes", "targets", "redrawable"),
    [
        (linear_gaussian.linear_gaussian(), "y", None, True),
        (michaelis_menten.michaelis_menten(), "y", None, True),
        (nonlinear.nonlinear(), "y", None, True),
        (finite.finite(), "y", None, True),
        (note_of_the_outcome, "y", "theta", True),
        (implicit_toy.implicit_toy(), "y", "theta", False),
        (target_after_outcome, "y", ["theta", "next_state"], False),
        (linked, ["y", "z"], "theta", False),
    ],
)
def test_outcomes_are_redrawn_only_where_nothing_follows_from_them(model, outcomes, targets, redrawable):
    assert Experiment(model, outcomes, targets).redrawable is redrawable


@both_ways
def test_a_redraw_keeps_the_targets_and_costs_no_simulation(vectorize):
    experiment = Experiment(linear_gaussian.linear_gaussian(), "y", vectorize=vectorize)
    sample = sample_joint(experiment, 20, redraw=True)
    calls = experiment.num_calls
    again = sample.redraw()
    assert experiment.num_calls == calls
    assert torch.equal(again.theta, sample.theta)
    assert torch.equal(again.log_prior, sample.log_prior)
    assert not (again.y == sample.y).any()


def test_redrawn_outcomes_have_the_law_of_the_outcome_given_the_targets_and_their_own_likelihood():
    experiment = Experiment(linear_gaussian.linear_gaussian(), "y")
    sample = sample_joint(experiment, 5, redraw=True, likelihood=True)
    mean = sample.theta @ experiment.design_values["xi"].T
    again = sample.redraw()
    torch.testing.assert_close(again.log_likelihood, dist.Normal(mean, 1.0).log_prob(again.y).sum(-1))
    outcomes = torch.stack([sample.redraw().y for _ in range(400)])
    assert ((outcomes.mean(0) - mean).abs() < Z_MAX / math.sqrt(400)).all()
    assert ((outcomes.var(0) - 1.0).abs() < Z_MAX * math.sqrt(2 / 400)).all()


def test_a_part_of_a_pool_redraws_its_own_rows_and_chunks_redraw_together():
    experiment = Experiment(michaelis_menten.michaelis_menten(), "y")
    pool = sample_joint(experiment, 1_000, redraw=True, max_bytes=20_000)
    rows = torch.tensor([7, 3, 900])
    part = pool[rows]
    again = part.redraw()
    assert torch.equal(again.theta, pool.theta[rows])
    # An outcome stays within six noise standard deviations of another for the same targets: rows are not mixed up.
    assert ((again.y - part.y).abs() < 6 * 5.0 * math.sqrt(2)).all()


def test_redraws_over_a_batch_of_designs_keep_its_shape():
    experiment = Experiment(nonlinear.nonlinear(), "y")
    sample = sample_joint(experiment, 10, {"d": torch.tensor([0.1, 0.9])}, redraw=True)
    again = sample.redraw()
    assert again.y.shape == sample.y.shape == (10, 2, 1)
    assert torch.equal(again.designs, sample.designs)


@pytest.mark.parametrize(
    "estimate", [eig_flow, eig_marginal, lambda *args, **kwargs: eig_critic(*args, terms=info_nce, **kwargs)]
)
def test_estimators_on_a_pool_pay_for_its_forward_runs_alone(estimate):
    result = estimate(
        linear_gaussian.linear_gaussian(), "y", "theta", training=Pool(200, max_epochs=5), num_samples=100, seed=0
    )
    # Pool, evaluation and the probes at the door.
    assert result.num_simulations < 200 + 100 + 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_experiments_teach_more_with_new_outcomes():
    """Ten pools of 300, paired by seed; t_9 above 2.82 has probability 0.01 where redrawing does nothing."""
    experiment = Experiment(linear_gaussian.linear_gaussian(), "y", "theta")

    def bound(seed, training):
        return eig_flow(experiment, training=training, num_samples=5_000, seed=seed).eig

    gains = torch.stack([bound(seed, Pool(300)) - bound(seed, Pool(300, redraw_outcomes=False)) for seed in range(10)])
    assert gains.mean() / (gains.std() / math.sqrt(10)) > 2.82


def test_pool_training_sees_new_outcomes_every_pass():
    class Rows:
        def __init__(self, values):
            self.values, self.num_samples = values, len(values)

        def __getitem__(self, rows):
            return Rows(self.values[rows])

    weight = torch.nn.Parameter(torch.zeros(()))
    refreshed = []

    def refresh(part):
        refreshed.append(part.num_samples)
        return part

    history = fit_pool(
        Rows(torch.randn(40)),
        lambda rows: -((rows.values - weight) ** 2),
        Ascent([{"params": [weight], "lr": 0.1}]),
        batch_size=8,
        max_epochs=5,
        refresh=refresh,
        progress=False,
    )
    assert refreshed[:VALIDATION_COPIES] == [4] * VALIDATION_COPIES
    assert refreshed[VALIDATION_COPIES:] == [36] * len(history.validation)

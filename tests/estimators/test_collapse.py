"""The collapse check: silent on what is learnt and on what cannot be, and it names what a summary threw away.

A coordinate is named only where the probe exceeds zero by five of its standard errors, so one that the outcome tells
nothing about is named about 3 times in 10 million; seeds are fixed besides.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_voed import Experiment, Fresh, Pool, eig_flow, sample_joint
from pyro_voed.densities import SplineCouplingFlow
from pyro_voed.estimators.collapse import collapse_of
from pyro_voed.problems.twelve_variances import twelve_variances
from tests.estimators.cases import small_flow

# One of the four means is not measured at all.
pytestmark = pytest.mark.filterwarnings("ignore:target .* never reaches:UserWarning")


class Blind(nn.Module):
    """Throws away all but the first entries."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.linear = nn.Linear(kept, 4)

    def forward(self, y):
        return self.linear(y[..., : self.kept])

    def fixed_features(self, y):
        """Nor may the linear prediction make up for it."""
        return y[..., : self.kept]


def four_means():
    # The last one is not measured at all.
    mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mean[..., :3], 0.5).to_event(1))


def learn(summary, model=four_means, **options):
    training = Fresh(num_steps=150, learning_rate=5e-3)
    options = {"density": small_flow, "training": training, "num_samples": 500, "seed": 0, **options}
    return eig_flow(model, "y", "mean", summary=summary, **options).learned


def test_targets_that_a_summary_ignores_are_named():
    with pytest.warns(UserWarning, match=r"hardly knows mean\[1\], mean\[2\], of which"):
        learned = learn(Blind(1))
    assert learned.collapse.collapsed == ("mean[1]", "mean[2]")
    assert "hardly learned: mean[1], mean[2]" in str(learned)
    assert str(learned.collapse).count("COLLAPSED") == 2


def test_nothing_is_said_of_a_target_that_the_outcome_tells_nothing_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* never reaches the outcome")
        check = learn(nn.Linear(3, 6)).collapse
    assert check.collapsed == ()
    # Exact: 1 / (1 + 0.25) of the variance of what is measured, nothing of the last.
    for share, gap in (("probed", 0.01), ("recovered", 0.02), ("contraction", 0.03)):
        off = (getattr(check, share)[:3] - 0.8).abs()
        assert (off < 4 * getattr(check, f"{share}_standard_error")[:3] + gap).all()
    assert abs(check.probed[3]) < 4 * check.probed_standard_error[3] + 0.01


def test_without_a_summary_nothing_is_checked():
    assert learn(None, training=Fresh(num_steps=5), num_samples=100).collapse is None


def test_checking_costs_no_simulations():
    costs = []
    for summary in (nn.Linear(3, 6), None):
        experiment = Experiment(four_means, "y", "mean", vectorize=False)
        result = eig_flow(experiment, summary=summary, training=Pool(300, max_epochs=5), num_samples=100, seed=0)
        costs.append(result.num_simulations)
        assert (result.learned.collapse is None) is (summary is None)
    assert costs[0] == costs[1] == 400


class Recorder(nn.Module):
    """A summary that hands outcomes on and keeps what it was shown, in training and out of it."""

    shown: list = []  # noqa: RUF012, the density works on a copy of the module

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y):
        Recorder.shown.append((self.training, y.detach().reshape(-1, 3)))
        return self.scale * y


def test_a_density_is_judged_by_experiments_outside_its_pool():
    Recorder.shown = []
    assert learn(Recorder(), training=Pool(200, redraw_outcomes=False, max_epochs=3)).collapse is not None
    in_training = [index for index, (training, _) in enumerate(Recorder.shown) if training]
    rows = lambda parts: {tuple(row) for _, y in parts for row in y.tolist()}  # noqa: E731
    seen, judged = rows(Recorder.shown[: in_training[-1] + 1]), rows(Recorder.shown[in_training[-1] + 1 :])
    assert len(seen) >= 200
    assert len(judged) >= 500
    assert not seen & judged


def test_the_probe_sees_variances_through_the_moments_of_rows():
    experiment = Experiment(twelve_variances(10), "y", "variance")

    class Prior(nn.Module):
        def condition(self, context):
            return dist.Logistic(torch.zeros(len(context), 12), 1.0).to_event(1)

    check = collapse_of(experiment, Prior(), sample_joint(experiment, 2_000))
    assert len(check.collapsed) == 12
    assert (check.probed > 0.3).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plain_deep_set_collapses_and_the_default_does_not(seed):
    class PlainSet(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Sequential(nn.Linear(12, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
            self.out = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 24))

        def forward(self, y):
            return self.out(self.rows(y.unflatten(-1, (-1, 12))).mean(-2))

    class PlainFlow(nn.Module):
        # Starts at the standard normal: the library's own start, linear in the statistics, is half the cure.
        def __init__(self, theta_dim, context_dim):
            super().__init__()
            self.flow = SplineCouplingFlow(theta_dim, context_dim)

        def condition(self, context):
            return self.flow.condition(context)

    torch.manual_seed(seed)
    plain = {"summary": PlainSet(), "density": PlainFlow}
    with pytest.warns(UserWarning, match="hardly knows"):
        eig_flow(twelve_variances(), "y", **plain, training=Fresh(num_steps=1_000), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eig_flow(twelve_variances(), "y", training=Fresh(num_steps=1_000), seed=seed)

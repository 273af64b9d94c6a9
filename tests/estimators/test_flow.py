"""What `eig_flow` asks for, judges itself by and says, beside its bound."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_voed import Experiment, Fresh, Pool, eig_flow, eig_marginal, eig_nmc

SHORT = {"training": Fresh(num_steps=20), "num_samples": 500, "seed": 0}


def explicit():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta, 1.0))


def implicit():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    return pyro.deterministic("y", theta + noise)


def with_nuisance():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta + shift, 1.0))


PARTS = {
    "certify": {"certify": True},
    "marginal": {"references": [eig_marginal]},
    "nmc": {"references": [eig_nmc]},
}


@pytest.mark.parametrize(
    ("program", "part"),
    [*((implicit, part) for part in PARTS), (with_nuisance, "certify"), (with_nuisance, "marginal")],
)
def test_what_a_part_of_the_call_needs_is_refused_before_training(program, part):
    runs = []

    def counted():
        runs.append(1)
        return program()

    Experiment(counted, "y", "theta")
    probes = len(runs)
    with pytest.raises(NotImplementedError):
        eig_flow(counted, "y", "theta", **PARTS[part], **SHORT)
    assert len(runs) == 2 * probes


class Recorder(nn.Module):
    """A summary that hands outcomes on and keeps what it was shown, in training and out of it."""

    shown: list = []  # noqa: RUF012, the density works on a copy of the module

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y):
        Recorder.shown.append((self.training, y.detach().reshape(-1, 3)))
        return self.scale * y


def three_outcomes():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta.unsqueeze(-1).expand(*theta.shape, 3), 1.0).to_event(1))


def test_collapse_is_looked_for_on_experiments_outside_the_pool():
    Recorder.shown = []
    pool = Pool(200, redraw_outcomes=False, max_epochs=3)
    result = eig_flow(three_outcomes, "y", summary=Recorder(), training=pool, num_samples=500, seed=0)
    assert result.learned.collapse is not None
    in_training = [index for index, (training, _) in enumerate(Recorder.shown) if training]
    rows = lambda parts: {tuple(row) for _, y in parts for row in y.tolist()}  # noqa: E731
    seen, judged = rows(Recorder.shown[: in_training[-1] + 1]), rows(Recorder.shown[in_training[-1] + 1 :])
    assert len(seen) >= 200
    assert len(judged) >= 500
    assert not seen & judged


@pytest.mark.parametrize("estimator", [eig_flow, eig_marginal])
def test_a_budget_spent_is_told_in_words_that_hold_for_either_side(estimator):
    result = estimator(explicit, "y", **SHORT)
    assert result.history.stop_reason == "budget"
    assert "still improving" in str(result)
    assert "rising" not in str(result)

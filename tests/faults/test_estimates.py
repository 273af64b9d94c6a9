"""Faults of estimates and of what follows from them, each mended once and kept from coming back."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_voed import (
    Experiment,
    Fresh,
    Pool,
    amortise_eig,
    eig_ace,
    eig_flow,
    eig_marginal,
    eig_nmc,
    eig_vnmc,
    flow_posterior,
)
from pyro_voed.certificates import bound_gap

SHORT = {"training": Fresh(num_steps=20), "num_samples": 500, "seed": 0}


def model():
    xi = pyro.param("xi", torch.tensor(1.0), constraint=constraints.interval(0.0, 3.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def implicit():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    return pyro.deterministic("y", theta + noise)


def with_nuisance():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta + shift, 1.0))


# --- the gap of a bound is the divergence of the density that attains it ----------------------------------------------


@pytest.mark.parametrize("estimator", [eig_ace, eig_vnmc, eig_marginal])
def test_a_gap_is_refused_where_the_density_does_not_attain_the_bound(estimator):
    result = estimator(model, "y", **SHORT)
    upper = replace(eig_nmc(model, "y", num_outer_samples=200, seed=0), bound="upper")
    with pytest.raises(ValueError, match=f"Barber-Agakov bound.*{estimator.__name__}"):
        bound_gap(replace(result, bound="lower", references=(upper,)))


def test_a_gap_is_at_least_the_expected_divergence():
    # Of an untrained density, N(0, 1) whatever the outcome; the divergence is then the information itself.
    class Prior(nn.Module):
        def __init__(self, theta_dim, context_dim):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def condition(self, context):
            shape = (*context.shape[:-1], 1)
            return dist.Normal(torch.zeros(shape), self.scale.exp().expand(shape)).to_event(1)

    result = eig_flow(model, "y", density=Prior, training=Fresh(num_steps=0), references=[eig_nmc], seed=0)
    gap = bound_gap(result)
    assert gap.gap > 0.5 * math.log(2.0) - 4.0 * gap.standard_error  # false alarm once in 30,000 runs


# --- what a call needs is checked before anything is paid for ---------------------------------------------------------

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


# --- an amortised density serves one design as well as many -----------------------------------------------------------


def test_a_posterior_at_one_design_of_an_amortised_density():
    amortised = amortise_eig(model, "y", training=Fresh(num_steps=20), seed=0)
    many = amortised.at({"xi": torch.tensor([0.5, 2.0])}, seed=0)
    for index, xi in enumerate((0.5, 2.0)):
        one = amortised.at({"xi": torch.tensor(xi)}, seed=0)
        assert one.eig.shape == ()
        draws = flow_posterior(one, torch.tensor(1.0), 200, seed=1).flat("theta")
        expected = flow_posterior(many, torch.tensor(1.0), 200, design_index=index, seed=1).flat("theta")
        torch.testing.assert_close(draws, expected)


# --- a trained density is judged by experiments that it has not seen --------------------------------------------------


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


# --- what is said of a bound holds for its side -----------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [eig_flow, eig_marginal])
def test_a_budget_spent_is_told_in_words_that_hold_for_either_side(estimator):
    result = estimator(model, "y", **SHORT)
    assert result.history.stop_reason == "budget"
    assert "still improving" in str(result)
    assert "rising" not in str(result)

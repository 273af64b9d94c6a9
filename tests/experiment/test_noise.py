"""Noise of the wrong shape, none at all, and counts whose rates overflow: told before anything is learned."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Fresh, eig_flow, eig_marginal, eig_nmc

SLOPES = torch.tensor([1.0, 2.0, 3.0])
BRIEF = {"training": Fresh(num_steps=3), "num_samples": 200, "seed": 0}


def simulator(noise):
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        e = noise()
        return pyro.deterministic("y", theta.unsqueeze(-1) * SLOPES + e, event_dim=1)

    return model


def own():
    return pyro.sample("e", dist.Normal(0.0, 0.5).expand([3]).to_event(1))


def shared():
    return pyro.sample("e", dist.Normal(0.0, 0.5)).unsqueeze(-1)


def growing():
    e = own()
    return e * pyro.sample("scale", dist.LogNormal(0.0, 2.0)).unsqueeze(-1)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("noise", "told"), [(shared, True), (float, True), (own, False), (growing, False)])
def test_directions_without_noise_are_warned_of(noise, told, vectorize):
    experiment = Experiment(simulator(noise), "y", "theta", vectorize=vectorize, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eig_flow(experiment, **BRIEF)
    words = "outcome ['y']: of 3 elements looked at, 1 combination(s) are moved by the targets and by nothing else"
    assert sum(words in str(warning.message) for warning in caught) == told


def counts():
    theta = pyro.sample("theta", dist.Normal(0.0, 20.0))
    return pyro.sample("y", dist.Poisson(theta.exp()))


@pytest.mark.parametrize(("estimator", "options"), [(eig_flow, BRIEF), (eig_marginal, {}), (eig_nmc, {})])
def test_counts_whose_rates_overflow_are_told_by_site_share_and_region(estimator, options):
    words = r"site 'y' has \d+ of .*beyond all counting.* of them\), those with theta in"
    with pytest.raises(ArithmeticError, match=words):
        estimator(counts, "y", **{"seed": 0, **options})

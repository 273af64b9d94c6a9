"""What speaks against an estimate is in its print and in a warning, and nothing is said of one that is sound.

A sound estimate is doubted with probability 3e-5 (four standard errors), its designs called distinguishable where they
are not with probability 0.05; the seeds are fixed.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Fresh, certify, eig_flow, eig_marginal, eig_nmc, eig_pce, search_grid
from tests.closed_forms import gain_eig, poisson, scalar, scaled

BRIEF = {"training": Fresh(num_steps=40), "num_samples": 1_000, "seed": 0, "progress": False}


def normal(information, dim=1):
    """Independent normal targets, measured with as much noise as gives the information."""
    noise = (torch.tensor(2.0 * information / dim).exp() - 1.0).rsqrt()

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
        pyro.sample("y", dist.Normal(theta, noise).to_event(1))

    return model


def useless():
    xi = pyro.param("xi", torch.tensor(1.0), constraint=constraints.interval(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0 * xi * theta, 1.0))


def rare():
    theta = pyro.sample("theta", dist.Categorical(torch.tensor([0.98, 0.01, 0.01])))
    pyro.sample("y", dist.Normal(theta.to(torch.float32), 0.01))


XI = {"xi": torch.linspace(0.2, 1.0, 5)}
DOUBTED = {
    "at the ceiling": (lambda: eig_pce(normal(20.0, 4), "y", seed=0), "its inner draws leave .* nats open"),
    "few inner draws": (lambda: eig_nmc(normal(20.0, 4), "y", seed=0), "its inner draws leave .* nats open"),
    "designs alike": (lambda: eig_flow(useless, "y", designs=XI, **BRIEF), "5 designs are indistinguishable"),
    "above the entropy": (lambda: eig_marginal(rare, "y", **BRIEF), "exceeds the entropy of the targets, 0.111"),
    "edge of a grid": (
        lambda: search_grid(lambda designs: eig_nmc(scaled, "y", designs=designs), XI, seed=0),
        "largest value of 'xi' tried, 1: better designs may lie beyond",
    ),
}


@pytest.mark.parametrize("name", DOUBTED)
def test_a_number_that_should_not_come_alone_is_warned_of_and_says_so(name):
    make, words = DOUBTED[name]
    with pytest.warns(UserWarning, match=words):
        result = make()
    assert len(result.doubts) == 1
    assert f"\ndoubt: {result.doubts[0]}" in str(result)
    assert "<th style='text-align:left'>doubt</th>" in result._repr_html_()


SOUND = {
    "far below the ceiling": lambda: eig_pce(normal(3.0), "y", seed=0),
    "many inner draws": lambda: eig_nmc(normal(3.0), "y", seed=0),
    "designs apart": lambda: eig_flow(scaled, "y", designs=XI, **BRIEF),
    "all of the entropy": lambda: eig_nmc(rare, "y", num_outer_samples=4_000, seed=0),
    "an edge that is the constraint's": lambda: search_grid(
        lambda designs: eig_nmc(scaled, "y", designs=designs), {"xi": torch.linspace(0.4, 1.9, 4)}, seed=0
    ),
    "best inside": lambda: search_grid(
        lambda designs: eig_nmc(peaked, "y", designs=designs), {"xi": torch.linspace(0.0, 1.0, 5)}, seed=0
    ),
}


def peaked():
    xi = pyro.param("xi", torch.tensor(0.5))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta * torch.exp(-8.0 * (xi - 0.5) ** 2), 0.3))


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_number_is_not_doubted(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SOUND[name]().doubts == ()


def test_designs_are_ranked_or_called_indistinguishable():
    # 1e-4 nats apart: told from each other on common random numbers.
    xi = torch.tensor([1.0, 1.0002, 0.3, 0.6, 1.3, 1.6, 1.9])
    result = eig_flow(scaled, "y", designs={"xi": xi}, **{**BRIEF, "training": Fresh(num_steps=300)})
    exact = gain_eig(xi)
    assert torch.equal(result.eig.argsort(), exact.argsort())
    assert result.near_best.tolist() == [False] * 6 + [True]
    assert "largest at index 6, all others clearly below" in str(result)
    difference, error = result.eig[1] - result.eig[0], result.difference_error[0, 1]
    assert difference.item() == pytest.approx((exact[1] - exact[0]).item(), abs=2e-5)
    assert error < 1e-5


def test_convergence_is_not_taken_for_tightness():
    loose = eig_flow(poisson, "y", **{**BRIEF, "training": Fresh(num_steps=3), "num_samples": 20_000})
    assert "looseness: unknown" in str(loose)
    assert "below the exact value, by the certificate" in str(certify(loose, width=0.05, seed=0))
    tight = eig_flow(scalar, "y", references=[eig_nmc], **BRIEF)
    assert "looseness: at most about" in str(tight)
    assert "by eig_nmc" in str(tight)

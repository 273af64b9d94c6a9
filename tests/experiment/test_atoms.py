"""Point masses: found where a density is learned of what has them, and harmless where it is only conditioned on."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import (
    Experiment,
    Fresh,
    eig_critic,
    eig_flow,
    eig_marginal_likelihood,
    eig_nmc,
    optimise_design,
)
from pyro_voed.experiment.atoms import tied

BRIEF = {"training": Fresh(num_steps=5), "num_samples": 200, "seed": 0}


def normal(name, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(loc, scale))


def spike_and_slab():
    xi = pyro.param("xi", torch.tensor(1.0))
    active = pyro.sample("active", dist.Bernoulli(0.5))
    theta = pyro.deterministic("theta", active * normal("slab"))
    return normal("y", xi * theta, 0.5)


def clipped():
    theta = pyro.deterministic("theta", normal("x").clamp(min=-1.0))
    return normal("y", theta, 0.5)


def zero_inflated():
    base = dist.Normal(1.0, 1.0)
    theta = pyro.sample("theta", dist.ZeroInflatedDistribution(base, gate=torch.tensor(0.3)))
    return normal("y", theta, 0.5)


def after_history():
    theta = normal("theta")
    return normal("y", theta, 0.5)


PARTICLES = torch.randn(100, generator=torch.Generator().manual_seed(0))


def particles():
    index = pyro.sample("index", dist.Categorical(torch.ones(100)))
    pyro.sample("theta", dist.Delta(PARTICLES[index]))


def reading(model, **options):
    return Experiment(model, "y", "theta", seed=0, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda: eig_flow(reading(spike_and_slab), learn_prior=True, **BRIEF),
        lambda: eig_flow(reading(clipped, prior_entropy=1.0), **BRIEF),
        lambda: eig_flow(reading(after_history, prior=particles), **BRIEF),
        lambda: optimise_design(reading(spike_and_slab, prior_entropy=1.0), **BRIEF),
    ],
    ids=["spike and slab", "clipped", "particles handed on", "search"],
)
def test_no_density_is_learned_of_targets_with_atoms(call):
    with pytest.raises(NotImplementedError, match=r"target theta takes single values.*eig_critic"):
        call()


def test_a_zero_inflated_distribution_states_no_density_of_its_draws():
    experiment = reading(zero_inflated)
    assert not experiment.has_log_prior
    with pytest.raises(NotImplementedError, match=r"'theta'.* have no log density"):
        eig_flow(experiment, **BRIEF)

    def outcome():
        theta = normal("theta")
        return pyro.sample("y", dist.ZeroInflatedDistribution(dist.Normal(theta, 0.5), gate=torch.tensor(0.3)))

    with pytest.raises(NotImplementedError, match="needs the density of the outcome"):
        eig_nmc(outcome, "y", "theta")
    eig_flow(outcome, "y", "theta", **BRIEF)


def test_critics_and_what_only_conditions_on_atoms_go_on():
    eig_critic(reading(spike_and_slab), training=Fresh(num_steps=5), num_samples=200, seed=0)

    def clipped_outcome():
        theta = normal("theta")
        return pyro.deterministic("y", (theta + normal("e")).clamp(min=0.0))

    eig_flow(clipped_outcome, "y", "theta", **BRIEF)
    with pytest.raises(NotImplementedError, match=r"outcome y takes single values.* at 0, .*eig_flow"):
        eig_marginal_likelihood(clipped_outcome, "y", "theta", **BRIEF)


@pytest.mark.parametrize(
    ("draw", "atoms"),
    [
        (lambda: torch.rand(10_000), False),
        (lambda: 1e4 + 0.01 * torch.randn(10_000), False),
        (lambda: torch.full((10_000,), 3.0), False),
        (lambda: torch.randn(10_000).clamp(min=-2.2), True),
        (lambda: torch.randn(5_000)[torch.randint(5_000, (1_000,))], True),
        (lambda: torch.randint(2, (1_000,)).float(), True),
    ],
    ids=["uniform", "coarse", "constant", "a limit seldom met", "5,000 particles", "two values"],
)
def test_ties_tell_atoms_from_rounding(draw, atoms):
    for seed in range(20):
        torch.manual_seed(seed)
        assert (tied(draw())[0] > 0.005) == atoms

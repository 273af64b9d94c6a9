"""What must not change between single runs: sites, shapes, masks, and what is said of the same values."""

import random

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_voed import Experiment, sample_joint


def normal(name, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(loc, scale))


# --- sites, shapes, masks -------------------------------------------------------------------------------------------


def masked_latent():
    with poutine.mask(mask=torch.tensor(False)):
        theta = normal("theta")
    return normal("y", theta)


def masked_latent_distribution():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])).to_event(1))
    return normal("y", theta.sum(-1))


def masked_everywhere():
    return pyro.sample("y", dist.Normal(normal("theta"), 1.0).mask(False))


def masked_at_random():
    theta = normal("theta").unsqueeze(-1)
    return pyro.sample("y", dist.Normal(theta.expand(*theta.shape[:-1], 2), 1.0).mask(theta > 0).to_event(1))


def masked_seldom():
    theta = normal("theta").unsqueeze(-1)
    return pyro.sample("y", dist.Normal(theta.expand(*theta.shape[:-1], 2), 1.0).mask(theta < 3.0).to_event(1))


def changing_sites():
    changing_sites.calls += 1
    theta = normal("theta")
    return normal("y", normal("sometimes") if changing_sites.calls % 2 else theta)


def changing_shape():
    changing_shape.calls += 1
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2 + changing_shape.calls % 2), 1.0).to_event(1))
    return normal("y", theta.sum(-1))


changing_sites.calls = changing_shape.calls = 0

REFUSED = {
    "mask on a latent": (masked_latent, ["'theta'", "mask", "remove"]),
    "mask in a latent's distribution": (masked_latent_distribution, ["'theta'", "mask", "remove"]),
    "mask everywhere": (masked_everywhere, ["'y'", "masked everywhere"]),
    "mask at random": (masked_at_random, ["'y'", "mask"]),
    "mask that seldom changes": (masked_seldom, ["'y'", "mask", "chance"]),
    "sites that change": (changing_sites, ["sometimes", "every run"]),
    "shape that changes": (changing_shape, ["'theta'", "shape", "Pad"]),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_is_refused_by_name_with_its_remedy(name, vectorize):
    model, words = REFUSED[name]
    with pytest.raises(ValueError, match=r".") as caught:
        Experiment(model, "y", vectorize=vectorize)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


# --- random numbers drawn outside sample sites ----------------------------------------------------------------------

GENERATOR = numpy.random.default_rng(0)
NOISE = {
    "torch": lambda: torch.randn(()),
    "NumPy": lambda: torch.tensor(numpy.random.normal()),  # noqa: NPY002
    "a NumPy generator": lambda: torch.tensor(GENERATOR.normal()),
    "Python": random.random,
}


def in_a_parameter(noise):
    return normal("y", normal("theta") + noise())


def before_a_parameter(noise):
    return normal("y", pyro.deterministic("middle", normal("theta") + noise()))


def as_the_outcome(noise):
    return pyro.deterministic("y", normal("theta") + noise())


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("model", [in_a_parameter, before_a_parameter])
@pytest.mark.parametrize("name", NOISE)
def test_noise_outside_sample_sites_is_refused_where_a_density_depends_on_it(name, model, vectorize):
    words = r"site '(y|middle)'.*outside pyro\.sample.*sample site.*vectorize=False"
    with pytest.raises(ValueError, match=words):
        Experiment(lambda: model(NOISE[name]), "y", "theta", vectorize=vectorize)


@pytest.mark.parametrize("name", NOISE)
def test_a_simulator_may_make_its_own_noise_where_experiments_run_one_by_one(name):
    model = lambda: as_the_outcome(NOISE[name])  # noqa: E731
    with pytest.raises(ValueError, match=r"site 'y'.*outside pyro\.sample.*vectorize=False"):
        Experiment(model, "y", "theta")
    experiment = Experiment(model, "y", "theta", vectorize=False)
    assert not experiment.is_explicit
    sample = sample_joint(experiment, 20)
    assert (sample.y - sample.theta).std() > 0.05


def test_a_simulators_noise_does_not_hide_what_depends_on_what():
    def model():
        theta, other = normal("theta"), normal("other")
        pyro.deterministic("twice", 2.0 * other)
        return pyro.deterministic("y", theta + other + NOISE["NumPy"]())

    experiment = Experiment(model, "y", ["theta", "twice"], vectorize=False)
    assert experiment.leaking_nuisance == {"twice": "other"}

    with pytest.warns(UserWarning, match="'theta' never reaches"):
        Experiment(lambda: (normal("theta"), as_the_outcome_of_nothing()), "y", "theta", vectorize=False)


def as_the_outcome_of_nothing():
    return pyro.deterministic("y", normal("other") + NOISE["NumPy"]())

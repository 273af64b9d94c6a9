"""Parameters outside their range are reported with the site's name, whoever finds them first."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment


def normal(name, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(loc, scale))


def mixture(scale):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), scale))


BAD = {
    # name: (distribution of the target, its size, words of the complaint)
    "not a number": (lambda: dist.Normal(math.nan, 1.0), (), ["loc of Normal", "nan"]),
    "negative scale": (
        lambda: dist.Normal(0.0, -1.0),
        (),
        ["scale of Normal", "GreaterThan(lower_bound=0.0)", "got -1"],
    ),
    "one of three": (
        lambda: dist.Normal(torch.zeros(3), torch.tensor([1.0, -2.0, 1.0])).to_event(1),
        (3,),
        ["scale of Normal", "got -2 (1 of 3 elements)"],
    ),
    "in a mixture": (lambda: mixture(torch.tensor([1.0, -1.0])), (), ["scale of Normal", "got -1"]),
    "under a transform": (lambda: dist.LogNormal(math.nan, 1.0), (), ["loc of LogNormal", "nan"]),
    "crossed ends": (lambda: dist.Uniform(2.0, 1.0), (), ["low of Uniform", "LessThan", "2"]),
    "logits": (
        lambda: dist.OneHotCategorical(logits=torch.tensor([0.0, math.nan])),
        (2,),
        ["OneHotCategorical", "nan"],
    ),
}


@pytest.mark.parametrize("way", ["prior", "guide"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_parameter_is_reported_with_its_site(name, way):
    bad, size, words = BAD[name]

    def draw(make):
        return pyro.sample("theta", make()).reshape(-1)[0]

    def model():
        good = lambda: dist.Normal(torch.zeros(size), 1.0).to_event(len(size))  # noqa: E731
        return normal("y", normal("first") + draw(bad if way == "prior" else good))

    prior = None if way == "prior" else lambda: (normal("first"), draw(bad))
    with pytest.raises(ValueError, match="site 'theta'") as caught:
        Experiment(model, "y", prior=prior)
    assert not [word for word in (*words, "Look at") if word not in str(caught.value)], str(caught.value)


def test_what_is_not_a_number_is_found_with_validation_off():
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"site 'theta'.*scale of Normal.*nan"):
        Experiment(lambda: normal("y", normal("theta", 0.0, math.nan)), "y")


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_scale_that_some_draws_make_negative_is_reported_with_its_site(vectorize):
    """None of 3 draws is negative with probability 1/1000."""
    with pytest.raises(ValueError, match=r"site 'y'.*scale of Normal"):
        Experiment(lambda: normal("y", normal("theta"), normal("spread", -1.3)), "y", vectorize=vectorize)


def test_a_scale_that_only_many_experiments_make_negative_is_told_apart():
    def model():
        theta = normal("theta")
        return normal("y", theta, 2.0 - theta.numel())

    with pytest.raises(ValueError, match=r"site 'y'.*run at once.*mixes experiments.*vectorize=False"):
        Experiment(model, "y")
    Experiment(model, "y", vectorize=False)


def test_errors_of_another_kind_come_through_as_they_are():
    def model():
        raise RuntimeError("the instrument is off")

    with pytest.raises(RuntimeError, match=r"^the instrument is off$"):
        Experiment(model, "y")

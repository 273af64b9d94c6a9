"""The density of targets that are drawn given nuisance sites, from above and from below.

The averages' logarithms err to one side by about half the relative variance of the average; a side is broken when the
mean lies more than 4 standard errors beyond, which an unbiased one does with probability 3.2e-5.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Fresh, eig_flow
from pyro_voed.experiment.held import averaged_log_prior
from pyro_voed.experiment.programs import run_rows
from pyro_voed.experiment.sampling import sample_joint

SIDE = 4.0


def normal(name, mean, scale=1.0):
    return pyro.sample(name, dist.Normal(mean, scale))


def given_nuisance():
    u = normal("u", 0.0)
    theta = normal("theta", u)
    normal("y", theta + u)


def effects():
    """Two effects around a common mean: given only the nuisance, not each other."""
    u = normal("u", 0.0)
    with pyro.plate("groups", 2):
        theta = normal("theta", u)
        normal("y", theta)


def joined():
    """The second target hangs on the first one, through a nuisance site and by itself."""
    first = normal("first", 0.0)
    u = normal("u", first)
    second = normal("second", u + first)
    normal("y", second)


def labelled():
    """A mixture: the label is a nuisance."""
    label = pyro.sample("label", dist.Bernoulli(0.3))
    theta = pyro.sample("theta", dist.LogNormal(label, 0.5))
    normal("y", theta.log())


def mixture_density(theta):
    parts = torch.stack([dist.LogNormal(mean, 0.5).log_prob(theta) for mean in (0.0, 1.0)], -1)
    return (parts + torch.tensor([0.7, 0.3]).log()).logsumexp(-1)


def gaussian(covariance):
    normals = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)), torch.tensor(covariance))
    return lambda values: normals.log_prob(values)


EXACT = {
    "one": (given_nuisance, ["theta"], gaussian([[2.0]])),
    "two": (effects, ["theta"], gaussian([[2.0, 1.0], [1.0, 2.0]])),
    # second = 2 first + e + e', first of variance 1.
    "joined": (joined, ["first", "second"], gaussian([[1.0, 2.0], [2.0, 6.0]])),
    "mixture": (labelled, ["theta"], lambda values: mixture_density(values.squeeze(-1))),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_both_sides_hold_the_exact_density_and_close_in(name, vectorize):
    model, targets, log_density = EXACT[name]
    experiment = Experiment(model, "y", targets, vectorize=vectorize, seed=0)
    assert experiment.averages_prior
    assert experiment.joined_targets is (name == "joined")
    torch.manual_seed(0)
    size = 400 if vectorize else 40
    run = run_rows(experiment.program, size, experiment.shapes)
    exact = log_density(torch.cat([run.flat_value(label) for label in targets], -1))
    above, below = (averaged_log_prior(experiment, run, {}, below=below) - exact for below in (False, True))
    for errors, sign in ((above, 1.0), (below, -1.0)):
        assert sign * errors.mean() >= -SIDE * errors.std() / size**0.5
        assert errors.mean().abs() <= 2.5 / 33 + SIDE * errors.std() / size**0.5


def test_samples_hold_it_in_packed_coordinates():
    experiment = Experiment(labelled, "y", "theta")
    sample = sample_joint(experiment, 3_000)
    exact = mixture_density(sample.values["theta"]) + sample.log_det
    torch.testing.assert_close(sample.log_prior, exact, atol=0.1, rtol=0.0)


@pytest.mark.parametrize("name", ["two", "joined"])
def test_the_flow_bound_stays_below_and_comes_near(name):
    model, targets, _ = EXACT[name]
    exact = {"two": 0.5 * math.log(8.0), "joined": 0.5 * math.log(7.0)}[name]
    result = eig_flow(model, "y", targets, training=Fresh(num_steps=300), seed=0, progress=False)
    assert result.bound == "lower"
    assert exact - 0.05 <= result.eig <= exact + SIDE * result.standard_error


def scaled():
    """The spread of the target's own prior is a design."""
    xi = pyro.param("xi", torch.tensor(1.0))
    theta = normal("theta", normal("u", 0.0, xi))
    normal("y", theta)


@pytest.mark.parametrize("xi", [torch.tensor(3.0), torch.tensor([0.5, 3.0])])
def test_priors_that_follow_the_design_do_so_in_a_batch(xi):
    experiment = Experiment(scaled, "y", "theta")
    assert experiment.prior_follows_design
    sample = sample_joint(experiment, 2_000, {"xi": xi})
    exact = dist.Normal(0.0, (1.0 + xi**2).sqrt()).log_prob(sample.theta.squeeze(-1))
    assert ((sample.log_prior - exact).mean(0).abs() <= 0.05).all()

"""A guide in place of the model's prior: it is simulated from, and states the density of the targets or does not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_voed import Experiment, sample_joint
from pyro_voed.experiment.packing import unpack_targets
from tests.experiment.cases import Z_MAX, both_ways, normal


def two_latents():
    theta = normal("theta")
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    return normal("y", theta + rate.sum(-1))


def plain_guide():
    theta = normal("theta", 2.0, 0.5)
    pyro.sample("rate", dist.LogNormal(theta.unsqueeze(-1) * torch.ones(2), 0.3).to_event(1))


def auto_guide(kind):
    guide = kind(poutine.condition(two_latents, data={"y": torch.tensor(1.0)}))
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def density_of_plain(guide, theta):
    first = dist.Normal(2.0, 0.5).log_prob(theta[:, 0])
    return first + dist.Normal(theta[:, :1], 0.3).log_prob(theta[:, 1:]).sum(-1)


def density_of_auto_normal(guide, theta):
    loc, scale = (torch.cat([part.theta.reshape(1), part.rate]) for part in (guide.locs, guide.scales))
    return dist.Normal(loc, scale).log_prob(theta).sum(-1)


PRIORS = {
    "plain": (lambda: plain_guide, density_of_plain),
    "AutoNormal": (lambda: auto_guide(AutoNormal), density_of_auto_normal),
    "AutoMultivariateNormal": (
        lambda: auto_guide(AutoMultivariateNormal),
        lambda guide, theta: guide.get_posterior().log_prob(theta),
    ),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@both_ways
@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_guide_replaces_simulation_and_log_prior(name, vectorize):
    make, expected = PRIORS[name]
    guide = make()
    store = list(pyro.get_param_store().keys())
    experiment = Experiment(two_latents, "y", prior=guide, vectorize=vectorize)
    sample = sample_joint(experiment, 400 if vectorize else 100, likelihood=True)
    torch.testing.assert_close(sample.log_prior, expected(guide, sample.theta).detach(), **CLOSE)
    # If the draws come from that density, exp(log r - log p) has mean one for any density r (here: a narrower one).
    spread, centre = 0.7 * sample.theta.std(0), sample.theta.mean(0)
    if name != "plain":
        ratio = (dist.Normal(centre, spread).log_prob(sample.theta).sum(-1) - sample.log_prior).exp()
        assert abs(ratio.mean() - 1) < Z_MAX * ratio.std() / len(ratio) ** 0.5 + 0.05
    mean = sample.theta[:, 0] + sample.theta[:, 1:].exp().sum(-1)
    torch.testing.assert_close(sample.log_likelihood, dist.Normal(mean, 1.0).log_prob(sample.y[:, 0]).detach(), **CLOSE)
    assert list(pyro.get_param_store().keys()) == store


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal"])
def test_the_log_prior_of_a_target_subset_is_marginal_or_not_stated(name):
    guide = PRIORS[name][0]()
    sample = sample_joint(Experiment(two_latents, "y", "theta", prior=guide), 50)
    if sample.log_prior is None:
        return  # not stated is honest
    if name == "AutoNormal":
        marginal = dist.Normal(guide.locs.theta, guide.scales.theta)
    else:
        posterior = guide.get_posterior()
        marginal = dist.Normal(posterior.loc[0], posterior.covariance_matrix[0, 0].sqrt())
    torch.testing.assert_close(sample.log_prior, marginal.log_prob(sample.theta[:, 0]).detach(), **CLOSE)


def test_an_independent_prior_guide_states_the_prior_of_a_target_subset():
    def guide():
        normal("theta", 2.0, 0.5)
        pyro.sample("rate", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))

    sample = sample_joint(Experiment(two_latents, "y", "theta", prior=guide), 20)
    torch.testing.assert_close(sample.log_prior, dist.Normal(2.0, 0.5).log_prob(sample.theta[:, 0]))


def test_a_prior_guide_over_a_plate():
    def model():
        with pyro.plate("groups", 3):
            return normal("y", normal("theta"))

    guide = AutoNormal(poutine.condition(model, data={"y": torch.zeros(3)}))
    guide()
    sample = sample_joint(Experiment(model, "y", prior=guide), 30)
    expected = dist.Normal(guide.locs.theta, guide.scales.theta).log_prob(sample.theta).sum(-1)
    torch.testing.assert_close(sample.log_prior, expected.detach(), **CLOSE)


def test_a_prior_guide_with_a_deterministic_target():
    def model():
        return normal("y", pyro.deterministic("square", normal("theta").square()))

    sample = sample_joint(Experiment(model, "y", "square", prior=lambda: normal("theta", 5.0, 0.01)), 20)
    assert (sample.theta - 25.0).abs().max() < 1.0


def test_a_prior_guide_of_deltas_with_dependent_bounds_is_right_or_refused():
    def model():
        a = pyro.sample("a", dist.Uniform(1.0, 3.0))
        return normal("y", pyro.sample("b", dist.Uniform(0.0, a)))

    def guide():
        a = pyro.sample("a_", dist.Uniform(1.0, 3.0), infer={"is_auxiliary": True})
        b = pyro.sample("b_", dist.Uniform(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(a))
        pyro.sample("b", dist.Delta(a * b, log_density=-a.log()))

    try:
        experiment = Experiment(model, "y", prior=guide)
    except NotImplementedError:
        return
    sample = sample_joint(experiment, 100)
    assert torch.isfinite(sample.theta).all()
    values = unpack_targets(experiment, sample.theta)
    torch.testing.assert_close(values["b"], sample.values["b"], rtol=1e-3, atol=1e-4)


def test_a_prior_guide_that_misses_a_latent_is_refused():
    with pytest.raises(ValueError, match=r"prior.*\['rate'\]"):
        Experiment(two_latents, "y", prior=lambda: normal("theta"))

"""Pyro guides as densities: what is scored, what is trained, what is left alone, what is refused.

Statistical checks: 4.5 standard errors, false-positive rate 7 in a million each; there are two, and seeds are fixed.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Importance, Predictive
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_voed import Experiment, Fresh, eig_ba, eig_nmc, sample_joint
from pyro_voed.estimators.guide import GuideDensity
from pyro_voed.problems.finite import finite
from pyro_voed.problems.linear_gaussian import DEFAULT_DESIGN, exact_eig, exact_posterior, linear_gaussian
from tests.estimators.cases import normal, param

DESIGN = torch.tensor(DEFAULT_DESIGN)
OUTCOME = torch.tensor([1.0, 2.0, 1.5])
THRESHOLD = 4.5


def fitted(guide, model=None, num_steps=20, **options):
    options = {"training": Fresh(num_steps=num_steps), "num_samples": 200, "seed": 0, "progress": False, **options}
    return eig_ba(model or linear_gaussian(), "y", guide=guide, **options)


def as_it_is(guide, **options):
    return fitted(guide, num_steps=0, **options)


def pair(mean, scale):
    pyro.sample("theta", dist.Normal(mean, scale).to_event(1))


def scales(start=(1.0, 1.0)):
    return param("scale", start, constraints.positive)


def exact_gaussian(observations):
    """The exact posterior at any design; nothing to learn."""
    xi = pyro.param("xi", DESIGN)
    precision = torch.diag(torch.tensor([1.0, 1.0 / 2.25])) + xi.mT @ xi
    mean = torch.linalg.solve(precision, xi.mT @ observations["y"].unsqueeze(-1)).squeeze(-1)
    pyro.sample("theta", dist.MultivariateNormal(mean, precision_matrix=precision))


def affine(observations):
    pair((pyro.param("weights", torch.zeros(2, 3)) * observations["y"].unsqueeze(-2)).sum(-1), scales())


class PlainGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, observations):
        pair(self.layer(observations["y"]), self.frozen)


class PyroGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 2)
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    def forward(self, observations):
        pair(self.layer(observations["y"]), self.scale)


# --- what is scored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_guide_scores_as_the_posterior_it_is(vectorize):
    experiment = Experiment(linear_gaussian(), "y", vectorize=vectorize)
    sample = sample_joint(experiment, 50)
    density = GuideDensity(exact_gaussian, experiment, experiment.design_values, of_targets=True, trained=False)
    expected = dist.MultivariateNormal(*exact_posterior(sample.y, DESIGN)).log_prob(sample.theta)
    assert torch.allclose(density.log_prob(sample), expected, atol=1e-4)


def test_a_guide_is_scored_in_packed_coordinates():
    def model():
        normal("y", pyro.sample("rate", dist.Gamma(2.0, 1.0)))

    def guide(observations):
        pyro.sample("rate", dist.Gamma(param("a", 2.0), 1.0).expand(observations["y"].shape))

    experiment = Experiment(model, "y")
    sample = sample_joint(experiment, 20)
    # The prior itself as guide: log q and log p agree in all coordinates.
    density = GuideDensity(guide, experiment, {}, of_targets=True)
    assert torch.allclose(density.log_prob(sample), sample.log_prior, atol=1e-5)


def test_what_was_not_measured_is_not_told():
    seen = []

    def model():
        theta = normal("theta", torch.zeros(1))
        with pyro.plate("two", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
            normal("y", theta)

    def guide(observations):
        seen.append(observations["y"])
        normal("theta", param("a", 0.5) * observations["y"].sum(-1, keepdim=True))

    fitted(guide, model)
    assert all((value[..., 1] == 0).all() and (value[..., 0] != 0).any() for value in seen)


# --- what is trained, and what is left alone ------------------------------------------------------------------------


def test_explicit_parameters_start_at_the_store_and_leave_it_alone():
    stored = scales((0.5, 2.0)).detach().clone()
    param("other", [0.0])
    before = dict(pyro.get_param_store()._params)
    assert torch.allclose(as_it_is(affine).density.values()["scale"], stored)
    assert not torch.allclose(fitted(affine).density.values()["scale"], stored, atol=0.01)
    after = pyro.get_param_store()._params
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.allclose(pyro.param("scale"), stored)


@pytest.mark.parametrize("make", [PlainGuide, PyroGuide])
def test_a_module_is_copied_and_the_copy_is_trained(make):
    guide = make()
    pyro.poutine.trace(guide).get_trace({"y": OUTCOME})  # leaves a PyroModule's own parameters in the store
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    result = fitted(guide)
    trained = result.density.guide.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    for name in ("layer.weight", "scale_unconstrained")[: 1 + (make is PyroGuide)]:
        assert not torch.equal(trained[name], before[name])
    again, third = as_it_is(result.density), as_it_is(result.density)
    assert torch.equal(again.eig, third.eig)
    assert torch.equal(again.density.guide.state_dict()["layer.weight"], trained["layer.weight"])


def test_networks_inside_a_function_are_trained_in_place():
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()

    def guide(observations):
        pyro.module("network", network)
        pair(network(observations["y"]), scales())

    result = fitted(guide)
    assert not torch.equal(network.weight, before)
    assert list(result.density.values()) == ["scale"]
    assert network.weight.grad is None
    assert list(pyro.get_param_store()) == []


def test_an_unregistered_network_is_named():
    network = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="2 tensors with requires_grad .* are not trained"):
        fitted(lambda observations: pair(network(observations["y"]), scales()))


# --- the fitted posterior -------------------------------------------------------------------------------------------


def test_the_fitted_posterior_is_a_pyro_program():
    posterior = as_it_is(exact_gaussian).density.condition_on(OUTCOME)
    draws = Predictive(linear_gaussian(), guide=posterior, num_samples=1_000)()["theta"].reshape(1_000, 2)
    mean, covariance = exact_posterior(OUTCOME, DESIGN)
    assert ((draws.mean(0) - mean).abs() / (covariance.diagonal() / 1_000).sqrt()).max() < THRESHOLD
    weighted = Importance(pyro.condition(linear_gaussian(), {"y": OUTCOME}), posterior, num_samples=20).run()
    weights = torch.stack(weighted.log_weights)
    # With the exact posterior every importance weight is the evidence.
    assert (weights - weights[0]).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:the prior of target:UserWarning")
def test_the_fitted_posterior_is_the_next_prior():
    posterior = as_it_is(exact_gaussian).density.condition_on({"y": OUTCOME})
    second = eig_nmc(Experiment(linear_gaussian(), "y", prior=posterior), num_outer_samples=4_000, seed=0)
    # Information adds up: two experiments are one with every row twice.
    exact = exact_eig(torch.cat([DESIGN, DESIGN])) - exact_eig(DESIGN)
    assert abs(second.eig - exact) < THRESHOLD * second.standard_error


def test_conditioning_over_a_batch_of_designs_needs_the_design():
    designs = torch.stack([DESIGN, 2.0 * DESIGN])
    density = as_it_is(exact_gaussian, designs={"xi": designs}).density
    with pytest.raises(ValueError, match="fitted over a batch of 'xi'"):
        density.condition_on(OUTCOME)
    node = pyro.poutine.trace(density.condition_on(OUTCOME, {"xi": designs[1]})).get_trace().nodes["theta"]
    assert torch.allclose(node["fn"].mean, exact_posterior(OUTCOME, designs[1])[0], atol=1e-4)
    with pytest.raises(ValueError, match="one experiment's shape"):
        density.condition_on(OUTCOME.expand(2, 3), {"xi": designs[1]})


# --- refusals -------------------------------------------------------------------------------------------------------


def mixing(observations):
    y = observations["y"]
    pair(param("a", 0.0) + (y - y.mean(0) if y.dim() > 1 else y)[..., :2], 1.0)


def shares():
    normal("y", pyro.sample("shares", dist.Dirichlet(torch.ones(3)))[..., 0])


def free_shares(observations):
    loc = pyro.param("loc", torch.zeros(3)).expand(*observations["y"].shape, 3)
    pyro.sample("shares", dist.Normal(loc, 1.0).to_event(1))


REFUSED = {
    "another site": (None, lambda observations: normal("eta", param("a", 0.0)), "sample the target sites"),
    "another shape": (None, lambda observations: pair(param("a", [0.0] * 3), 1.0), r"\(3,\), in the model \(2,\)"),
    "another kind": (
        finite(), lambda observations: normal("theta", param("a", 0.0)), "is continuous in the guide and discrete in"
    ),
    "nothing to learn": (None, exact_gaussian, "nothing to learn"),
    "mixes experiments": (None, mixing, "it mixes experiments"),
    "another dimension": (shares, free_shares, "3 free coordinates in the guide and 2 in the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_guides_that_do_not_fit_the_model_are_refused(name):
    model, guide, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        fitted(guide, model)

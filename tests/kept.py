"""Results of every estimator, and the numbers that can be had from them later: for tests that keep results."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_voed
from pyro_voed import Experiment, Fresh, eig_marginal

TRAINED, AS_IT_IS = Fresh(num_steps=5, batch_size=64), Fresh(num_steps=0)
QUIET = {"seed": 0, "progress": False}
DESIGNS = {"xi": torch.tensor([0.5, 2.0])}


def model():
    xi = pyro.param("xi", torch.tensor(1.0), constraint=constraints.interval(0.0, 3.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0))


def mixed():
    """Supports of several kinds, discrete targets and outcomes, and a design on the real line."""
    dose = pyro.param("dose", torch.tensor(0.3))
    kind = pyro.sample("kind", dist.Bernoulli(0.4))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Poisson(1.0 + kind + dose**2 * shares[..., 0]))


def any_arguments(*args):
    return model()


def in_rows(scale, *, shift=0.0):
    """A model with arguments, whose outcome is a set."""
    theta = pyro.sample("theta", dist.Normal(0.0, scale))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(theta + shift, 1.0))


def narrow():
    """A replaced prior."""
    pyro.sample("theta", dist.Normal(0.0, 0.5))


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.xi = PyroParam(torch.tensor(1.0))
        self.theta = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        pyro.sample("y", dist.Normal(self.xi * self.theta, 1.0))


def posterior_guide(observations):
    slope = pyro.param("slope", torch.tensor(0.3))
    spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("theta", dist.Normal(slope * observations["y"], spread))


class PosteriorGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 2)

    def forward(self, observations):
        place, scale = self.net(observations["y"].unsqueeze(-1)).unbind(-1)
        pyro.sample("theta", dist.Normal(place, scale.exp()))


def outcome_guide():
    pyro.sample("y", dist.Normal(0.0, pyro.param("spread", torch.tensor(2.0), constraint=constraints.positive)))


def of_earlier_outcome():
    """A prior that is the posterior of an earlier experiment, by a fitted guide."""
    earlier = pyro_voed.eig_ba(model, "y", guide=posterior_guide, training=TRAINED, num_samples=50, **QUIET)
    return Experiment(model, "y", prior=earlier.density.condition_on(torch.tensor(0.5)))


EXPERIMENTS = {
    "model": lambda: Experiment(model, "y"),
    "prior": lambda: Experiment(model, "y", prior=narrow),
    "prior by a guide": of_earlier_outcome,
    "one by one": lambda: Experiment(model, "y", vectorize=False),
    "mixed": lambda: Experiment(mixed, "y"),
    "arguments": lambda: Experiment(in_rows, "y", model_args=(2.0,), model_kwargs={"shift": 1.0}),
    "module": lambda: Experiment(Module(), "y"),
}


def brief_flow(designs):
    """An estimator for searches."""
    options = {"training": TRAINED, "num_samples": 50, "progress": False}
    return pyro_voed.eig_flow(model, "y", designs=designs, **options)


def learnt(estimator, argument="density", experiment="model", **options):
    """Return how a result is made, and how a kept one is asked for more: its density used as it is, on new draws."""

    def make():
        return estimator(EXPERIMENTS[experiment](), training=TRAINED, num_samples=200, **QUIET, **options)

    def again(result):
        given = {**options, argument: result.density, "designs": result.designs, "num_samples": 50}
        return estimator(result.experiment, training=AS_IT_IS, **QUIET, **given)

    return make, again


def weighed(estimator, density, **options):
    """Return the same for estimators that learn nothing, with a proposal used as it is, or none."""

    def make():
        return estimator(Experiment(model, "y"), seed=0, **density, **options)

    def again(result):
        given = dict.fromkeys(density, result.density)
        return estimator(result.experiment, designs=result.designs, seed=1, **given, **options)

    return make, again


def of_both_densities(result):
    parts = {"likelihood_density": result.density.given_targets, "marginal_density": result.density.marginal}
    return pyro_voed.eig_marginal_likelihood(
        result.experiment, designs=result.designs, training=AS_IT_IS, num_samples=50, **parts, **QUIET
    )


brief_marginal = partial(eig_marginal, training=TRAINED, num_samples=200, **QUIET)
FEW = {"num_outer_samples": 50, "num_inner_samples": 5}
CASES = {
    "flow": learnt(pyro_voed.eig_flow, references=[pyro_voed.eig_nmc, brief_marginal]),
    "flow over designs": learnt(pyro_voed.eig_flow, designs=DESIGNS),
    "flow of an ensemble": learnt(pyro_voed.eig_flow, designs=DESIGNS, ensemble=True),
    "flow of mixed targets": learnt(pyro_voed.eig_flow, experiment="mixed"),
    "flow behind a summary": learnt(pyro_voed.eig_flow, experiment="arguments"),
    "flow with a prior": learnt(pyro_voed.eig_flow, experiment="prior"),
    "flow of a module": learnt(pyro_voed.eig_flow, experiment="module"),
    "ba": learnt(pyro_voed.eig_ba, "guide", guide=posterior_guide),
    "ba with a module": learnt(pyro_voed.eig_ba, "guide", guide=PosteriorGuide()),
    "marginal": learnt(eig_marginal),
    "marginal with a guide": (
        learnt(eig_marginal, guide=outcome_guide)[0],
        learnt(eig_marginal)[1],
    ),
    "marginal likelihood": (learnt(pyro_voed.eig_marginal_likelihood)[0], of_both_densities),
    "ace": learnt(pyro_voed.eig_ace),
    "vnmc": learnt(pyro_voed.eig_vnmc, designs=DESIGNS),
    "critic": learnt(pyro_voed.eig_critic, "critic"),
    "nmc": weighed(pyro_voed.eig_nmc, {}, **FEW),
    "nmc with a Laplace proposal": weighed(pyro_voed.eig_nmc, {"proposal": pyro_voed.laplace_proposal(3, 8)}, **FEW),
    "nmc with a guide": weighed(pyro_voed.eig_nmc, {"proposal": posterior_guide}, **FEW),
    "pce": weighed(pyro_voed.eig_pce, {}, **FEW),
    "laplace": weighed(pyro_voed.eig_laplace, {}, num_samples=50),
    "lbkld": weighed(pyro_voed.eig_lbkld, {}, num_samples=1_000),
}

"""What a refusal advises: an estimator or an option that serves the model refused."""

import functools
import re

import pyro
import pyro.distributions as dist
import pytest

import pyro_voed
from pyro_voed import Fresh, eig_nmc


def experiment_on(target, outcome):
    """A model of a target, which depends on a latent site, and an outcome, which does too."""

    def model():
        latent = pyro.sample("latent", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0)) if outcome == "implicit" else 0.0
        value = {
            "computed, discrete": lambda: pyro.deterministic("target", (latent > 0).long()),
            "computed, continuous": lambda: pyro.deterministic("target", 2.0 * latent),
            "unbounded, discrete": lambda: pyro.sample("target", dist.Poisson(3.0)),
            "random": lambda: pyro.sample("target", dist.Normal(0.0, 1.0)),
            "drawn given a nuisance": lambda: pyro.sample("target", dist.Normal(latent, 1.0)),
        }[target]()
        if outcome == "implicit":
            return pyro.deterministic("y", value + latent + noise)
        return pyro.sample("y", dist.Normal(value + latent, 1.0))

    return model


TARGETS = ("computed, discrete", "computed, continuous", "unbounded, discrete", "random", "drawn given a nuisance")
KINDS = [(target, outcome) for target in TARGETS for outcome in ("explicit", "implicit")]
QUICK = {"training": Fresh(num_steps=2), "num_samples": 100}
WAYS = {
    # What a message may advise: the estimator, and its options.
    "eig_nmc": (eig_nmc, {"num_outer_samples": 100}),
    "eig_pce": (pyro_voed.eig_pce, {"num_outer_samples": 100}),
    "eig_laplace": (pyro_voed.eig_laplace, {}),
    "eig_lbkld": (pyro_voed.eig_lbkld, {}),
    "learn_prior=True": (pyro_voed.eig_flow, {**QUICK, "learn_prior": True}),
}
TRAINED = ("eig_flow", "eig_critic", "eig_marginal", "eig_ace", "eig_vnmc", "eig_marginal_likelihood")
WAYS |= {name: (getattr(pyro_voed, name), QUICK) for name in TRAINED}


@functools.cache
def refusal(name, kind):
    """What an estimator says where it does not serve, None where it does."""
    estimator, options = WAYS[name]
    try:
        estimator(experiment_on(*kind), "y", "target", seed=0, **options)
    except NotImplementedError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS, ids=", ".join)
def test_an_estimator_that_a_refusal_advises_serves(kind):
    refusals = {name: message for name in WAYS if (message := refusal(name, kind)) is not None}
    assert refusals or kind == ("random", "explicit")
    for name, message in refusals.items():
        advised = [other for other in re.findall(r"eig_\w+|learn_prior=True", message) if other in WAYS]
        assert [other for other in advised if refusal(other, kind) is None], f"{name} {kind}: {message}"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"references": [pyro_voed.eig_marginal]}, "eig_marginal"),
        ({"references": [functools.partial(pyro_voed.eig_vnmc, num_samples=10)]}, "eig_vnmc"),
    ],
)
def test_a_part_of_a_call_is_refused_under_its_own_name(part, name):
    # Under the call's name the refusal would advise the call itself.
    with pytest.raises(NotImplementedError, match=rf"^{name} needs .* \['latent'\]"):
        pyro_voed.eig_flow(experiment_on("random", "explicit"), "y", "target", **QUICK, **part)
    with pytest.raises(NotImplementedError, match=r"^certify needs .* \['y'\]"):
        pyro_voed.eig_flow(experiment_on("random", "implicit"), "y", "target", certify=True, **QUICK)

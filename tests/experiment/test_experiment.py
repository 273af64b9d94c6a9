"""What an `Experiment` finds in a model, what it refuses and how it says so, and how one is used again."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_voed import Experiment, Fresh, eig_flow, eig_nmc, eig_pce, sample_joint
from tests.experiment.cases import Z_MAX, both_ways, normal


def plain():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    return normal("y", xi * normal("theta"))


def with_data():
    theta, shift = normal("theta"), normal("shift")
    pyro.deterministic("mean", theta + shift)
    return normal("y", theta + shift, obs=torch.tensor(0.3))


# --- labels ---------------------------------------------------------------------------------------------------------


def test_default_labels_take_released_data_as_outcome_and_all_other_latents_as_targets():
    experiment = Experiment(with_data)
    assert (experiment.observation_labels, experiment.target_labels) == (("y",), ("theta", "shift"))
    assert experiment.design_labels == ()
    assert [site.name for site in experiment.others] == ["mean"]
    assert sample_joint(experiment, 50).y.std() > 0.1, "the data were not released"
    assert [site.name for site in Experiment(with_data, target_labels="theta").nuisance] == ["shift"]


def test_labels_are_taken_in_the_order_of_the_model():
    assert Experiment(with_data, "y", ("shift", "theta")).target_labels == ("theta", "shift")


def test_infer_dictionaries_of_the_model_are_left_alone():
    infer = {}
    Experiment(lambda: normal("y", normal("theta"), obs=torch.tensor(0.0), infer=infer))
    assert infer == {}


def test_model_arguments_pass_through():
    def model(design, *, scale):
        return pyro.sample("y", dist.Normal(design * normal("theta").unsqueeze(-1), scale).to_event(1))

    sample = sample_joint(Experiment(model, "y", model_args=(torch.ones(4),), model_kwargs={"scale": 1e-4}), 9)
    assert sample.y.shape == (9, 4)
    assert (sample.y - sample.theta).abs().max() < 1e-3


class OnlySamples(dist.TorchDistribution):
    arg_constraints: ClassVar = {}
    has_rsample = True

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, torch.Size(), validate_args=False)

    def rsample(self, sample_shape=()):
        return self.loc + torch.randn(torch.Size(sample_shape) + self.batch_shape)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape))


class OnlySamplesReals(OnlySamples):
    support = constraints.real


@pytest.mark.parametrize("kind", [OnlySamples, OnlySamplesReals])
def test_an_outcome_that_only_samples_is_implicit(kind):
    experiment = Experiment(lambda: pyro.sample("y", kind(normal("theta"))), "y")
    assert not experiment.is_explicit
    assert experiment.unchecked == ("y",)
    assert "vectorisation could not be checked at ['y']" in str(experiment)
    assert sample_joint(experiment, 5).y.shape == (5, 1)


def test_a_deterministic_outcome_needs_named_targets():
    def implicit():
        return pyro.deterministic("y", normal("theta") + 0.5 * normal("noise"))

    with pytest.raises(ValueError, match=r"target_labels.*\['y'\].*infinite.*'theta', 'noise'"):
        Experiment(implicit, "y")
    experiment = Experiment(implicit, "y", "theta")
    assert not experiment.is_explicit
    assert experiment.observations[0].is_deterministic


def test_history_is_refused_with_a_pointer_to_the_prior():
    def model():
        theta = normal("theta")
        normal("old", theta, obs=torch.tensor(2.0))
        return normal("y", theta, obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=r"\['old'\].*prior="):
        Experiment(model, "y")
    sample = sample_joint(Experiment(model, "y", prior=lambda: normal("theta", 3.0, 0.1)), 400)
    assert abs(sample.theta.mean() - 3.0) < Z_MAX * 0.1 / 20
    torch.testing.assert_close(sample.log_prior, dist.Normal(3.0, 0.1).log_prob(sample.theta[:, 0]))


# --- designs --------------------------------------------------------------------------------------------------------


class Module(PyroModule):
    def __init__(self, with_weights=False):
        super().__init__()
        self.xi = PyroParam(torch.tensor([0.4, 1.2]), constraint=constraints.independent(constraints.positive, 1))
        self.net = PyroModule[nn.Linear](1, 1) if with_weights else None

    def forward(self):
        theta = normal("theta").unsqueeze(-1)
        mean = self.xi * theta if self.net is None else self.xi * theta + self.net(theta)
        return pyro.sample("y", dist.Normal(mean, 1.0).to_event(1))


@pytest.mark.parametrize("local", [False, True])
def test_pyro_param_designs_are_found_under_both_settings(local):
    with pyro.settings.context(module_local_params=local):
        module, names = Module(), []
        for _ in range(2):  # the second time a stored value is read back
            (design,) = Experiment(module, "y").designs
            assert design.name == "xi"
            torch.testing.assert_close(design.value, torch.tensor([0.4, 1.2]))
            assert not design.constraint.check(torch.tensor([-1.0, 1.0]))
            assert list(pyro.get_param_store().keys()) == names
            module()
            names = [] if local else ["xi"]
        with pytest.raises(ValueError, match=r"design_labels.*weights.*net.weight"):
            Experiment(Module(with_weights=True), "y")
        assert Experiment(Module(with_weights=True), "y", design_labels="xi").design_labels == ("xi",)


def test_weights_of_a_registered_module_require_named_designs_and_stay_as_they_are():
    net = nn.Linear(1, 1)
    before = {name: (id(p), p.detach().clone()) for name, p in net.named_parameters()}

    def model(with_design=True):
        pyro.module("net", net)
        xi = pyro.param("xi", torch.tensor(0.5)) if with_design else 1.0
        return normal("y", net((xi * normal("theta")).unsqueeze(-1)).squeeze(-1))

    with pytest.raises(ValueError, match=r"design_labels.*weights.*net\$\$\$weight"):
        Experiment(model, "y")
    assert Experiment(model, "y", design_labels="xi").design_labels == ("xi",)
    assert Experiment(model, "y", model_args=(False,)).design_labels == (), "without designs nothing is to be named"
    assert list(pyro.get_param_store().keys()) == []
    for name, parameter in net.named_parameters():
        assert id(parameter) == before[name][0]
        torch.testing.assert_close(parameter.detach(), before[name][1])


def test_parameters_drawn_at_random_are_one_value_throughout():
    def model():
        xi = pyro.param("xi", lambda: torch.rand(2) + 0.5)
        gain = pyro.param("gain", lambda: torch.rand(()) + 0.5)
        theta = normal("theta")
        normal("first", gain * theta)
        pyro.sample("y", dist.Normal(xi * theta.unsqueeze(-1), 1.0).to_event(1))

    # Values that changed from run to run would make a run together disagree with single ones.
    experiment = Experiment(model, ["y", "first"], design_labels="xi")
    assert experiment.runs_together
    assert not experiment.linked_outcomes
    assert experiment.design_values["xi"].shape == (2,)


# --- what must be refused -------------------------------------------------------------------------------------------


def factor():
    theta = normal("theta")
    pyro.factor("evidence", -theta.square())
    return normal("y", theta)


def scaled():
    with poutine.scale(scale=0.5):
        theta = normal("theta")
    return normal("y", theta)


def subsampled():
    theta = normal("theta")
    with pyro.plate("data", 10, subsample_size=3):
        return normal("y", theta)


def of_target(name, distribution):
    def model():
        value = pyro.sample(name, distribution)
        return normal("y", (value.sum(-1) if distribution.event_dim else value) + normal("z"))

    return model


def integer_design():
    return normal("y", pyro.param("xi", torch.tensor(1)) * normal("theta"))


IMPROPER = of_target("theta", dist.ImproperUniform(constraints.real, (), ()))
DELTA = of_target("theta", dist.Delta(torch.tensor(1.0)))
SPHERE = of_target("direction", dist.ProjectedNormal(torch.zeros(3)))
REFUSED = {
    "factor": (factor, ("y",), ValueError, ["evidence", "factor", "sample site"]),
    "scale": (scaled, ("y",), ValueError, ["'theta'", "poutine.scale", "Remove"]),
    "subsampling": (subsampled, ("y",), ValueError, ["'data'", "subsamples 3 of 10", "without subsampling"]),
    "improper prior": (IMPROPER, ("y",), ValueError, ["'theta'", "improper", "proper distribution"]),
    "Delta target": (DELTA, ("y",), ValueError, ["'theta'", "Delta", "Leave it out"]),
    "unsupported support": (SPHERE, ("y",), NotImplementedError, ["'direction'", "no bijection", "Reparametrise"]),
    "integer design": (integer_design, ("y",), (ValueError, RuntimeError), []),
    "no outcome": (plain, (None,), ValueError, ["observation_labels", "['theta', 'y']"]),
    "unknown outcome": (plain, ("z",), ValueError, ["observation_labels", "['z']", "['theta', 'y']"]),
    "unknown target": (plain, ("y", "tehta"), ValueError, ["target_labels", "tehta", "['theta', 'y']"]),
    "overlap": (plain, ("y", ["theta", "y"]), ValueError, ["['y']", "only one"]),
    "twice": (plain, ("y", ["theta", "theta"]), ValueError, ["target_labels", "twice"]),
    "empty": (plain, ([], "theta"), ValueError, ["observation_labels", "empty"]),
    "no string": (plain, ("y", [1]), TypeError, ["target_labels"]),
    "nothing to learn": (lambda: normal("y"), ("y",), ValueError, ["target_labels", "nothing to learn"]),
    "no callable": (torch.tensor(1.0), ("y",), TypeError, ["model"]),
}


@both_ways
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_with_its_remedy(name, vectorize):
    model, labels, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        Experiment(model, *labels, vectorize=vectorize)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} missing from: {caught.value}"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"design_labels": "x"}, ValueError, r"design_labels.*\['x'\].*\['xi'\]"),
        ({"prior": 1.0}, TypeError, "prior"),
        ({"prior_entropy": float("nan")}, ValueError, "prior_entropy: expected a finite number of nats"),
    ],
)
def test_wrong_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Experiment(plain, "y", **options)


# --- how it reads, and how it is used again -------------------------------------------------------------------------


def everything():
    xi = pyro.param("xi", torch.tensor([0.5, 1.0]), constraint=constraints.positive)
    theta, shift = normal("theta"), normal("shift")
    pyro.sample("count", dist.Poisson(theta.exp()))
    pyro.deterministic("y", xi.sum(-1) * theta + shift)


def test_it_prints_what_was_found():
    experiment = Experiment(everything, ["count", "y"], "theta")
    assert repr(experiment) == "Experiment(everything, ['count', 'y'], ['theta'])"
    assert str(experiment).splitlines() == [
        "designs:  xi (2,) in GreaterThan(lower_bound=0.0)",
        "targets:  theta ()",
        "outcomes: count () (discrete), y () (deterministic)",
        "nuisance: shift ()",
        "run:      together in one outer plate",
    ]
    one_by_one = str(Experiment(with_data, vectorize=False))
    assert "designs:  none" in one_by_one
    assert "run:      one by one" in one_by_one


@pytest.mark.parametrize("estimate", [eig_nmc, eig_flow])
def test_it_is_accepted_wherever_a_model_is(estimate):
    options = {"num_outer_samples": 100} if estimate is eig_nmc else {"training": Fresh(num_steps=5)}
    experiment = Experiment(plain, "y", "theta")
    probes = experiment.num_calls
    again, direct = estimate(experiment, seed=1, **options), estimate(plain, "y", "theta", seed=1, **options)
    assert torch.equal(again.eig, direct.eig)
    assert again.target_labels == ("theta",)
    # The probes were paid for when the experiment was made.
    assert again.num_simulations == experiment.num_calls - probes < direct.num_simulations


def test_labels_that_contradict_its_own_are_refused():
    experiment = Experiment(with_data, "y", "theta")
    assert eig_pce(experiment, "y", ["theta"], num_outer_samples=50).target_labels == ("theta",)
    for labels, argument in ((("mean", None), "observation_labels"), (("y", ["theta", "shift"]), "target_labels")):
        with pytest.raises(ValueError, match=rf"{argument}: the experiment was read with .* got .* Leave the labels"):
            eig_pce(experiment, *labels, num_outer_samples=50)


@pytest.mark.parametrize("model", [plain, Module()], ids=["pyro.param", "PyroParam"])
def test_it_is_taken_at_the_design_in_the_parameter_store(model):
    experiment = Experiment(model, "y")
    first = experiment.design_values["xi"]
    model()
    pyro.get_param_store()["xi"] = 1.5 * first
    torch.testing.assert_close(Experiment(model, "y").design_values["xi"], 1.5 * first)
    result = eig_nmc(experiment, num_outer_samples=50)
    torch.testing.assert_close(result.designs["xi"], 1.5 * first)
    pyro.get_param_store()["xi"] = 0.5 * first
    torch.testing.assert_close(experiment.at_stored_designs().design_values["xi"], 0.5 * first)
    # Results, and the experiment itself, keep the design that they hold for.
    torch.testing.assert_close(result.experiment.design_values["xi"], 1.5 * first)
    torch.testing.assert_close(experiment.design_values["xi"], first)

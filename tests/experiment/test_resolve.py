"""What `resolve` finds in a model, what it refuses and how it says so, and whether it sees wrong vectorisation."""

import copy
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_voed import Experiment, sample_joint
from pyro_voed.experiment.packing import unpack_targets

Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""


def normal(name, loc=0.0, scale=1.0, **kwargs):
    return pyro.sample(name, dist.Normal(loc, scale), **kwargs)


def plain():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    theta = normal("theta")
    return normal("y", xi * theta)


def with_data():
    theta = normal("theta")
    shift = normal("shift")
    pyro.deterministic("mean", theta + shift)
    return normal("y", theta + shift, obs=torch.tensor(0.3))


# --- labels ---------------------------------------------------------------------------------------------------------


def test_default_labels_take_released_data_as_outcome_and_all_other_latents_as_targets():
    experiment = Experiment(with_data)
    assert experiment.observation_labels == ("y",)
    assert experiment.target_labels == ("theta", "shift")
    assert experiment.design_labels == ()
    assert [site.name for site in experiment.others] == ["mean"]
    draws = sample_joint(experiment, 50).y
    assert draws.std() > 0.1, "the data were not released"


def test_a_target_subset_leaves_nuisance():
    experiment = Experiment(with_data, target_labels="theta")
    assert experiment.target_labels == ("theta",)
    assert [site.name for site in experiment.nuisance] == ["shift"]


@pytest.mark.parametrize("labels", [["theta", "shift"], ("shift", "theta")])
def test_labels_are_taken_in_the_order_of_the_model(labels):
    assert Experiment(with_data, "y", labels).target_labels == ("theta", "shift")


def test_infer_dictionaries_of_the_model_are_left_alone():
    infer = {}

    def model():
        return normal("y", normal("theta"), obs=torch.tensor(0.0), infer=infer)

    Experiment(model)
    assert infer == {}


WRONG_LABELS = {
    "no outcome": ((None, None), ValueError, ["observation_labels", "['theta', 'y']"]),
    "unknown outcome": (("z", None), ValueError, ["observation_labels", "['z']", "['theta', 'y']"]),
    "unknown target": (("y", "tehta"), ValueError, ["target_labels", "tehta", "['theta', 'y']"]),
    "overlap": (("y", ["theta", "y"]), ValueError, ["['y']", "only one"]),
    "twice": (("y", ["theta", "theta"]), ValueError, ["target_labels", "twice"]),
    "empty": (([], "theta"), ValueError, ["observation_labels", "empty"]),
    "no string": (("y", [1]), TypeError, ["target_labels"]),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_refused_with_what_the_model_has(name):
    labels, error, words = WRONG_LABELS[name]
    with pytest.raises(error) as caught:
        Experiment(plain, *labels)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_design_is_refused_with_the_designs_there_are():
    with pytest.raises(ValueError, match=r"design_labels.*\['x'\].*\['xi'\]"):
        Experiment(plain, "y", design_labels="x")


def test_no_target_left_is_refused():
    with pytest.raises(ValueError, match=r"target_labels.*nothing to learn"):
        Experiment(lambda: normal("y"), "y")


def test_no_callable_is_refused():
    with pytest.raises(TypeError, match="model"):
        Experiment(torch.tensor(1.0), "y")


def implicit():
    xi = pyro.param("xi", torch.tensor(1.0))
    return pyro.deterministic("y", xi * normal("theta") + 0.5 * normal("noise"))


def test_a_deterministic_outcome_needs_named_targets():
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

    def guide():
        normal("theta", 3.0, 0.1)

    experiment = Experiment(model, "y", prior=guide)
    sample = sample_joint(experiment, 400)
    assert abs(sample.theta.mean() - 3.0) < Z_MAX * 0.1 / 20
    torch.testing.assert_close(sample.log_prior, dist.Normal(3.0, 0.1).log_prob(sample.theta[:, 0]))


# --- designs --------------------------------------------------------------------------------------------------------


class Module(PyroModule):
    def __init__(self, with_weights=False):
        super().__init__()
        self.xi = PyroParam(torch.tensor([0.4, 1.2]), constraint=constraints.independent(constraints.positive, 1))
        self.net = PyroModule[nn.Linear](1, 1) if with_weights else None

    def forward(self):
        theta = normal("theta")
        mean = self.xi * theta.unsqueeze(-1)
        if self.net is not None:
            mean = mean + self.net(theta.unsqueeze(-1))
        return pyro.sample("y", dist.Normal(mean, 1.0).to_event(1))


@pytest.mark.parametrize("local", [False, True])
def test_pyro_param_designs_are_found_under_both_settings(local):
    with pyro.settings.context(module_local_params=local):
        module = Module()
        for _ in range(2):  # the second time a stored value is read back
            (design,) = Experiment(module, "y").designs
            assert design.name == "xi"
            torch.testing.assert_close(design.value, torch.tensor([0.4, 1.2]))
            assert not design.constraint.check(torch.tensor([-1.0, 1.0]))
            assert list(pyro.get_param_store().keys()) == ([] if local else list(pyro.get_param_store().keys()))
            module()


@pytest.mark.parametrize("local", [False, True])
def test_weights_require_named_designs(local):
    with pyro.settings.context(module_local_params=local):
        module = Module(with_weights=True)
        with pytest.raises(ValueError, match=r"design_labels.*weights.*net.weight"):
            Experiment(module, "y")
        assert Experiment(module, "y", design_labels="xi").design_labels == ("xi",)


def test_weights_of_a_registered_module_require_named_designs_and_stay_as_they_are():
    net = nn.Linear(1, 1)
    before = {name: (id(p), p.detach().clone()) for name, p in net.named_parameters()}

    def model():
        pyro.module("net", net)
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = normal("theta")
        return normal("y", net((xi * theta).unsqueeze(-1)).squeeze(-1))

    with pytest.raises(ValueError, match=r"design_labels.*weights.*net\$\$\$weight"):
        Experiment(model, "y")
    assert Experiment(model, "y", design_labels="xi").design_labels == ("xi",)
    assert list(pyro.get_param_store().keys()) == []
    for name, parameter in net.named_parameters():
        assert id(parameter) == before[name][0]
        torch.testing.assert_close(parameter.detach(), before[name][1])


def test_weights_without_any_design_are_no_obstacle():
    net = nn.Linear(1, 1)

    def model():
        pyro.module("net", net)
        return normal("y", net(normal("theta").unsqueeze(-1)).squeeze(-1))

    assert Experiment(model, "y").design_labels == ()


def test_a_design_drawn_at_random_is_one_value_throughout():
    def model():
        xi = pyro.param("xi", lambda: torch.rand(2) + 0.5)
        theta = normal("theta")
        first = normal("first", theta)
        return pyro.sample("y", dist.Normal(xi * theta.unsqueeze(-1), 1.0).to_event(1)), first

    experiment = Experiment(model, ["y", "first"])
    assert not experiment.linked_outcomes
    assert experiment.design_values["xi"].shape == (2,)


def test_a_nuisance_parameter_drawn_at_random_is_one_value_throughout():
    def model():
        xi = pyro.param("xi", torch.tensor(1.0))
        gain = pyro.param("gain", lambda: torch.rand(()) + 0.5)
        return normal("y", gain * xi * normal("theta"))

    assert Experiment(model, "y", design_labels="xi").design_labels == ("xi",)


def test_the_stored_design_is_preferred_to_the_initial_one():
    plain()
    pyro.get_param_store()["xi"] = torch.tensor(1.5)
    assert Experiment(plain, "y").design_values["xi"].item() == pytest.approx(1.5)


def test_an_integer_design_is_refused():
    def model():
        xi = pyro.param("xi", torch.tensor(1))
        return normal("y", xi * normal("theta"))

    with pytest.raises((ValueError, RuntimeError), match=r"xi|[Ff]loat"):
        Experiment(model, "y")


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


def improper():
    theta = pyro.sample("theta", dist.ImproperUniform(constraints.real, (), ()))
    return normal("y", theta)


def delta_target():
    theta = pyro.sample("theta", dist.Delta(torch.tensor(1.0)))
    return normal("y", theta + normal("z"))


def on_the_sphere():
    direction = pyro.sample("direction", dist.ProjectedNormal(torch.zeros(3)))
    return normal("y", direction.sum(-1))


REFUSED = {
    "factor": (factor, {}, ValueError, ["evidence", "factor", "sample site"]),
    "scale": (scaled, {}, ValueError, ["'theta'", "poutine.scale", "Remove"]),
    "subsampling": (subsampled, {}, ValueError, ["'data'", "subsamples 3 of 10", "without subsampling"]),
    "improper prior": (improper, {}, ValueError, ["'theta'", "improper", "proper distribution"]),
    "Delta target": (delta_target, {}, ValueError, ["'theta'", "Delta", "Leave it out"]),
    "unsupported support": (on_the_sphere, {}, NotImplementedError, ["'direction'", "Reparametrise"]),
}


@pytest.mark.parametrize("name", [pytest.param(name) for name in REFUSED])
def test_what_is_refused_is_named_with_its_remedy(name):
    model, options, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        Experiment(model, "y", **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} missing from: {caught.value}"


@pytest.mark.parametrize("model", [factor, scaled, subsampled])
def test_refusals_do_not_depend_on_vectorisation(model):
    with pytest.raises(ValueError, match=r"."):
        Experiment(model, "y", vectorize=False)


# --- supports -------------------------------------------------------------------------------------------------------


def uniform_chain():
    a = pyro.sample("a", dist.Uniform(1.0, 3.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    c = pyro.sample("c", dist.Uniform(b, a + b))
    return normal("y", a + b + c)


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    return pyro.sample("y", dist.Normal(p, 1.0).to_event(1))


def positive_vector():
    rate = pyro.sample("rate", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    return pyro.sample("y", dist.Normal(rate, 1.0).to_event(1))


def cholesky():
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    return pyro.sample("y", dist.Normal(factor[..., 1:, 0], 1.0).to_event(1)), normal("z", factor[..., 2, 1])


def ordered():
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    knots = pyro.sample("knots", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    return pyro.sample("y", dist.Normal(knots, 1.0).to_event(1))


def positive_in_a_plate():
    with pyro.plate("groups", 4):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        return normal("y", rate)


def bounded_chain_in_a_plate():
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Uniform(1.0, 3.0))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        return normal("y", a + b)


def mixture():
    parts = dist.Normal(torch.tensor([-1.0, 2.0]), 0.5)
    theta = pyro.sample("theta", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
    return normal("y", theta)


SUPPORTS = {
    "dependent bounds": (uniform_chain, "y", {"a": 1, "b": 1, "c": 1}),
    "simplex": (simplex, "y", {"p": 2}),
    "positive": (positive_vector, "y", {"rate": 2}),
    "LKJ Cholesky": (cholesky, ["y", "z"], {"factor": 3}),
    "ordered": (ordered, "y", {"knots": 3}),
    "positive in a plate": (positive_in_a_plate, "y", {"rate": 4}),
    "dependent bounds in a plate": (bounded_chain_in_a_plate, "y", {"a": 3, "b": 3}),
    "mixture": (mixture, "y", {"theta": 1}),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", SUPPORTS)
def test_packed_targets_come_back_as_they_were(name, vectorize):
    model, outcomes, dims = SUPPORTS[name]
    torch.set_default_dtype(torch.float64)
    try:
        experiment = Experiment(model, outcomes, vectorize=vectorize)
        assert {site.name: site.packed_dim for site in experiment.targets} == dims
        sample = sample_joint(experiment, 6)
        assert torch.isfinite(sample.theta).all()
        values = unpack_targets(experiment, sample.theta)
        for site in dims:
            torch.testing.assert_close(values[site], sample.values[site])
        # A different point stays inside the support, wherever it is.
        moved = unpack_targets(experiment, sample.theta.roll(1, 0))
        assert all(torch.isfinite(value).all() for value in moved.values())
        if name.startswith("dependent"):
            assert (moved["b"] > 0).all()
            assert (moved["b"] < moved["a"]).all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_dependent_supports_are_found_where_they_are():
    dependent = {site.name: site.dependent_support for site in Experiment(uniform_chain, "y").targets}
    assert dependent == {"a": False, "b": True, "c": True}


def test_one_packed_point_without_batch_is_unpacked():
    experiment = Experiment(positive_vector, "y")
    torch.testing.assert_close(unpack_targets(experiment, torch.zeros(2))["rate"], torch.ones(2))


# --- masks on outcomes ----------------------------------------------------------------------------------------------

MEASURED = torch.tensor([True, False, True])


def masked_by_distribution():
    theta = normal("theta")
    return pyro.sample("y", dist.Normal(theta.unsqueeze(-1) * torch.ones(3), 1.0).mask(MEASURED).to_event(1))


def masked_by_handler_in_a_plate():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0))
    with pyro.plate("data", 3), poutine.mask(mask=MEASURED):
        return pyro.sample("y", dist.Normal(theta, 1.0))


def masked_by_distribution_in_a_plate():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0))
    with pyro.plate("data", 3):
        return pyro.sample("y", dist.Normal(theta, 1.0).mask(MEASURED))


MASKED = [
    masked_by_distribution,
    masked_by_handler_in_a_plate,
    masked_by_distribution_in_a_plate,
]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("model", MASKED, ids=lambda model: model.__name__)
def test_masked_outcome_entries_are_dropped(model, vectorize):
    experiment = Experiment(model, "y", vectorize=vectorize)
    assert experiment.y_dim == 2
    sample = sample_joint(experiment, 5, likelihood=True)
    torch.testing.assert_close(sample.y, sample.values["y"][:, MEASURED])
    expected = dist.Normal(sample.theta, 1.0).log_prob(sample.y).sum(-1)
    torch.testing.assert_close(sample.log_likelihood, expected)


# --- arguments, implicit outcomes -----------------------------------------------------------------------------------


def test_model_arguments_pass_through():
    def model(design, *, scale):
        theta = normal("theta")
        return pyro.sample("y", dist.Normal(design * theta.unsqueeze(-1), scale).to_event(1))

    experiment = Experiment(model, "y", model_args=(torch.ones(4),), model_kwargs={"scale": 1e-4})
    sample = sample_joint(experiment, 9)
    assert sample.y.shape == (9, 4)
    assert (sample.y - sample.theta).abs().max() < 1e-3


NO_SHAPE = torch.Size()


class OnlySamples(dist.TorchDistribution):
    arg_constraints: ClassVar = {}
    has_rsample = True

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, torch.Size(), validate_args=False)

    def rsample(self, sample_shape=NO_SHAPE):
        return self.loc + torch.randn(sample_shape + self.batch_shape)

    def expand(self, batch_shape, _instance=None):
        return OnlySamples(self.loc.expand(batch_shape))


class OnlySamplesReals(OnlySamples):
    support = constraints.real

    def expand(self, batch_shape, _instance=None):
        return OnlySamplesReals(self.loc.expand(batch_shape))


@pytest.mark.parametrize(
    "kind",
    [
        OnlySamples,
        OnlySamplesReals,
    ],
)
def test_an_outcome_that_only_samples_is_implicit(kind):
    experiment = Experiment(lambda: pyro.sample("y", kind(normal("theta"))), "y")
    assert not experiment.is_explicit
    assert experiment.unchecked == ("y",)
    assert sample_joint(experiment, 5).y.shape == (5, 1)


# --- a replaced prior -----------------------------------------------------------------------------------------------


def two_latents():
    theta = normal("theta")
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    return normal("y", theta + rate.sum(-1))


def conditioned():
    return poutine.condition(two_latents, data={"y": torch.tensor(1.0)})


def plain_guide():
    theta = normal("theta", 2.0, 0.5)
    pyro.sample("rate", dist.LogNormal(theta.unsqueeze(-1) * torch.ones(2), 0.3).to_event(1))


def auto_guide(kind):
    guide = kind(conditioned())
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def log_prior_of_plain(theta, guide):
    first = dist.Normal(2.0, 0.5).log_prob(theta[:, 0])
    return first + dist.Normal(theta[:, :1], 0.3).log_prob(theta[:, 1:]).sum(-1)


def log_prior_of_auto_normal(theta, guide):
    loc = torch.cat([guide.locs.theta.reshape(1), guide.locs.rate])
    scale = torch.cat([guide.scales.theta.reshape(1), guide.scales.rate])
    return dist.Normal(loc, scale).log_prob(theta).sum(-1)


def log_prior_of_auto_multivariate(theta, guide):
    return guide.get_posterior().log_prob(theta)


PRIORS = {
    "plain": (lambda: plain_guide, log_prior_of_plain),
    "AutoNormal": (lambda: auto_guide(AutoNormal), log_prior_of_auto_normal),
    "AutoMultivariateNormal": (lambda: auto_guide(AutoMultivariateNormal), log_prior_of_auto_multivariate),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_guide_replaces_simulation_and_log_prior(name, vectorize):
    make, expected = PRIORS[name]
    guide = make()
    store = list(pyro.get_param_store().keys())
    experiment = Experiment(two_latents, "y", prior=guide, vectorize=vectorize)
    sample = sample_joint(experiment, 400 if vectorize else 100, likelihood=True)
    torch.testing.assert_close(sample.log_prior, expected(sample.theta, guide).detach(), rtol=1e-4, atol=1e-4)
    # If the draws come from that density, exp(log r - log p) has mean one for any density r (here: a narrower one).
    spread, centre = 0.7 * sample.theta.std(0), sample.theta.mean(0)
    other = dist.Normal(centre, spread).log_prob(sample.theta).sum(-1)
    if name != "plain":
        ratio = (other - sample.log_prior).exp()
        assert abs(ratio.mean() - 1) < Z_MAX * ratio.std() / len(ratio) ** 0.5 + 0.05
    expected_likelihood = dist.Normal(sample.theta[:, 0] + sample.theta[:, 1:].exp().sum(-1), 1.0).log_prob(
        sample.y[:, 0]
    )
    torch.testing.assert_close(sample.log_likelihood, expected_likelihood.detach(), rtol=1e-4, atol=1e-4)
    assert list(pyro.get_param_store().keys()) == store


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal"])
def test_the_log_prior_of_a_target_subset_is_marginal_or_not_stated(name):
    guide = PRIORS[name][0]()
    experiment = Experiment(two_latents, "y", "theta", prior=guide)
    log_prior = sample_joint(experiment, 50).log_prior
    if log_prior is None:
        return  # not stated is honest
    theta = sample_joint(experiment, 50)
    if name == "AutoNormal":
        expected = dist.Normal(guide.locs.theta, guide.scales.theta).log_prob(theta.theta[:, 0])
    else:
        posterior = guide.get_posterior()
        expected = dist.Normal(posterior.loc[0], posterior.covariance_matrix[0, 0].sqrt()).log_prob(theta.theta[:, 0])
    torch.testing.assert_close(theta.log_prior, expected.detach(), rtol=1e-4, atol=1e-4)


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
    experiment = Experiment(model, "y", prior=guide)
    sample = sample_joint(experiment, 30)
    expected = dist.Normal(guide.locs.theta, guide.scales.theta).log_prob(sample.theta).sum(-1)
    torch.testing.assert_close(sample.log_prior, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_prior_guide_with_a_deterministic_target():
    def model():
        theta = normal("theta")
        square = pyro.deterministic("square", theta.square())
        return normal("y", square)

    def guide():
        normal("theta", 5.0, 0.01)

    sample = sample_joint(Experiment(model, "y", "square", prior=guide), 20)
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


def test_resolve_leaves_store_and_streams_alone():
    plain()
    leaf = pyro.get_param_store()._params["xi"]
    before, value = torch.get_rng_state(), copy.deepcopy(leaf.detach())
    Experiment(plain, "y", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert pyro.get_param_store()._params["xi"] is leaf
    assert torch.equal(leaf.detach(), value)

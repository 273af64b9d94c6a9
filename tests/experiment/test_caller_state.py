"""No action at a distance: what every public call leaves as it was, also after an error in mid-run."""

import random
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import nn

from pyro_voed import Experiment, Fresh, Pool, eig_flow, eig_marginal, eig_nmc
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.design import optimise_design

ROOT = Path(__file__).parents[2]


def model():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    gain = pyro.param("gain", torch.tensor(1.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(gain * xi * theta, 1.0))


def small_flow(dim, context_dim):
    return AffineCouplingFlow(dim, context_dim, num_transforms=1, hidden_dim=8)


def marginal_guide():
    loc = pyro.param("guide_loc", torch.tensor(0.1))
    scale = pyro.param("guide_scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("y", dist.Normal(loc, scale))


QUICK = {"training": Fresh(num_steps=10), "num_samples": 200}


def read(program=model, seed=0, **options):
    return Experiment(program, "y", design_labels="xi", seed=seed, **options)


def flow(program=model, vectorize=True, **options):
    return eig_flow(read(program, vectorize=vectorize), **{"density": small_flow, **QUICK, **options})


def marginal(program=model, **options):
    density = None if "guide" in options else small_flow
    return eig_marginal(read(program), **{"density": density, **QUICK, **options})


def nmc(program=model, vectorize=True, **options):
    return eig_nmc(read(program, vectorize=vectorize), num_outer_samples=200, **options)


def search(program=model, **options):
    return optimise_design(read(program), **{"density": small_flow, **QUICK, **options})


def with_options(call, **fixed):
    return lambda program=model, **options: call(program, **fixed, **options)


REFERENCES = [
    partial(eig_marginal, density=small_flow, **QUICK),
    partial(eig_nmc, num_outer_samples=200),
]
ESTIMATES = {
    "eig_flow": flow,
    "eig_flow with everything": with_options(flow, references=REFERENCES),
    "eig_flow on a pool": with_options(flow, training=Pool(60, max_epochs=10)),
    "eig_flow at candidates": with_options(flow, designs={"xi": torch.tensor([0.3, 1.5])}),
    "eig_marginal": marginal,
    "eig_marginal by guide": with_options(marginal, guide=marginal_guide),
    "eig_nmc": nmc,
    "optimise_design": search,
}
CALLS = ESTIMATES | {"Experiment": with_options(lambda program, seed=None: read(program, seed=seed))}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture(params=ESTIMATES)
def estimate(request):
    return ESTIMATES[request.param]


# --- what the caller has ----------------------------------------------------------------------------------------------

VALIDATION = [f"validate_{part}" for part in ("distributions_pyro", "infer", "poutine", "distributions_torch")]
FLAGS = [(True, False, True, False), (False, True, False, True)]
"""Values of Pyro's three validation flags and of torch's, which is off where zuko was imported."""


def store_contents():
    store = pyro.get_param_store()
    assert set(store._param_to_name.values()) == set(store.keys())
    return {
        name: (id(leaf), leaf.detach().tolist(), str(store._constraints[name]), leaf.grad is None, leaf.requires_grad)
        for name, leaf in store._params.items()
    }


def other_state():
    _, keys, position, *_ = numpy.random.get_state()  # noqa: NPY002
    return {
        "settings of Pyro": pyro.settings.get(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        # Python's own stream has a test of its own: beartype, which checks shapes here, draws from it at every call.
        "stream of NumPy": (keys.tolist(), position),
    }


@contextmanager
def undisturbed(flags, *, draws=1, moved=()):
    """Compare everything the caller has before and after the body.

    The store holds the model's parameters and a stranger's, the validation flags differ from one another, a handler
    stands around, and torch's stream is to advance by as many draws of a seed as stated.
    """
    model()
    pyro.param("elsewhere", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
    pyro.get_param_store()["xi"] = torch.tensor(0.8)
    torch.manual_seed(5)
    for _ in range(draws):
        torch.randint(2**31 - 1, ())
    stream = torch.get_rng_state()
    torch.manual_seed(5)
    with pyro.settings.context(**dict(zip(VALIDATION, flags, strict=True))):
        store, others = store_contents(), other_state()
        with poutine.trace() as recorder:
            yield
        assert other_state() == others
    assert list(recorder.trace.nodes) == []
    assert torch.equal(torch.get_rng_state(), stream)
    after = store_contents()
    for name in moved:  # a search leaves its best design there, in the leaf that was
        (leaf, _, *rest), (leaf_after, _, *rest_after) = store.pop(name), after.pop(name)
        assert (leaf, rest) == (leaf_after, rest_after)
    assert after == store


@pytest.mark.parametrize(("seed", "flags"), [(None, FLAGS[0]), (7, FLAGS[1])])
def test_a_call_leaves_everything_as_it_was(call, seed, flags):
    with undisturbed(flags, draws=int(seed is None), moved=["xi"] if call is search else ()):
        call(seed=seed)


def test_an_empty_store_stays_empty(call):
    call()
    assert list(pyro.get_param_store().keys()) == (["xi"] if call is search else [])


def test_no_gradient_accumulates_on_parameters_of_the_caller(call):
    net = nn.Linear(1, 1)
    weight_before = net.weight.detach().clone()

    def with_net():
        xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        pyro.module("net", net)
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(xi * theta + net(theta.unsqueeze(-1)).squeeze(-1), 1.0))

    with_net()
    call(with_net)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(net.weight.detach(), weight_before)
    assert all(leaf.grad is None for leaf in pyro.get_param_store()._params.values())


@pytest.mark.parametrize("name", ["eig_flow", "eig_marginal", "eig_marginal by guide"])
def test_a_density_given_stays_as_it_was(name):
    given = CALLS[name]().density
    kept = {name: value.clone() for name, value in given.state_dict().items()}
    again = CALLS[name.removesuffix(" by guide")](density=given).density
    assert all(torch.equal(value, kept[name]) for name, value in given.state_dict().items())
    assert any(not torch.equal(value, kept[name]) for name, value in again.state_dict().items())


def test_handlers_around_the_call_do_not_reach_the_model():
    with poutine.condition(data={"theta": torch.tensor(0.0)}):
        result = nmc()
    assert result.eig > 0.02


# --- random streams ---------------------------------------------------------------------------------------------------

PYTHON_STREAM = """
import random, runpy, sys
calls = runpy.run_path(sys.argv[1])["CALLS"]
random.seed(1)
before = random.getstate()
for name, call in calls.items():
    call()
    assert random.getstate() == before, name
print(len(calls), "calls")
"""


def test_the_stream_of_python_stays_where_it_was():
    run = [sys.executable, "-c", PYTHON_STREAM, __file__]
    finished = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == f"{len(CALLS)} calls"


def test_results_depend_on_the_seed_alone(estimate):
    first = estimate(seed=7)
    torch.rand(11)
    pyro.clear_param_store()
    with torch.no_grad():
        second = estimate(seed=7)
        assert not torch.is_grad_enabled()
    assert torch.equal(first.eig, second.eig)
    assert torch.equal(first.standard_error, second.standard_error)
    unseeded = []
    for _ in range(2):
        pyro.clear_param_store()
        unseeded.append(estimate().eig)
    assert not torch.equal(*unseeded)
    assert not torch.equal(first.eig, unseeded[0])


def test_other_streams_inside_a_model_are_seeded_too():
    def noisy():
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        noise = numpy.random.normal() + random.random()  # noqa: NPY002
        return pyro.deterministic("y", xi * theta + noise)

    experiment = Experiment(noisy, "y", "theta", vectorize=False)
    options = {"training": Fresh(num_steps=3, batch_size=8), "num_samples": 50, "seed": 3}
    assert torch.equal(*(eig_flow(experiment, **options).eig for _ in range(2)))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "0"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises((ValueError, TypeError), match="seed"):
        nmc(seed=seed)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_a_design_search_without_gradients_moves_the_design():
    with torch.no_grad():
        result = search()
    assert abs(result.designs["xi"] - 0.5) > 0.01


def test_a_double_default_gives_double_results(estimate):
    torch.set_default_dtype(torch.float64)
    try:
        result = estimate()
        assert result.eig.dtype == torch.float64
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- errors in mid-run ------------------------------------------------------------------------------------------------


class Raises:
    """A model that fails at a certain run, of one experiment or of many together."""

    def __init__(self, at):
        self.runs, self.at = 0, at

    def __call__(self):
        self.runs += 1
        if self.runs >= self.at:
            pyro.param("half_made", torch.tensor(0.0))
            random.random(), numpy.random.rand(), torch.rand(3)  # noqa: NPY002
            raise FloatingPointError("the simulator gave up")
        return model()


class Breaks(Raises):
    """A model whose outcome is not a number from some run on."""

    def __call__(self):
        self.runs += 1
        xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        broken = torch.tensor(float("nan") if self.runs >= self.at else 0.0)
        return pyro.deterministic("y", xi * theta + noise + broken)


def error_of(run, kind):
    """Run what fails, and return the error if it left everything as it was."""
    with undisturbed(FLAGS[0]), pytest.raises(kind) as caught:
        run()
    return caught.value


RAISING = {
    "the probes": lambda: read(Raises(10), seed=None),
    "eig_flow": lambda: flow(Raises(120), training=Fresh(num_steps=2_000)),
    "eig_flow one by one": lambda: flow(Raises(500), vectorize=False, training=Fresh(num_steps=500, batch_size=8)),
    "eig_marginal": lambda: marginal(Raises(120), training=Fresh(num_steps=2_000)),
    "eig_nmc one by one": lambda: nmc(Raises(150), vectorize=False),
    "optimise_design": lambda: search(Raises(120), training=Fresh(num_steps=2_000)),
}


@pytest.mark.filterwarnings("ignore:pyro.module data did not find params")
@pytest.mark.parametrize("name", RAISING)
def test_an_error_of_the_model_passes_through_and_leaves_no_trace(name):
    assert "gave up" in str(error_of(RAISING[name], (ArithmeticError, ValueError)))


def broken_flow(at, **options):
    return eig_flow(Breaks(at), "y", "theta", num_samples=200, **{"training": Fresh(num_steps=200), **options})


def broken_search(at):
    return optimise_design(Breaks(at), "y", "theta", training=Fresh(num_steps=200), num_samples=200)


@pytest.mark.filterwarnings("ignore:target theta never reaches")
@pytest.mark.parametrize("run", [broken_flow, broken_search])
@pytest.mark.parametrize(("at", "words"), [(150, ["step", "site 'y'", "256 of 256"]), (1, ["'y'"])])
def test_values_that_are_not_finite_name_site_count_and_step(run, at, words):
    message = str(error_of(lambda: run(at), ArithmeticError))
    assert [word for word in words if word not in message] == []


def test_training_goes_on_from_the_density_of_an_error():
    error = error_of(lambda: broken_flow(150), ArithmeticError)
    assert all(torch.isfinite(weight).all() for weight in error.density.parameters())
    assert broken_flow(10**9, density=error.density, training=Fresh(num_steps=100)).eig > 0.0


def test_a_search_goes_on_from_the_designs_of_an_error():
    designs = error_of(lambda: broken_search(150), ArithmeticError).designs
    assert 0.5 < designs["xi"] < 2.0


def test_an_error_inside_no_grad_leaves_no_grad():
    with torch.no_grad():
        with pytest.raises(ArithmeticError):
            flow(Raises(100), training=Fresh(num_steps=2_000))
        assert not torch.is_grad_enabled()

"""No action at a distance: what every public call leaves as it was, also after an error in mid-run."""

import random
import subprocess
import sys
from pathlib import Path

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import nn

from pyro_voed import eig_flow, eig_marginal, eig_nmc, optimise_design, resolve
from pyro_voed.densities import AffineCouplingFlow

ROOT = Path(__file__).parents[1]
NUM_STEPS = 10


def model():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    gain = pyro.param("gain", torch.tensor(1.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(gain * xi * theta, 1.0))


def small_flow(dim, context_dim):
    return AffineCouplingFlow(dim, context_dim, num_transforms=1, hidden_dim=8)


QUICK = {"num_steps": NUM_STEPS, "num_samples": 200, "design_labels": "xi"}


def flow(program=model, **options):
    return eig_flow(program, "y", **{"density": small_flow, **QUICK, **options})


def flow_with_everything(program=model, **options):
    return flow(program, marginal=True, nmc=True, **options)


def flow_on_a_pool(program=model, **options):
    return flow(program, num_steps=None, num_simulations=300, **options)


def flow_at_candidates(program=model, **options):
    return flow(program, designs={"xi": torch.tensor([0.3, 1.5])}, **options)


def marginal(program=model, **options):
    density = None if "guide" in options else small_flow
    return eig_marginal(program, "y", **{"density": density, **QUICK, **options})


def marginal_guide():
    loc = pyro.param("guide_loc", torch.tensor(0.1))
    scale = pyro.param("guide_scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("y", dist.Normal(loc, scale))


def marginal_by_guide(program=model, **options):
    return marginal(program, guide=marginal_guide, **options)


def nmc(program=model, **options):
    return eig_nmc(program, "y", design_labels="xi", num_outer_samples=200, **options)


def search(program=model, **options):
    return optimise_design(program, "y", **{"density": small_flow, **QUICK, **options})


def probe(program=model, **options):
    return resolve(program, "y", design_labels="xi", **options)


CALLS = {
    "eig_flow": flow,
    "eig_flow with everything": flow_with_everything,
    "eig_flow on a pool": flow_on_a_pool,
    "eig_flow at candidates": flow_at_candidates,
    "eig_marginal": marginal,
    "eig_marginal by guide": marginal_by_guide,
    "eig_nmc": nmc,
    "optimise_design": search,
    "resolve": probe,
}
ESTIMATES = [name for name in CALLS if name != "resolve"]


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture(params=ESTIMATES)
def estimate(request):
    return CALLS[request.param]


# --- parameter store ------------------------------------------------------------------------------------------------


def filled_store():
    """A store with the model's parameters and one of somebody else's; what must be found again."""
    model()
    pyro.param("elsewhere", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
    pyro.get_param_store()["xi"] = torch.tensor(0.8)
    return store_contents()


def store_contents():
    store = pyro.get_param_store()
    return {
        name: (id(leaf), leaf.detach().tolist(), str(store._constraints[name]), leaf.grad is None, leaf.requires_grad)
        for name, leaf in store._params.items()
    }


def test_the_store_keeps_its_very_leaves(call):
    before = filled_store()
    call()
    after = store_contents()
    if call is search:  # which leaves its best design there, in the leaf that was
        assert after["xi"][0] == before["xi"][0]
        assert after.pop("xi")[2:] == before.pop("xi")[2:]
    assert after == before
    store = pyro.get_param_store()
    assert set(store._param_to_name.values()) == set(store.keys())


def test_an_empty_store_stays_empty(call):
    call()
    assert list(pyro.get_param_store().keys()) == (["xi"] if call is search else [])


def test_an_optimiser_of_the_caller_goes_on_after_the_call(call):
    filled_store()
    leaf = pyro.param("elsewhere").unconstrained()
    optimiser = torch.optim.SGD([leaf], lr=0.1)
    call()
    pyro.param("elsewhere").sum().backward()
    optimiser.step()
    assert not torch.equal(pyro.param("elsewhere").detach(), torch.tensor([1.0, 2.0]))


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
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(net.weight.detach(), weight_before)
    assert all(leaf.grad is None for leaf in pyro.get_param_store()._params.values())


def test_a_density_given_stays_as_it_was():
    density = AffineCouplingFlow(1, 1, num_transforms=1, hidden_dim=8)
    before = {name: value.clone() for name, value in density.state_dict().items()}
    result = flow(density=density)
    assert all(torch.equal(value, before[name]) for name, value in density.state_dict().items())
    kept = {name: value.clone() for name, value in result.density.state_dict().items()}
    again = flow(density=result.density)
    assert all(torch.equal(value, kept[name]) for name, value in result.density.state_dict().items())
    assert any(not torch.equal(value, kept[name]) for name, value in again.density.state_dict().items())


def test_a_guide_density_given_stays_as_it_was():
    result = marginal_by_guide()
    kept = {name: value.clone() for name, value in result.density.state_dict().items()}
    marginal(density=result.density)
    assert all(torch.equal(value, kept[name]) for name, value in result.density.state_dict().items())


# --- random streams -------------------------------------------------------------------------------------------------


def streams():
    # Python's own stream is left out: beartype, which checks shapes in the tests, draws from it at every call.
    _, keys, position, *_ = numpy.random.get_state()  # noqa: NPY002
    return keys.tolist(), position


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
    finished = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == f"{len(CALLS)} calls"


def test_without_a_seed_the_stream_of_torch_advances_by_one_draw(call):
    others = streams()
    torch.manual_seed(5)
    torch.randint(2**31 - 1, ())
    after_one_draw = torch.get_rng_state()
    torch.manual_seed(5)
    call()
    assert torch.equal(torch.get_rng_state(), after_one_draw)
    assert streams() == others


def test_with_a_seed_no_stream_moves(call):
    others, state = streams(), torch.get_rng_state()
    call(seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert streams() == others


def test_equal_seeds_give_equal_results_wherever_the_stream_stands(estimate):
    first = estimate(seed=7)
    torch.rand(11)
    pyro.clear_param_store()
    second = estimate(seed=7)
    assert torch.equal(first.eig, second.eig)
    assert torch.equal(first.standard_error, second.standard_error)
    pyro.clear_param_store()
    assert not torch.equal(first.eig, estimate(seed=8).eig)


def test_two_calls_in_a_row_differ(estimate):
    first = estimate()
    pyro.clear_param_store()
    assert not torch.equal(first.eig, estimate().eig)


def test_numpy_inside_a_model_is_seeded_too():
    def noisy():
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        noise = numpy.random.normal() + random.random()  # noqa: NPY002
        return pyro.deterministic("y", xi * theta + noise)

    results = [
        eig_flow(
            noisy, "y", "theta", design_labels="xi", vectorize=False, num_steps=3, batch_size=8, num_samples=50, seed=3
        ).eig
        for _ in range(2)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "0"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises((ValueError, TypeError), match="seed"):
        nmc(seed=seed)


# --- modes ----------------------------------------------------------------------------------------------------------


def modes():
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.distributions.is_validation_enabled(),
        "poutine validation": pyro.poutine.is_validation_enabled(),
        "infer validation": pyro.infer.is_validation_enabled(),
    }


@pytest.mark.parametrize("validation", [True, False])
def test_modes_stay_as_they_were(call, validation):
    pyro.enable_validation(validation)
    try:
        before = modes()
        call()
        assert modes() == before
    finally:
        pyro.enable_validation(True)


def test_mixed_validation_flags_stay_as_they_were(call):
    # Importing zuko leaves torch's flag off and Pyro's on.
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        before = modes()
        call()
        assert modes() == before
    finally:
        pyro.enable_validation(True)


def test_calls_work_the_same_without_gradients(estimate):
    if estimate is search:
        return  # below
    with torch.enable_grad():
        first = estimate(seed=7)
    pyro.clear_param_store()
    with torch.no_grad():
        second = estimate(seed=7)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(first.eig, second.eig)


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


def test_handlers_around_the_call_see_nothing(call):
    with poutine.trace() as recorder:
        call()
    assert list(recorder.trace.nodes) == []


def test_conditions_around_the_call_do_not_reach_the_model():
    with poutine.condition(data={"theta": torch.tensor(0.0)}):
        result = nmc()
    assert result.eig > 0.02


# --- errors in mid-run ----------------------------------------------------------------------------------------------


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


def assert_undisturbed(run, error):
    """Run what fails, compare everything of the caller's before and after, and return the error."""
    before, now, others = filled_store(), modes(), streams()
    torch.manual_seed(5)
    torch.randint(2**31 - 1, ())
    after_one_draw = torch.get_rng_state()
    torch.manual_seed(5)
    with pytest.raises(error) as caught:
        run()
    assert store_contents() == before
    assert modes() == now
    assert streams() == others
    assert torch.equal(torch.get_rng_state(), after_one_draw)
    return caught.value


RAISING = {
    "eig_flow in the probes": lambda: flow(Raises(10)),
    "eig_flow": lambda: flow(Raises(120), num_steps=2_000),
    "eig_flow one by one": lambda: flow(Raises(1_000), vectorize=False, num_steps=500, batch_size=8),
    "eig_marginal": lambda: marginal(Raises(120), num_steps=2_000),
    "eig_nmc one by one": lambda: eig_nmc(
        Raises(1_000), "y", design_labels="xi", num_outer_samples=2_000, vectorize=False
    ),
    "optimise_design": lambda: search(Raises(120), num_steps=2_000),
}


@pytest.mark.parametrize("name", RAISING)
def test_an_error_of_the_model_passes_through_and_leaves_no_trace(name):
    with poutine.trace() as recorder:
        error = assert_undisturbed(RAISING[name], (FloatingPointError, ValueError))
    assert "gave up" in str(error)
    assert [name for name in recorder.trace.nodes if name not in ("xi", "gain", "theta", "y", "elsewhere")] == []


def broken_flow(at):
    return eig_flow(Breaks(at), "y", "theta", num_steps=200, num_samples=200)


def broken_search(at):
    return optimise_design(Breaks(at), "y", "theta", num_steps=200, num_samples=200)


@pytest.mark.parametrize("run", [broken_flow, broken_search])
def test_values_that_are_not_finite_name_site_count_and_step(run):
    error = assert_undisturbed(lambda: run(150), ArithmeticError)
    message = str(error)
    assert "step" in message
    assert "site 'y'" in message
    assert "256 of 256" in message


@pytest.mark.filterwarnings("ignore:target theta never reaches")
@pytest.mark.parametrize("run", [broken_flow, broken_search])
def test_values_that_are_never_finite_name_the_site(run):
    error = assert_undisturbed(lambda: run(1), ArithmeticError)
    assert "'y'" in str(error)


def implicit():
    return Breaks(10**9)()


def test_training_goes_on_from_the_density_of_an_error():
    error = assert_undisturbed(lambda: broken_flow(150), ArithmeticError)
    weights = list(error.density.parameters())
    assert all(torch.isfinite(weight).all() for weight in weights)
    result = eig_flow(implicit, "y", "theta", density=error.density, num_steps=100, num_samples=2_000)
    assert result.eig > 0.0


def test_search_goes_on_from_the_designs_of_an_error():
    error = assert_undisturbed(lambda: broken_search(150), ArithmeticError)
    assert torch.isfinite(error.designs["xi"])
    assert 0.5 < error.designs["xi"] < 2.0


def test_an_error_inside_no_grad_leaves_no_grad():
    with torch.no_grad():
        with pytest.raises(FloatingPointError):
            flow(Raises(100), num_steps=2_000)
        assert not torch.is_grad_enabled()

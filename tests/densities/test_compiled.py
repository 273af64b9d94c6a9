"""Laws of compiled densities: the same numbers and gradients, all else the density's own, and never a failure."""

import pickle
import shutil
import subprocess
import sys
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import eig_flow
from pyro_voed.densities import SplineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.densities.compiled import CompiledDensity
from pyro_voed.estimators import learning

THETA_DIM, CONTEXT_DIM, ROWS = 3, 2, 7


@pytest.fixture
def density():
    flow = SplineCouplingFlow(THETA_DIM, CONTEXT_DIM, num_transforms=2, hidden_dim=16)
    made = StandardisedDensity(flow, Standardise(THETA_DIM), Standardise(CONTEXT_DIM))
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made


@pytest.fixture
def short_pools(monkeypatch):
    monkeypatch.setattr(learning, "fit_pool", partial(learning.fit_pool, max_epochs=2))


@pytest.fixture
def no_compiler(monkeypatch):
    def compile_nothing(function):
        def raising(*arguments):
            raise RuntimeError("no C++ compiler\nand a long trace")

        return raising

    monkeypatch.setattr(torch, "compile", compile_nothing)


@pytest.fixture
def counted_compiler(monkeypatch):
    """A compiler that changes nothing and counts the calls of what it compiled."""
    calls = []

    def compile_unchanged(function):
        def counting(*arguments):
            calls.append(arguments)
            return function(*arguments)

        return counting

    monkeypatch.setattr(torch, "compile", compile_unchanged)
    return calls


def points():
    return torch.randn(ROWS, THETA_DIM), torch.randn(ROWS, CONTEXT_DIM)


def test_where_compiling_fails_the_density_runs_as_it_is_with_one_warning(density, no_compiler):
    theta, context = points()
    compiled = CompiledDensity(density)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler$") as caught:
        first = compiled.log_prob(theta, context)
    assert len(caught) == 1
    assert torch.equal(first, density.log_prob(theta, context))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled.log_prob(2 * theta, context), density.log_prob(2 * theta, context))


def test_an_error_without_a_message_is_named_by_its_type(density, monkeypatch):
    def compile_nothing(function):
        def raising(*arguments):
            raise NotImplementedError

        return raising

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.warns(UserWarning, match="NotImplementedError"):
        CompiledDensity(density).log_prob(*points())


def test_a_compiler_that_refuses_at_once_is_done_without(density, monkeypatch):
    def refuse(function):
        raise RuntimeError("not supported on this Python")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="not supported on this Python"):
        compiled = CompiledDensity(density)
    theta, context = points()
    assert torch.equal(compiled.log_prob(theta, context), density.log_prob(theta, context))


def test_a_compiler_that_turns_off_validation_does_so_for_nobody_else(density, monkeypatch):
    def compile_unchecked(function):
        torch.distributions.Distribution.set_default_validate_args(False)
        return function

    monkeypatch.setattr(torch, "compile", compile_unchecked)
    CompiledDensity(density)
    assert torch.distributions.Distribution._validate_args


def test_the_compiled_log_density_is_used_where_there_is_one(density, counted_compiler):
    theta, context = points()
    compiled = CompiledDensity(density)
    assert torch.equal(compiled.log_prob(theta, context), density.log_prob(theta, context))
    assert len(counted_compiler) == 1


@pytest.mark.parametrize("compiler", ["no_compiler", "counted_compiler"])
@pytest.mark.filterwarnings("ignore:compile")
def test_gradients_flow_to_the_weights_of_the_density_itself(density, compiler, request):
    request.getfixturevalue(compiler)
    theta, context = points()
    weights = list(density.parameters())
    through = torch.autograd.grad(CompiledDensity(density).log_prob(theta, context).mean(), weights)
    plain = torch.autograd.grad(density.log_prob(theta, context).mean(), weights)
    assert all(torch.equal(one, other) for one, other in zip(through, plain, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in through)


def test_a_step_of_the_weights_is_seen(density, counted_compiler):
    theta, context = points()
    compiled = CompiledDensity(density)
    before = compiled.log_prob(theta, context)
    with torch.no_grad():
        next(density.parameters()).mul_(2.0)
    after = compiled.log_prob(theta, context)
    assert torch.equal(after, density.log_prob(theta, context))
    assert not torch.equal(after, before)


def test_all_else_is_that_of_the_density(density, no_compiler):
    compiled = CompiledDensity(density)
    assert (compiled.theta_dim, compiled.context_dim, compiled.has_rsample) == (THETA_DIM, CONTEXT_DIM, True)
    assert compiled.theta_scaling is density.theta_scaling
    assert all(one is other for one, other in zip(compiled.parameters(), density.parameters(), strict=True))
    _, context = points()
    assert compiled.condition(context).sample((4,)).shape == (4, ROWS, THETA_DIM)
    assert compiled.draw(context, (ROWS,)).shape == (ROWS, THETA_DIM)
    assert torch.equal(compiled.encode(context), density.encode(context))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = compiled.nonsense


def line():
    slope = pyro.param("slope", torch.tensor(1.0))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample("y", dist.Normal(slope.unsqueeze(-1) * theta, 0.5).to_event(1))


def small_flow(theta_dim, context_dim):
    return SplineCouplingFlow(theta_dim, context_dim, num_transforms=1, hidden_dim=16)


RUNS = {
    "one design": {"num_steps": 6},
    "a design batch": {"num_steps": 6, "designs": {"slope": torch.tensor([0.5, 1.0])}},
    "an ensemble": {"num_steps": 6, "designs": {"slope": torch.tensor([0.5, 1.0])}, "ensemble": True},
    "a pool": {"num_simulations": 40},
}


def estimate(name, *, compile):
    return eig_flow(
        line, "y", "theta", density=small_flow, num_samples=100, seed=3, progress=False, compile=compile, **RUNS[name]
    )


@pytest.mark.parametrize("name", RUNS)
def test_training_without_a_compiler_is_plain_training(name, no_compiler, short_pools):
    with pytest.warns(UserWarning, match="could not be compiled") as caught:
        asked = estimate(name, compile=True)
    assert sum("could not be compiled" in str(warning.message) for warning in caught) == 1
    plain = estimate(name, compile=False)
    assert torch.equal(asked.eig, plain.eig)
    assert torch.equal(asked.standard_error, plain.standard_error)
    states = asked.density.state_dict(), plain.density.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["one design", "an ensemble"])
def test_compiling_leaves_no_trace_in_the_result(name, counted_compiler):
    result = estimate(name, compile=True)
    assert counted_compiler, "the compiled log-density was never called"
    assert type(result.density) is type(estimate(name, compile=False).density)
    assert not any(isinstance(value, CompiledDensity) for value in vars(result).values())
    copy = pickle.loads(pickle.dumps(result.density))
    assert all(torch.equal(copy.state_dict()[key], value) for key, value in result.density.state_dict().items())


# In a process of its own: the checks of shapes that the tests install cannot be traced by the compiler.
COMPILING = """
import pickle, time, warnings
import torch
from pyro_voed.densities import SplineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.densities.compiled import CompiledDensity

torch.manual_seed(0)
torch.set_num_threads(1)
# Falling back would agree without having compiled anything.
warnings.filterwarnings("error", message="compile:")
flow = SplineCouplingFlow(3, 2, num_transforms=1, hidden_dim=16)
density = StandardisedDensity(flow, Standardise(3), Standardise(2))
weights = list(density.parameters())
with torch.no_grad():
    for weight in weights:
        weight.add_(0.05 * torch.randn_like(weight))
theta, context = torch.randn(64, 3), torch.randn(64, 2)
started = time.perf_counter()
through = CompiledDensity(density).log_prob(theta, context)
gradients = torch.autograd.grad(through.mean(), weights)
print("seconds to compile:", round(time.perf_counter() - started, 1))
plain = density.log_prob(theta, context)
torch.testing.assert_close(through, plain, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(gradients, torch.autograd.grad(plain.mean(), weights), rtol=1e-3, atol=1e-4)
pickle.dumps(density)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_density_agrees_with_plain_execution():
    """Value and gradient within what float32 rounding of a few dozen fused operations leaves; see -s for the time."""
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "seconds to compile" in done.stdout

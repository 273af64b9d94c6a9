"""Calls from several threads wait for each other: Pyro has one stack of handlers and one store for all of them."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

from pyro_voed import Experiment, Fresh, eig_flow, flow_guide, flow_posterior, sample_joint
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.experiment import caller_state
from pyro_voed.experiment.caller_state import isolated

PATIENCE = 60.0
"""Seconds after which a thread that still waits is taken to wait for ever."""


def model():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta, 1.0))


def small_flow(dim, context_dim):
    return AffineCouplingFlow(dim, context_dim, num_transforms=1, hidden_dim=8)


def estimate(program=model, seed=1, num_steps=30):
    return eig_flow(program, "y", density=small_flow, training=Fresh(num_steps=num_steps), num_samples=200, seed=seed)


def at_once(*calls):
    """Run calls in a thread each, and return what they return."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=PATIENCE) for future in [pool.submit(run, call) for call in calls]]


@pytest.fixture(autouse=True)
def clean_stack():
    # The handlers that one broken test leaves would break all others.
    yield
    left = list(_PYRO_STACK)
    _PYRO_STACK.clear()
    assert left == []


def assert_free():
    """Fail where another thread cannot enter any more."""
    assert at_once(lambda: estimate(num_steps=1))[0].eig.isfinite()


def test_estimates_in_two_threads_are_those_of_one():
    alone = [estimate(seed=seed).eig for seed in (1, 2)]
    together = at_once(lambda: estimate(seed=1).eig, lambda: estimate(seed=2).eig)
    assert torch.equal(torch.stack(alone), torch.stack(together))
    assert list(pyro.get_param_store().keys()) == []


def test_a_seed_of_its_own_is_drawn_by_each_thread():
    first, second = at_once(*[lambda: estimate(seed=None).eig] * 2)
    assert not torch.equal(first, second)


def test_results_are_used_in_one_thread_while_another_estimates():
    result, outcome = estimate(), torch.tensor(1.0)
    experiment = Experiment(model, "y")

    def use():
        draws = [flow_posterior(result, outcome, 50, seed=seed).flat("theta") for seed in range(20)]
        return draws[0], flow_guide(result, outcome), sample_joint(experiment, 50)

    expected = flow_posterior(result, outcome, 50, seed=0).flat("theta")
    again, (draws, _, sample) = at_once(estimate, use)
    assert torch.equal(again.eig, result.eig)
    assert torch.equal(draws, expected)
    assert sample.y.isfinite().all()


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_an_error_lets_the_next_thread_in(error):
    def broken():
        raise error("gave up")

    with pytest.raises(error, match="gave up"):
        estimate(broken)
    assert_free()


def test_an_interrupted_training_lets_the_next_thread_in():
    runs = []

    def interrupting():
        runs.append(1)
        if len(runs) == 60:
            signal.raise_signal(signal.SIGINT)
        return model()

    assert estimate(interrupting, num_steps=1_000).history.stop_reason == "interrupted"
    assert_free()


def hold(entered, leave):
    with isolated(seed=0):
        entered.set()
        leave.wait(PATIENCE)


@pytest.fixture
def occupied():
    """Another thread inside a call until the event is set."""
    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(entered, leave))
    thread.start()
    entered.wait(PATIENCE)
    yield leave
    leave.set()
    thread.join(PATIENCE)


@pytest.mark.filterwarnings("ignore:.*waits for a call in another thread")
def test_ctrl_c_ends_the_waiting(occupied):
    heard = threading.Event()

    def press():
        # One that falls into a finaliser is lost, as everywhere in Python, so it is pressed until it is heard.
        while not heard.wait(1.0):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            estimate()
    finally:
        heard.set()
    occupied.set()
    assert_free()


def test_long_waiting_is_told_and_goes_on(occupied, monkeypatch):
    monkeypatch.setattr(caller_state, "PATIENCE", 0.05)
    threading.Timer(0.3, occupied.set).start()
    with pytest.warns(UserWarning, match="waits for a call in another thread"):
        result = estimate(num_steps=1)
    assert result.eig.isfinite()

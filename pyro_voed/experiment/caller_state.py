"""What a call may not change: the caller's parameter store, random streams, modes and defaults.

`isolated` is entered once by every public function. Inside it Pyro programs run freely; on the way out, also after
an error, the caller finds the parameter store as it was, the same leaf tensors under the same names; default dtype,
gradient mode and Pyro's settings; and the random generators of torch (CPU and CUDA), NumPy and Python, except that
`seed=None` draws one seed from torch's global stream first. Two calls in a row are therefore independent, and an equal
`seed` gives an equal result. A caller's own trace does not record our runs.

All of this is one for the whole process, Pyro's stack of handlers too, which two threads cannot share. So calls from
several threads wait for each other. A thread that runs Pyro itself, a guide made by `flow_guide` say, must not do so
during a call in another thread.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import pyro
import torch
from pyro import poutine

from pyro_voed.checks import warn

PATIENCE = 30.0
"""Seconds before a thread that waits for another says so."""

_one_thread = threading.RLock()


@contextmanager
def isolated(seed: int | None) -> Iterator[int]:
    """Run the body on a stream of its own and give the caller back everything it had; yield the seed in use."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ValueError(f"seed: expected None or an integer in [0, 2**32), got {seed!r}.")
    with param_store_kept():
        if seed is None:
            seed = int(torch.randint(2**31 - 1, ()).item())
        with _random_streams_kept(), modes_kept(), poutine.block():
            pyro.set_rng_seed(seed)
            yield seed


@contextmanager
def param_store_kept() -> Iterator[None]:
    """Put the parameter store back as it was, the same leaves under the same names; meanwhile other threads wait."""
    _tell_of_waiting()
    with _one_thread:
        store = pyro.get_param_store()
        # The store's own get_state() strips attributes off the live tensors, so its three dictionaries are copied as
        # they are; put back, they hold the very leaves that a caller's optimiser holds.
        tables = store._params, store._param_to_name, store._constraints
        kept = [dict(table) for table in tables]
        try:
            yield
        finally:
            for table, before in zip(tables, kept, strict=True):
                table.clear()
                table.update(before)


def _tell_of_waiting() -> None:
    if _one_thread.acquire(timeout=PATIENCE):
        _one_thread.release()
    else:
        warn(
            f"{threading.current_thread().name} waits for a call in another thread to end: Pyro has one stack of "
            "handlers for all threads. If that call in turn waits for this one, neither ends. Use processes to "
            "estimate in parallel."
        )


@contextmanager
def common_stream(seed: int) -> Iterator[None]:
    """Run the body on the random streams of a seed, and give the surrounding code its own streams back.

    Two bodies with one seed see equal random numbers; what follows them does not.
    """
    with _random_streams_kept():
        # Where CUDA is not in use, torch.manual_seed takes down a stack trace for the day it will be: 1.6 ms a call.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        numpy.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        yield


@contextmanager
def _random_streams_kept() -> Iterator[None]:
    # Simulators written in NumPy often draw from its global stream, so that is kept too.
    python_state, numpy_state = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def modes_kept() -> Iterator[None]:
    """Put the default dtype, the grad mode and Pyro's settings back on exit, also after an error."""
    # Among the settings are four flags of validation, which need not agree: importing zuko turns one of them off.
    dtype, grad, settings = torch.get_default_dtype(), torch.is_grad_enabled(), pyro.settings.get()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        pyro.settings.set(**settings)

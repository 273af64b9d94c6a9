"""The conditions every test and every doctest runs under: shapes checked, one thread, a fixed seed, a clean Pyro."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parent / "pyro_voed"
INNER = {"experiment", "densities", "summaries", "training", "bounds", "monte_carlo"}
"""What runs in every step of training: checks of shapes take half of its time, so only its own tests have them."""

# Must come before anything imports the package, or what is imported earlier goes unchecked.
parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
checked = parts if os.environ.get("PYRO_VOED_CHECKED") == "all" else parts - INNER
install_import_hook([f"pyro_voed.{part}" for part in sorted(checked - {"__init__"})], "beartype.beartype")

import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

SEED = 20240607


class Surroundings:
    """Fixtures for every test, the package's doctests included.

    Fixtures defined in a conftest module reach only the tests of its folder; those of a registered plugin reach all.
    """

    @pytest.fixture(autouse=True)
    def clean_process(self):
        # Some libraries switch validation off when they are imported, which collecting the tests does.
        pyro.enable_validation(True)
        pyro.clear_param_store()
        pyro.set_rng_seed(SEED)
        before = process_state()
        yield
        after = process_state()
        restore(before)
        pyro.clear_param_store()
        assert after == before, "the test left the process in another state than it found it in"


def pytest_configure(config):
    # With two threads on two contended cores tiny operations took 10 to 70 times longer.
    torch.set_num_threads(1)
    config.pluginmanager.register(Surroundings(), "pyro_voed_surroundings")


def process_state():
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro distributions validation": pyro.distributions.is_validation_enabled(),
        "pyro inference validation": pyro.infer.is_validation_enabled(),
        "pyro poutine validation": pyro.poutine.is_validation_enabled(),
        "threads": torch.get_num_threads(),
    }


def restore(state):
    """Keep a test that leaks from failing the tests after it."""
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["grad mode"])
    torch.set_num_threads(state["threads"])

"""The checks at the door, and where warnings point."""

import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_voed
from pyro_voed import Fresh, checks, eig_critic, eig_flow, eig_lbkld, flow_posterior
from pyro_voed.design import optimise_design, search_grid

PACKAGE = Path(pyro_voed.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
QUICK = {"training": Fresh(num_steps=5), "num_samples": 100}
# Small models warn of more than what is looked at.
pytestmark = pytest.mark.filterwarnings("ignore:target .* never reaches|the model does not take one:UserWarning")

# --- warnings ---------------------------------------------------------------------------------------------------------


def test_warnings_go_through_one_helper():
    # Counted stack levels point elsewhere with every wrapper in between.
    assert [path.name for path in FILES if "stacklevel" in path.read_text()] == []
    assert [path.name for path in FILES if "warnings.warn" in path.read_text()] == ["checks.py"]


LAYERS = """
from contextlib import contextmanager
import torch
from pyro_voed.checks import warn

@contextmanager
def around():
    yield
    warn("look here", FutureWarning)

@torch.no_grad()
def layer():
    with around():
        pass

class Layers(torch.nn.Module):
    def forward(self):
        layer()
"""


def test_a_warning_points_to_the_first_line_outside_the_package():
    namespace = {"__name__": "pyro_voed.layers"}
    exec(compile(LAYERS, str(PACKAGE / "layers.py"), "exec"), namespace)
    module = namespace["Layers"]()
    with pytest.warns(FutureWarning, match="look here") as caught:
        module()  # by way of torch's wrappers and contextlib's
    assert caught[0].filename == __file__
    assert "module()" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


def test_warnings_obey_filters_by_module():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=__name__.replace(".", r"\."))
        checks.warn("ignored")


def bounded():
    xi = pyro.param("xi", torch.tensor([0.5, 0.0]), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0).to_event(1))


def idle():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("idle", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta, 0.01))


def crowded():
    xi = pyro.param("xi", torch.tensor(1.0))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    return pyro.sample("y", dist.Normal(xi * theta, 1.0).to_event(1))


def extrapolated():
    result = eig_flow(bounded, "y", **QUICK)
    flow_posterior(result, torch.tensor([50.0, 0.0]), 10)


def on_a_grid():
    search_grid(lambda designs: eig_lbkld(crowded, "y", designs=designs, num_samples=1_000), {"xi": torch.rand(2)})


WARNING_CALLS = {
    "never reaches the outcome": lambda: eig_flow(idle, "y", **QUICK),
    "nudged inside": lambda: optimise_design(bounded, "y", **QUICK),
    "outside the range": extrapolated,
    "12 dimensions": lambda: eig_lbkld(crowded, "y", num_samples=1_000),
    "12 dimensions.*degrade": on_a_grid,
    "cannot exceed": lambda: eig_critic(idle, "y", "theta", training=Fresh(num_steps=200), num_samples=200),
}


@pytest.mark.parametrize("words", WARNING_CALLS)
def test_warnings_of_public_calls_point_to_the_call(words):
    with pytest.warns(UserWarning, match=words) as caught:
        WARNING_CALLS[words]()
    assert {warning.filename for warning in caught} == {__file__}

"""Misused candidate designs: an error names the argument, what was expected, what came, and what to do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_voed import Experiment, eig_nmc
from pyro_voed.experiment.sites import given_designs

INF, NAN = float("inf"), float("nan")


def clinic():
    time = pyro.param("time", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
    shift = pyro.param("shift", torch.tensor(0.0))
    split = pyro.param("split", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(theta.unsqueeze(-1) * time * split + shift.unsqueeze(-1), 1.0).to_event(1))


MISUSED_DESIGNS = {
    # What is given as designs: the kind of error, and words that it must hold.
    "tensor": (torch.ones(3, 2), TypeError, ["designs: expected a dict", "'time'", "Tensor of shape (3, 2)"]),
    "string": ("time", TypeError, ["designs: expected a dict", "'time'", "got 'time'"]),
    "list": ([1.0, 2.0], TypeError, ["designs: expected a dict", "[1.0, 2.0]"]),
    "unknown label": ({"times": ["a"]}, ValueError, ["no design called ['times']", "'time'"]),
    "strings": ({"time": ["a"]}, TypeError, ["designs['time']: expected numbers", "(*batch, 2)", "['a']"]),
    "string value": ({"time": "noon"}, TypeError, ["designs['time']: expected numbers", "'noon'"]),
    "nothing": ({"time": None}, TypeError, ["designs['time']: expected numbers", "None", "Leave a design out"]),
    "ragged": ({"time": [[1.0, 2.0], [3.0]]}, TypeError, ["designs['time']: expected numbers", "[[1.0, 2.0], [3.0]]"]),
    "shape": ({"time": torch.ones(4, 3)}, ValueError, ["designs['time']: expected shape (*batch, 2)", "(4, 3)"]),
    "negative": (
        {"time": [[1.0, -2.5]]},
        ValueError,
        ["designs['time']", "GreaterThan", "1 of 2", "-2.5", "Stay inside"],
    ),
    "not a number": ({"time": [1.0, NAN]}, ValueError, ["designs['time']: expected finite", "nan in 1 of 2"]),
    "infinite": ({"shift": [0.0, INF, -INF]}, ValueError, ["designs['shift']: expected finite", "inf in 2 of 3"]),
    "simplex": ({"split": [[0.5, 0.5], [0.5, 0.6]]}, ValueError, ["designs['split']", "Simplex", "[0.5, 0.6]"]),
    "batches": (
        {"time": torch.ones(3, 2), "shift": torch.ones(4)},
        ValueError,
        ["one batch shape for all", "'time': (3,)", "'shift': (4,)", "Give each label"],
    ),
}


@pytest.mark.parametrize("name", MISUSED_DESIGNS)
def test_misused_designs(name):
    given, kind, words = MISUSED_DESIGNS[name]
    experiment = Experiment(clinic, "y")
    # At the door that all calls go through: public functions have their types checked by the tests before it.
    with pytest.raises(kind) as caught:
        given_designs(experiment.designs, given)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []


def test_misused_designs_are_refused_before_anything_is_simulated():
    experiment = Experiment(clinic, "y")
    spent = experiment.num_calls
    with pytest.raises(ValueError, match="violates its constraint"):
        eig_nmc(experiment, designs={"time": -torch.ones(3, 2)})
    assert experiment.num_calls == spent

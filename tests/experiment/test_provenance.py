"""What the record of a run says of where values flow, and that programs do not notice being watched."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment
from pyro_voed.experiment.provenance import Provenance


def written_in_place(n):
    room = torch.zeros(2)
    room[0] = n
    return room


def written_into_a_view(n):
    room = torch.zeros(2)
    room[1:].add_(n)
    return room


def written_where(n):
    room = torch.zeros(2)
    room[torch.stack([n, -n]) > 9.0] = 1.0
    return room


CARRY = {
    "a branch that is not taken": lambda n: 5.0 * (n > 9.0),
    "a choice": lambda n: torch.where(n > 9.0, torch.ones(()), torch.zeros(())),
    "a detached value": lambda n: n.detach().clone(),
    "a stack": lambda n: torch.stack([torch.zeros(()), n]),
    "an element": lambda n: torch.ones(3)[n.abs().long().clamp(max=2)],
    "an unbound part": lambda n: torch.stack([n, n]).unbind()[1],
    "a filled tensor": lambda n: torch.zeros(2).fill_(n),
    "the data of a new tensor": lambda n: torch.zeros(2).new_full((2,), n),
    "a result written to": lambda n: torch.add(n, 1.0, out=torch.empty(())),
    "a value that is multiplied by zero": lambda n: 0.0 * n,
    "a tensor written in place": written_in_place,
    "a tensor written through a view": written_into_a_view,
    "a tensor written where a mask says": written_where,
}
CARRY_NOTHING = {
    "a shape": lambda n: torch.zeros_like(n),
    "a type": lambda n: torch.ones(2).to(n),
    "a new tensor": lambda n: n.new_ones(3),
    "an expanded constant": lambda n: torch.ones(()).expand_as(n),
    "a constant broadcast beside it": lambda n: torch.broadcast_tensors(n, torch.ones(2))[1],
    "a number that left torch": lambda n: torch.tensor(n.item()),
    "an array": lambda n: torch.from_numpy(n.numpy()[None].copy()),
}


@pytest.mark.parametrize(
    ("flow", "names"),
    [
        *(pytest.param(flow, {"n"}, id=name) for name, flow in CARRY.items()),
        *(pytest.param(flow, set(), id=name) for name, flow in CARRY_NOTHING.items()),
    ],
)
def test_what_a_result_carries(flow, names):
    value, record = torch.tensor(0.3), Provenance()
    with record:
        record.begin(value, "n")
        result = flow(value)
    assert record.carried(result) == names
    assert type(result) is torch.Tensor


def refuses_to_be_watched(n):
    if torch._C._len_torch_function_stack():
        raise RuntimeError("only plain runs, please")
    return n


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n):
        return 2.0 * n


def on_a_default_device(n):
    with torch.device("cpu"):
        return n + torch.zeros(2)


HARD_TO_WATCH = {
    "a refusal": refuses_to_be_watched,
    "a mapped function": torch.vmap(lambda n: 2.0 * n),
    "a function with its own gradient": Doubled.apply,
    "a default device": on_a_default_device,
}


@pytest.mark.parametrize("name", HARD_TO_WATCH)
def test_programs_that_are_hard_to_watch_are_asked_by_intervention(name):
    def model():
        n = pyro.sample("n", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        theta = pyro.sample("theta", dist.Normal(HARD_TO_WATCH[name](n), 1.0).to_event(1))
        return pyro.sample("y", dist.Normal(theta, 1.0).to_event(1))

    assert Experiment(model, "y", "theta").leaking_nuisance == {"theta": "n"}

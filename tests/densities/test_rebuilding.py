"""A module that is copied, pickled, or saved as plain data and rebuilt gives the same numbers, to the bit."""

import copy
import functools
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from pyro_voed.densities import AffineCouplingFlow, MixedDensity, SplineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.densities.critics import StandardisedCritic
from pyro_voed.densities.rebuilding import describe, rebuild
from pyro_voed.summaries import ComposedSummary, DeepSetSummary
from tests.densities import cases
from tests.densities.cases import ARCHITECTURES, CONTEXT_DIM, MEMBERS, randomised
from tests.summaries.cases import DIM, SUMMARIES

MODULES = {
    **{name: functools.partial(make, 2) for name, make in cases.REAL.items()},
    **cases.DISCRETE,
    "stacked": cases.stacked,
    "a member of a stack": lambda: cases.stacked().member(1),
    **{name: functools.partial(make, 2, CONTEXT_DIM) for name, make in ARCHITECTURES.items()},
    **{f"{name}, standardised": functools.partial(cases.critic, make) for name, make in ARCHITECTURES.items()},
    **SUMMARIES,
    "scaling": lambda: cases.scalings(2)[1],
    "layers": lambda: nn.Sequential(nn.Linear(DIM, 6, bias=False), nn.LayerNorm(6), nn.GELU("tanh"), nn.Flatten()),
    "convolutions": lambda: nn.Sequential(nn.Unflatten(-1, (2, 12)), nn.Conv1d(2, 3, 5), nn.ELU(0.5)),
}
GIVEN = {"zuko": cases.zuko_flow, "pyro": cases.pyro_flow}
"""Densities of other libraries are given anew, as they were to the estimator."""

# Pyro's base distribution stays in the precision in which it was made, here double.
DTYPES = [torch.float32, torch.float64]
PAIRS = [(name, dtype) for name in MODULES for dtype in DTYPES if (name, dtype) != ("pyro", torch.float32)]


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def saved(module, given=None):
    description, state = through_a_file((describe(module), module.state_dict()))
    again = rebuild(description, given)
    again.load_state_dict(state)
    return again


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def numbers(module, dtype=torch.float32):
    """Everything that a module computes, at fixed inputs; draws from a fixed seed."""
    torch.manual_seed(0)
    normal = functools.partial(torch.randn, dtype=dtype)
    if hasattr(module, "draw"):
        context = normal(5, MEMBERS, CONTEXT_DIM) if hasattr(module, "num_members") else normal(5, CONTEXT_DIM)
        drawn = module.condition(context).sample()
        return drawn, module.log_prob(drawn, context)
    if isinstance(module, (StandardisedCritic, *ARCHITECTURES.values())):
        theta, context = normal(3, 2), normal(4, CONTEXT_DIM)
        return module(theta, context), getattr(module, "log_baseline", torch.zeros_like)(context)
    return (module(normal(6, CONTEXT_DIM if isinstance(module, Standardise) else DIM)),)


def assert_equal(one, other, dtype=torch.float32):
    assert all(map(torch.equal, numbers(one, dtype), numbers(other, dtype)))


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_the_same_numbers(name, dtype):
    module, given = randomised(MODULES[name](), dtype=dtype), {"density": GIVEN.get(name)}
    before = numbers(module, dtype)
    for twin in (copy.deepcopy(module), pickled(module), saved(module, given), saved(saved(module, given), given)):
        assert_equal(twin, module, dtype)
        assert twin.state_dict().keys() == module.state_dict().keys()
        randomised(twin, 1.0, dtype)  # which leaves the module alone
    assert all(map(torch.equal, numbers(module, dtype), before))


def bare(density):
    return StandardisedDensity(density, *cases.scalings(2))


@pytest.mark.parametrize("make", [lambda: bare(cases.affine(2)), cases.stacked], ids=["affine", "stacked"])
def test_the_same_with_new_scales_and_ever_after(make):
    density = make()
    members = (MEMBERS,) if hasattr(density, "num_members") else ()
    theta, context = torch.randn(200, *members, 2), 5.0 * torch.randn(200, *members, CONTEXT_DIM) + 2.0
    density.fit_scales_(theta, context)
    twin = saved(density)
    assert_equal(twin, density)
    for one in (twin, density):
        one.fit_scales_(theta, context + 1.0)
    assert_equal(twin, density)
    if members:
        assert_equal(twin.select([2, 0, 1]), density.select([2, 0, 1]))


def assert_plain(value):
    assert type(value) in (dict, list, str, int, float, bool, type(None), torch.Tensor)
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_plain(entry)


@pytest.mark.parametrize("name", MODULES)
def test_descriptions_are_plain_and_leave_the_random_stream_alone(name):
    module, before = MODULES[name](), torch.get_rng_state()
    assert_plain(description := describe(module))
    rebuild(description, {"density": GIVEN.get(name)})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [lambda it: it, lambda it: it.expand((4, 5)), lambda it: it.to_event(1)])
def test_conditioned_densities_pickle(change):
    conditioned = change(cases.standardised(2).condition(torch.randn(5, CONTEXT_DIM)))
    again, value = pickled(conditioned), conditioned.sample()
    assert torch.equal(again.log_prob(value), conditioned.log_prob(value))
    assert again.batch_shape == conditioned.batch_shape


def test_modes_and_frozen_weights_are_kept():
    density = cases.standardised(2).eval()
    density.summary.requires_grad_(False)
    again = saved(density)
    assert not any(part.training for part in again.modules())
    assert [weight.requires_grad for weight in again.parameters()] == [w.requires_grad for w in density.parameters()]


class Wave(nn.Module):
    """A user's activation, and a summary without weights."""

    def forward(self, x):
        return x.sin()


@pytest.mark.parametrize(
    "flow",
    [
        AffineCouplingFlow(2, CONTEXT_DIM, activation=nn.ReLU),
        AffineCouplingFlow(2, CONTEXT_DIM, activation=lambda: nn.LeakyReLU(0.3)),
        AffineCouplingFlow(2, CONTEXT_DIM, activation=functools.partial(nn.ELU, alpha=0.5)),
        AffineCouplingFlow(2, CONTEXT_DIM, activation=Wave),
        SplineCouplingFlow(2, CONTEXT_DIM, bound=np.float64(4.0)),
    ],
    ids=["class", "lambda", "partial", "user's", "a number of NumPy"],
)
def test_arguments_of_other_kinds_are_kept(flow):
    assert_equal(pickled(randomised(flow)), flow)
    assert_equal(saved(saved(flow, {"activation": Wave}), {"activation": Wave}), flow)


class OwnFlow(AffineCouplingFlow):
    """A user's subclass, whose constructor takes something else."""

    def __init__(self, size=8):
        super().__init__(2, CONTEXT_DIM, hidden_dim=size)


def behind(summary):
    return StandardisedDensity(cases.affine(2), *cases.scalings(2), summary)


def composed():
    return ComposedSummary([DeepSetSummary(1, 2), Wave()], [torch.arange(2), torch.arange(2, 3)], 3, "waves")


def mixed_with_zuko():
    return MixedDensity(cases.classifier(), cases.zuko_flow(1, CONTEXT_DIM + 5), torch.tensor([True, False, True]))


FOREIGN = {
    "a factory": (lambda: bare(cases.zuko_flow(2)), "density", cases.zuko_flow),
    "a module": (lambda: bare(cases.zuko_flow(2)), "density", cases.zuko_flow(2)),
    "a subclass": (lambda: bare(OwnFlow()), "density", OwnFlow()),
    "behind a classifier": (mixed_with_zuko, "density", cases.zuko_flow),
    "a summary": (lambda: behind(Wave()), "summary", Wave()),
    "a part of a summary": (composed, "parts.1", Wave()),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_modules_are_given(name):
    make, argument, given = FOREIGN[name]
    module = randomised(make())
    again = saved(module, {argument: given})
    assert module.state_dict().keys() == again.state_dict().keys()
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match=rf"{argument}: expected a .*(NICE|OwnFlow|Wave), got nothing.*load\(\.\.\., "):
        rebuild(describe(module))

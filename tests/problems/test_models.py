"""Laws every ready model obeys: batches of latents and of designs give what single runs give, and leave no residue."""

import pyro
import pytest
import torch
from pyro import poutine

from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten, regression

MODELS = {
    "linear_gaussian": linear_gaussian.linear_gaussian,
    "dependent_nuisance": linear_gaussian.dependent_nuisance,
    "finite": finite.finite,
    "implicit_toy": implicit_toy.implicit_toy,
    "implicit_pair": implicit_toy.implicit_pair,
    "michaelis_menten": michaelis_menten.michaelis_menten,
    "regression": regression.regression,
}
WITH_DESIGN = [name for name in MODELS if name != "dependent_nuisance"]

# Odd and unlike any event size, so that a batch dimension cannot pass for one.
NUM_RUNS = 11


def trace_batch(model):
    """Trace runs of a model under an outer plate, with a design of its own for every run."""
    single = poutine.trace(model).get_trace()
    values = {}
    for name in single.param_nodes:
        design = single.nodes[name]["value"].detach()
        values[name] = design * torch.empty(NUM_RUNS, *design.shape).uniform_(0.5, 1.0)
    with poutine.substitute(data=values), pyro.plate("runs", NUM_RUNS, dim=-1):
        return values, poutine.trace(model).get_trace()


def replay_run(model, values, batch, run):
    """Run the model once at the design and latents of one run of a batch."""
    latents = {name: batch.nodes[name]["value"][run] for name in batch.stochastic_nodes if name != "runs"}
    with poutine.substitute(data={name: value[run] for name, value in values.items()}):
        return poutine.trace(poutine.condition(model, data=latents)).get_trace()


@pytest.mark.parametrize("name", MODELS)
def test_batched_runs_agree_with_single_runs(name):
    model = MODELS[name]()
    values, batch = trace_batch(model)
    batch.compute_log_prob()
    for run in range(NUM_RUNS):
        single = replay_run(model, values, batch, run)
        single.compute_log_prob()
        for site in single.stochastic_nodes + single.observation_nodes:
            torch.testing.assert_close(batch.nodes[site]["value"][run], single.nodes[site]["value"])
            torch.testing.assert_close(batch.nodes[site]["log_prob"][run], single.nodes[site]["log_prob"])


@pytest.mark.parametrize("name", WITH_DESIGN)
def test_design_is_the_only_parameter_and_has_a_gradient_where_the_outcome_does(name):
    outcome = MODELS[name]()()
    assert list(pyro.get_param_store().keys()) == ["xi"]
    if outcome.requires_grad:
        outcome.sum().backward()
        assert pyro.param("xi").unconstrained().grad.isfinite().all()
    else:
        assert name == "finite"

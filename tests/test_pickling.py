"""Laws of pickling: what comes back gives the same numbers, to the bit, and what cannot go says so."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import (
    Experiment,
    Fresh,
    amortise_eig,
    certify,
    eig_ba,
    eig_flow,
    flow_guide,
    flow_posterior,
    sample_joint,
)
from pyro_voed.design import optimise_design
from tests import kept
from tests.kept import CASES, EXPERIMENTS, QUIET, TRAINED


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def seeded(draw):
    pyro.set_rng_seed(4)
    return draw()


def assert_same(one, other):
    """Two estimates are the same but for the time that they took."""
    assert torch.equal(one.eig, other.eig)
    assert torch.equal(one.standard_error, other.standard_error)
    assert repr(one) == repr(other)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_simulates_the_same(name):
    experiment = EXPERIMENTS[name]()
    twin = pickled(experiment)
    assert str(twin) == str(experiment)
    one, other = (seeded(lambda own=own: sample_joint(own, 7, likelihood=True)) for own in (experiment, twin))
    for field in ("theta", "y", "log_prior", "log_likelihood"):
        assert torch.equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("local", [False, True])
def test_a_module_and_its_experiment_stay_one(local):
    with pyro.settings.context(module_local_params=local):
        module = kept.Module()
        twin, experiment = pickled((module, Experiment(module, "y")))
        assert experiment.model is twin
        best = optimise_design(experiment, training=Fresh(num_steps=3), num_samples=50, **QUIET)
        assert torch.equal(twin.xi, best.designs["xi"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:the Laplace approximation is doubtful")
def test_a_result_gives_the_same(name):
    make, again = CASES[name]
    result = make()
    twin = pickled(result)
    assert str(twin) == str(result)
    assert_same(twin, result)
    assert_same(again(twin), again(result))


def test_what_follows_from_a_result_is_the_same():
    result = eig_flow(kept.model, "y", training=TRAINED, num_samples=200, **QUIET)
    sure = certify(result, width=1.0, seed=1)
    assert torch.equal(pickled(sure).interval, sure.interval)
    assert torch.equal(certify(pickled(result), width=1.0, seed=1).interval, sure.interval)
    outcome = torch.tensor(0.5)
    posterior = flow_posterior(result, outcome, 20, seed=2)
    assert torch.equal(flow_posterior(pickled(result), outcome, 20, seed=2).matrix(), posterior.matrix())
    assert torch.equal(pickled(posterior).matrix(), posterior.matrix())
    assert pickled(posterior).inference_data.posterior.equals(posterior.inference_data.posterior)


def test_a_guide_keeps_its_weights_and_shares_them_with_no_other():
    result = eig_flow(kept.model, "y", training=TRAINED, num_samples=200, **QUIET)
    guide = flow_guide(result, torch.tensor(0.5))
    guide()  # which ties its weights to the parameter store
    twin = pickled(guide)
    assert torch.equal(seeded(guide)["theta"], seeded(twin)["theta"])
    assert twin.name != guide.name
    with torch.no_grad():
        next(twin.density.parameters()).add_(1.0)
    assert not torch.equal(next(twin.density.parameters()), next(guide.density.parameters()))


def test_an_amortised_result_answers_the_same():
    amortised = amortise_eig(kept.model, "y", training=TRAINED, **QUIET)
    twin = pickled(amortised)
    assert str(twin) == str(amortised)
    for designs in (None, {"xi": torch.tensor([0.2, 1.0, 2.5])}):
        assert_same(*(own.at(designs, num_samples=50, seed=1) for own in (amortised, twin)))


def test_a_search_gives_the_same():
    best = optimise_design(kept.model, "y", training=Fresh(num_steps=5), num_samples=50, **QUIET)
    twin = pickled(best)
    assert str(twin) == str(best)
    assert torch.equal(twin.path["xi"], best.path["xi"])
    outcome = torch.tensor(0.5)
    assert torch.equal(*(flow_posterior(own, outcome, 20, seed=2).matrix() for own in (best, twin)))


# --- what cannot be pickled -----------------------------------------------------------------------------------------


def test_models_and_guides_inside_functions_are_refused():
    def inside():
        return kept.model()

    def guide(observations):
        kept.posterior_guide(observations)

    for what, experiment in {
        "model": Experiment(inside, "y"),
        "prior": Experiment(kept.model, "y", prior=lambda: kept.narrow()),
        "model_args": Experiment(kept.any_arguments, "y", model_args=(lambda: None,)),
    }.items():
        with pytest.raises(pickle.PicklingError, match=rf"{what}: expected what can be pickled, .*pyro_voed.save"):
            pickle.dumps(experiment)
    result = eig_ba(kept.model, "y", guide=guide, training=TRAINED, num_samples=50, **QUIET)
    with pytest.raises(pickle.PicklingError, match="guide: expected what can be pickled"):
        pickle.dumps(result)


NET = torch.nn.Linear(1, 1)


def with_network(observations):
    place = pyro.module("net", NET)(observations["y"].unsqueeze(-1)).squeeze(-1)
    pyro.sample("theta", dist.Normal(place, 1.0))


def test_a_guide_that_trains_networks_elsewhere_is_refused():
    result = eig_ba(kept.model, "y", guide=with_network, training=TRAINED, num_samples=50, **QUIET)
    with pytest.raises(pickle.PicklingError, match=r"with_network trains networks in place.*PyroModule"):
        pickle.dumps(result)

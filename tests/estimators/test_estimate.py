"""The laws of the driver, which hold for every estimator: what is checked, counted and drawn."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Fresh, eig_flow, eig_marginal, eig_nmc
from pyro_voed.estimators.estimate import Terms, estimate
from tests.closed_forms import gain_eig, scaled
from tests.estimators.cases import ESTIMATORS, FEW, MOMENT, NOISE, PAIR, chain

# Trained for a moment on few draws, estimators have reason to warn.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CALLS = {name: call for name, (call, _) in ESTIMATORS.items()}
DRIVEN = [name for name in CALLS if name not in ("certify", "amortise_eig")]
"""Those that are one call of the driver."""


# --- what a result says ---------------------------------------------------------------------------------------------


def ask(terms, then=lambda result: result, designs=None):
    question = (scaled, "y", "theta", designs, 0)
    return estimate(question, lambda experiment, candidates: terms, name="mine", bound="lower", then=then)


def test_the_estimate_is_the_mean_of_the_terms_and_its_error_that_of_a_mean():
    values = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    result = ask(Terms(values), designs={"xi": PAIR})
    assert result.eig.tolist() == [2.0, 1.0]
    torch.testing.assert_close(result.standard_error, values.std(0) / 3**0.5)
    assert (result.bound, result.estimator, result.num_samples) == ("lower", "mine", 3)
    torch.testing.assert_close(result.designs, {"xi": PAIR})


def test_terms_may_state_their_own_error_number_and_side():
    error = torch.tensor(0.5)
    result = ask(Terms(torch.ones(1), standard_error=error, num_samples=40, bound="neither"))
    assert (result.standard_error, result.num_samples, result.bound) == (error, 40, "neither")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_terms_that_are_not_finite_are_an_error_and_counted(bad):
    with pytest.raises(ArithmeticError, match=r"mine: 2 of 6 terms are not finite"):
        ask(Terms(torch.tensor([0.0, bad, 1.0, 2.0, bad, 3.0])))


def test_what_is_added_within_the_call_is_paid_by_it():
    plain = ask(Terms(torch.ones(3)))
    added = ask(Terms(torch.ones(3)), lambda result: eig_nmc(result.experiment, **FEW) and result)
    assert added.num_simulations == plain.num_simulations + FEW["num_outer_samples"]
    assert added.seconds > 0


def test_sites_are_told_by_their_roles():
    result = eig_nmc(chain(NOISE), "y", "theta", **FEW)
    assert (result.target_labels, result.observation_labels, result.nuisance_labels) == (("theta",), ("y",), ("u",))
    assert result.experiment.target_labels == ("theta",)
    assert (result.learned, result.certificate, result.references) == (None, None, ())


# --- what is counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRIVEN)
def test_the_simulations_stated_are_those_made_within_the_call(name):
    simulated = []

    def model():
        xi = pyro.param("xi", torch.tensor(1.5))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        simulated.append(theta.numel())
        pyro.sample("y", dist.Normal(xi * theta, 1.0))

    # The probes of a model are made, and paid for, within the call; those of an experiment were made before.
    for call in ((model, "y"), (experiment := Experiment(model, "y"),), (experiment,)):
        before = sum(simulated)
        assert CALLS[name](*call, seed=0).num_simulations == sum(simulated) - before


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_equal_seeds_give_equal_results_from_a_model_and_its_experiment(name):
    # The probes have a stream of their own, whose seed is drawn for an experiment too.
    experiment, state = Experiment(scaled, "y"), torch.get_rng_state()
    first = CALLS[name](scaled, "y", "theta", seed=1)
    again, other = (CALLS[name](experiment, seed=seed) for seed in (1, 2))
    assert torch.equal(first.eig, again.eig)
    assert torch.equal(first.standard_error, again.standard_error)
    assert (first.eig != other.eig).all()
    assert torch.equal(torch.get_rng_state(), state) or name == "certify"  # whose certificate has no seed here


def test_without_a_seed_the_callers_stream_advances_by_one_draw():
    state = torch.get_rng_state()
    first, second = (eig_nmc(scaled, "y", **FEW) for _ in range(2))
    assert first.eig != second.eig
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    seed = int(torch.randint(2**31 - 1, ()))
    torch.randint(2**31 - 1, ())
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(eig_nmc(scaled, "y", seed=seed, **FEW).eig, first.eig)


@pytest.mark.parametrize("name", ["eig_nmc", "eig_nmc(proposal=...)", "eig_pce", "eig_lbkld", "eig_laplace"])
def test_designs_share_their_random_numbers(name):
    result = CALLS[name](scaled, "y", designs={"xi": torch.tensor([0.7, 0.7, 1.4])}, seed=0)
    assert result.eig[0] == result.eig[1] != result.eig[2]


# --- what is checked, before the model is simulated in bulk ---------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_labels_that_contradict_an_experiment_are_refused(name):
    experiment = Experiment(scaled, "y", "theta")
    probes = experiment.num_calls
    for labels, argument in ((("z",), "observation_labels"), (("y", ["theta", "z"]), "target_labels")):
        with pytest.raises(ValueError, match=rf"{argument}: the experiment was read with .* got .* Leave the labels"):
            CALLS[name](experiment, *labels)
    assert experiment.num_calls == probes


def never():
    raise AssertionError("the model was run before the arguments were checked")


SIZE = dict.fromkeys(["eig_nmc", "eig_nmc(proposal=...)", "eig_pce"], "num_outer_samples")


@pytest.mark.parametrize("name", CALLS)
def test_too_few_samples_are_refused_before_the_model_is_run(name):
    size = SIZE.get(name, "num_samples")
    with pytest.raises(ValueError, match=rf"{size}: expected at least \d+, got 1"):
        CALLS[name](scaled if name == "amortise_eig" else never, "y", **{size: 1})


def test_an_experiment_brings_its_own_prior():
    narrow = Experiment(scaled, "y", "theta", prior=lambda: pyro.sample("theta", dist.Normal(0.0, 0.1)))
    wide, known = eig_flow(scaled, "y", "theta", seed=0, **MOMENT), eig_flow(narrow, seed=0, **MOMENT)
    # Untrained but for two steps, a flow starts at the linear posterior, here the exact one.
    assert abs(wide.eig - gain_eig(0.5)) < 0.5
    assert abs(known.eig - gain_eig(0.05)) < 0.1


# --- designs side by side -------------------------------------------------------------------------------------------

SIDE_BY_SIDE = {
    "eig_flow": lambda designs: eig_flow(scaled, "y", designs=designs, density=None, **BRIEF),
    "eig_marginal": lambda designs: eig_marginal(scaled, "y", designs=designs, **BRIEF),
    "eig_marginal, dequantised": lambda designs: eig_marginal(counts, "y", designs=designs, dequantise=True, **BRIEF),
    "eig_nmc": lambda designs: eig_nmc(scaled, "y", designs=designs, num_outer_samples=200, seed=0),
}
BRIEF = {"training": Fresh(num_steps=2), "num_samples": 200, "seed": 0, "progress": False}


def counts():
    xi = pyro.param("xi", torch.tensor(0.5), constraint=pyro.distributions.constraints.interval(0.0, 2.0))
    pyro.sample("y", dist.Poisson(xi * pyro.sample("theta", dist.Gamma(9.0, 3.0))))


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_equal_designs_of_a_batch_have_equal_estimates(name):
    xi = torch.tensor([[0.5, 1.5, 0.5], [1.5, 1.0, 0.5]])
    result = SIDE_BY_SIDE[name]({"xi": xi})
    same = xi.flatten() == xi.flatten().unsqueeze(-1)
    eig, errors = result.eig.flatten(), result.difference_error
    torch.testing.assert_close(eig.expand(6, 6)[same], eig.unsqueeze(-1).expand(6, 6)[same], rtol=0, atol=1e-5)
    assert (errors[same] < 1e-5).all()
    assert (errors[~same] > 1e-4).all()


def test_on_common_random_numbers_differences_are_sharp():
    designs = {"xi": torch.tensor([1.0, 1.01, 0.2, 0.6, 1.1, 1.5, 1.7])}
    result = eig_flow(scaled, "y", designs=designs, **{**BRIEF, "num_samples": 1_000})
    assert result.difference_error[0, 1] < 0.05 * result.standard_error[0]

"""What `eig_flow` takes, refuses and says beside its bound, and how near it comes when trained to the end."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed import Experiment, Fresh, barber_agakov, eig_flow, eig_marginal, eig_nmc, sample_joint
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.problems import implicit_toy, michaelis_menten, nonlinear
from tests.estimators.cases import AGREE, BRIEF, CASES, KINDS, SIDE, computed_target, estimate, on_its_side, small_flow

SHORT = {"training": Fresh(num_steps=20), "num_samples": 500, "seed": 0}
GAUSSIAN = CASES["linear_gaussian"]


# --- densities and summaries given ------------------------------------------------------------------------------------

small_affine = functools.partial(AffineCouplingFlow, num_transforms=1, hidden_dim=16)


@pytest.mark.parametrize("density", [small_affine, small_affine(2, 3)], ids=["factory", "density"])
def test_a_density_of_the_users(density):
    on_its_side(estimate("flow", GAUSSIAN, density=density, training=Fresh(num_steps=60)), GAUSSIAN.exact, 0.15)


def test_a_summary_of_the_users_is_trained_in_a_copy():
    summary = torch.nn.Linear(3, 2)
    before = summary.weight.detach().clone()
    on_its_side(estimate("flow", GAUSSIAN, summary=summary), GAUSSIAN.exact, 0.15)
    assert torch.equal(summary.weight, before)


def test_training_goes_on_from_an_earlier_result():
    # With a start at the linear posterior, only a problem far from linear has something to go on with.
    settings = {"training": Fresh(num_steps=100), "num_samples": 5_000}
    poor = eig_flow(nonlinear.nonlinear(0.9), "y", density=small_flow, seed=0, **settings)
    better = eig_flow(nonlinear.nonlinear(0.9), "y", density=poor.density, seed=1, **settings)
    # Means of 20 steps have a standard error of .02; a start over would make them equal.
    assert better.history.bound[:20].mean() > poor.history.bound[:20].mean() + 0.2
    assert better.eig > poor.eig


def test_a_density_of_other_dimensions_is_refused():
    trained = estimate("flow", CASES["scalar"], training=Fresh(num_steps=2))
    with pytest.raises(ValueError, match="density: expected one of 2 dimensions"):
        estimate("flow", GAUSSIAN, density=trained.density)


# --- references, and what else is said --------------------------------------------------------------------------------


def test_one_call_brings_both_sides_and_a_reference():
    result = estimate("flow", GAUSSIAN, references=[functools.partial(eig_marginal, training=BRIEF), eig_nmc])
    for bound in (result, *result.references):
        on_its_side(bound, GAUSSIAN.exact)
    assert [other.estimator for other in result.references] == ["eig_marginal", "eig_nmc"]
    assert result.num_simulations > sum(other.num_simulations for other in result.references)
    assert str(result).count("nats (") == 3


def test_the_objective_gives_the_terms_that_the_estimate_averages():
    result = estimate("flow", CASES["scalar"])
    with torch.no_grad():
        terms = barber_agakov(sample_joint(result.experiment, 4_000), result.density)
    error = torch.hypot(terms.std() / math.sqrt(4_000), result.standard_error)
    assert abs(terms.mean() - result.eig) <= AGREE * error
    assert barber_agakov.bound == "lower"


@pytest.mark.parametrize("estimator", [eig_flow, eig_marginal])
def test_a_budget_spent_is_told_in_words_that_hold_for_either_side(estimator):
    result = estimator(CASES["scalar"].model, "y", **SHORT)
    assert result.history.stop_reason == "budget"
    assert "still improving" in str(result)
    assert "rising" not in str(result)


def test_constant_targets_and_outcomes_are_warned_of():
    def model():
        theta = pyro.sample("theta", dist.Normal(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 1e-8])).to_event(1))
        pyro.sample("y", dist.Normal(theta.sum(-1), 1.0))
        pyro.sample("z", dist.Normal(theta[..., 0] * 0 + 7.0, 1e-7))

    with pytest.warns(UserWarning, match="constant") as caught:
        eig_flow(model, ["y", "z"], training=Fresh(num_steps=2), num_samples=50)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "theta[1]" in messages
    assert "outcome z" in messages


# --- refusals ---------------------------------------------------------------------------------------------------------

PARTS = {"certify": {"certify": True}, "marginal": {"references": [eig_marginal]}, "nmc": {"references": [eig_nmc]}}


@pytest.mark.parametrize(
    ("kind", "part"),
    [*(("implicit", part) for part in PARTS), ("nuisance", "marginal")],
)
def test_what_a_part_of_the_call_needs_is_refused_before_training(kind, part):
    experiment = Experiment(KINDS[kind][0], "y", "theta")
    probes = experiment.num_calls
    with pytest.raises(NotImplementedError):
        eig_flow(experiment, **PARTS[part], **SHORT)
    assert experiment.num_calls == probes


def endless_targets():
    count = pyro.sample("count", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(count, 1.0))


REFUSED = {
    "endless discrete targets": (endless_targets, "count", r"\['count'\] are discrete.*eig_nmc"),
    "a computed target": (computed_target, "total", r"total.*prior_entropy=.*learn_prior=True"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_no_flow_can_stand_for_are_refused_with_the_remedies(name):
    model, target, words = REFUSED[name]
    with pytest.raises(NotImplementedError, match=words):
        eig_flow(model, "y", target, **SHORT)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gap_on_linear_gaussian_is_small(seed):
    result = eig_flow(GAUSSIAN.model, "y", "theta", seed=seed, num_samples=100_000)
    assert result.history.converged
    assert result.eig <= GAUSSIAN.exact + SIDE * result.standard_error
    assert GAUSSIAN.exact - result.eig <= 0.02 + 2 * result.standard_error


@pytest.mark.slow
@pytest.mark.parametrize("design", [0.1, 1.0, 1.9])
def test_the_gap_on_the_implicit_toy_is_small(design):
    exact = implicit_toy.exact_eig(torch.tensor(design)).item()
    result = eig_flow(implicit_toy.implicit_toy(design), "y", "theta", seed=0, num_samples=100_000)
    assert exact - 0.03 - 2 * result.standard_error <= result.eig <= exact + SIDE * result.standard_error


@pytest.mark.slow
def test_michaelis_menten_at_the_start_lies_between_its_bounds():
    model = michaelis_menten.michaelis_menten(michaelis_menten.START_DESIGNS)
    result = eig_flow(model, "y", "theta", references=[eig_marginal, eig_nmc], seed=0)
    exact, error = michaelis_menten.START_EIG, michaelis_menten.START_STANDARD_ERROR
    for bound, sign in zip((result, *result.references), (1, -1, -1), strict=True):
        assert sign * (bound.eig - exact) <= SIDE * math.hypot(bound.standard_error, error)
    assert exact - result.eig <= 0.03 + 2 * result.standard_error

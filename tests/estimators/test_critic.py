"""Critic bounds: exact answers with the optimal critic, sides and gaps after training.

Estimates come with a standard error from 40 independent batches, so the distance from the truth is Student's t with 39
degrees of freedom: 4 standard errors to one side happen with probability 1.4e-4, 4.5 to either with 6e-5. About
35 comparisons are made, so that a fresh set of seeds fails fewer than 5 times in 1,000; the seeds are fixed besides.
"""

import functools
import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_voed import Fresh, Pool, critic_objective, eig_critic
from pyro_voed.bounds.critic import donsker_varadhan, info_nce, nwj, tuba
from pyro_voed.densities import Standardise
from pyro_voed.densities.critics import JointCritic, SeparableCritic, StandardisedCritic
from pyro_voed.problems import finite, implicit_toy, linear_gaussian
from tests.closed_forms import check_bounds
from tests.estimators.cases import independent, normal

EITHER_SIDE = 4.5
EVALUATION = {"num_samples": 8_000, "evaluation_batch_size": 200, "progress": False}
GAP = 0.05
AS_IT_IS = Fresh(num_steps=0)

TERMS = {"info_nce": info_nce, "nwj": nwj, "tuba": tuba}
SMALL = {"prior_scales": (0.7, 1.0)}  # 0.749 nats
MODELS = {
    "linear_gaussian": (
        linear_gaussian.linear_gaussian(**SMALL),
        linear_gaussian.exact_eig(torch.tensor(linear_gaussian.DEFAULT_DESIGN), **SMALL),
    ),
    "implicit_toy": (implicit_toy.implicit_toy(), implicit_toy.DEFAULT_EIG),
    "finite": (finite.finite(), finite.DEFAULT_EIG),
}


def trained(model, *, num_steps=130, batch_size=128, **options):
    training = Fresh(num_steps=num_steps, batch_size=batch_size, learning_rate=5e-3)
    return eig_critic(model, "y", "theta", **{"training": training, **EVALUATION, **options})


def check_lower(result, exact, gap=GAP):
    assert result.bound == "lower"
    check_bounds(result, exact, gap)


def test_sides_are_declared():
    assert [critic_objective(terms).bound for terms in TERMS.values()] == ["lower"] * 3
    assert critic_objective(donsker_varadhan).bound == "neither"


# --- the optimal critic gives the truth -----------------------------------------------------------------------------


def gaussian_channel(scale=1.0):
    normal("y", normal("theta", 0.0, scale))


class OptimalCritic(nn.Module):
    """log p(y given theta) / p(y) of the Gaussian channel, plus a constant."""

    def __init__(self, constant, scale):
        super().__init__()
        self.constant, self.marginal = constant, dist.Normal(0.0, math.sqrt(1.0 + scale**2))

    def forward(self, theta, context):
        theta, y = theta.reshape(1, -1), context.reshape(-1, 1)
        scores = dist.Normal(theta, 1.0).log_prob(y) - self.marginal.log_prob(y) + self.constant
        return scores.reshape(y.shape[0], theta.shape[1], *context.shape[1:-1])  # one design


def optimal_critic(constant, scale=1.0):
    return StandardisedCritic(OptimalCritic(constant, scale), Standardise(1), Standardise(1))


# The best baseline of TUBA is the average exp(score), here 1, which a critic without baseline has.
@pytest.mark.parametrize(("terms", "constant"), [(info_nce, 0.0), (nwj, 1.0), (donsker_varadhan, 0.5)])
def test_the_optimal_critic_gives_the_exact_information(terms, constant):
    sizes = {"num_samples": 16_000, "evaluation_batch_size": 400, "seed": 1}
    critic = optimal_critic(constant)
    result = eig_critic(gaussian_channel, "y", terms=terms, critic=critic, training=AS_IT_IS, **sizes)
    # At 400 pairs the batch's own bias is about 1/800.
    assert abs(result.eig - 0.5 * math.log(2.0)) < EITHER_SIDE * result.standard_error + 1 / 800


@pytest.mark.slow
def test_standard_errors_are_those_of_repeats():
    # 40 repeats give their spread to within 11 %; 4.5 times that is 0.5.
    critic = StandardisedCritic(SeparableCritic(1, 1), Standardise(1), Standardise(1))
    options = {"terms": nwj, "critic": critic, "training": AS_IT_IS, "num_samples": 1_000, "evaluation_batch_size": 25}
    repeats = [eig_critic(gaussian_channel, "y", seed=seed, **options) for seed in range(40)]
    spread = torch.stack([result.eig for result in repeats]).std()
    stated = torch.stack([result.standard_error for result in repeats]).mean()
    assert 0.5 < stated / spread < 1.5


# --- laws after training --------------------------------------------------------------------------------------------

QUICK = [("info_nce", "linear_gaussian"), ("info_nce", "implicit_toy"), ("nwj", "linear_gaussian"), ("nwj", "finite")]
QUICK += [("tuba", "linear_gaussian")]
SLOW = [pair for pair in itertools.product(TERMS, MODELS) if pair not in QUICK]


@pytest.mark.parametrize(("terms", "model"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_lower_bounds_lie_below_the_truth_and_close(terms, model):
    program, exact = MODELS[model]
    result = trained(program, terms=TERMS[terms], seed=2)
    check_lower(result, exact)
    if terms == "info_nce":
        assert result.weights is None
    else:
        assert result.weights.passed
        assert result.weights.effective_sample_size > 1_000


def test_donsker_varadhan_claims_no_side():
    program, exact = MODELS["linear_gaussian"]
    result = trained(program, terms=donsker_varadhan, seed=3)
    assert result.bound == "neither"
    assert result.weights.passed is None
    assert abs(result.eig - exact) < GAP + EITHER_SIDE * result.standard_error


def small_joint(theta_dim, context_dim):
    return JointCritic(theta_dim, context_dim, hidden_dim=32)


DESIGNS = torch.tensor([[0.2, 0.6], [1.0, 1.6]])
BRIEF = {"num_steps": 150, "batch_size": 64, "evaluation_batch_size": 50, "num_samples": 2_000}
LAWS = {
    # What is learned of nothing is noise, which costs the bound little and gains it nothing.
    **{f"independence, {name}": ((independent, 0.0), 0.01, {"terms": TERMS[name], "seed": 4}) for name in TERMS},
    "a nuisance that the target is given": (
        (linear_gaussian.dependent_nuisance(), linear_gaussian.DEPENDENT_NUISANCE_EIG), GAP, {"seed": 5}
    ),
    "a joint critic and a summary": (
        MODELS["linear_gaussian"], 3 * GAP, {"critic": small_joint, "summary": nn.Linear(3, 2), "seed": 6, **BRIEF}
    ),
    "candidate designs": (
        (implicit_toy.implicit_toy(), implicit_toy.exact_eig(DESIGNS)), 3 * GAP,
        {"designs": {"xi": DESIGNS}, "seed": 7, **BRIEF},
    ),
    "a pool": (
        MODELS["finite"], GAP, {"terms": nwj, "training": Pool(1_001, learning_rate=3e-3, max_epochs=20), "seed": 8}
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:target .* never reaches the outcome")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith(("info_nce", "tuba"))) for name in LAWS]
)
def test_other_critics_and_models_keep_the_law(name):
    (program, exact), gap, options = LAWS[name]
    result = trained(program, **options)
    assert result.eig.shape == torch.as_tensor(exact).shape
    check_lower(result, exact, gap)
    assert (result.history.validation is None) is (name != "a pool")


def test_info_nce_saturates_at_the_logarithm_of_the_batch_and_says_so():
    program = linear_gaussian.linear_gaussian(noise_scale=0.01)  # exact: 9.96 nats
    with pytest.warns(UserWarning, match=r"cannot exceed 3\.91 nats with 50 pairs"):
        result = trained(program, num_steps=100, evaluation_batch_size=50, seed=9)
    assert math.log(50) - 0.5 < result.eig <= math.log(50)


def test_nwj_at_large_information_is_not_certified():
    # The best critic at 11.5 nats: of 1.6 million product pairs some 20 look like joint ones.
    options = {"terms": nwj, "critic": optimal_critic(1.0, 100_000.0), "training": AS_IT_IS, "seed": 10}
    with pytest.warns(UserWarning, match="effective sample size"):
        result = eig_critic(functools.partial(gaussian_channel, 100_000.0), "y", **options, **EVALUATION)
    assert result.weights.passed is False
    assert result.weights.effective_sample_size < 100


# --- at the door ----------------------------------------------------------------------------------------------------


def gaussian_pair():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(theta, 1.0).to_event(1))


class PairCritic(nn.Module):
    """Scores pairs row by row, not all of them."""

    def __init__(self, theta_dim, context_dim):
        super().__init__()

    def forward(self, theta, context):
        return theta[:1].sum(-1) + context[:1].sum(-1)


def test_a_trained_critic_can_be_used_again():
    program, _ = MODELS["finite"]
    few = {"num_samples": 400, "evaluation_batch_size": 20}
    first = trained(program, num_steps=20, seed=12, **few)
    again = eig_critic(program, "y", "theta", critic=first.density, training=AS_IT_IS, seed=13, **few)
    assert again.history is None
    with pytest.raises(ValueError, match="no baseline"):
        eig_critic(program, "y", "theta", critic=first.density, terms=tuba)
    with pytest.raises(ValueError, match="trained for another model"):
        eig_critic(gaussian_pair, "y", "theta", critic=first.density)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"evaluation_batch_size": 600, "num_samples": 1_000}, "at most half"),
        ({"evaluation_batch_size": 1}, "at least 2"),
        ({"critic": PairCritic}, "scores of all pairs"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        eig_critic(gaussian_pair, "y", **wrong)


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(MODELS["finite"][0], terms=nwj, num_steps=50, seed=14)

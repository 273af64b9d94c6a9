"""Critic bounds: closed forms on tiny matrices, exact answers with the optimal critic, sides and gaps after training.

Estimates come with a standard error from 40 independent batches, so the distance from the truth is Student's t with 39
degrees of freedom: 4 standard errors to one side happen with probability 1.4e-4, 4.5 to either with 6e-5. About
35 comparisons are made, so that a fresh set of seeds fails fewer than 5 times in 1,000; the seeds are fixed besides.
"""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_voed.bounds.critic import (
    donsker_varadhan,
    donsker_varadhan_terms,
    info_nce,
    info_nce_terms,
    nwj,
    nwj_terms,
    tuba,
    tuba_terms,
)
from pyro_voed.densities import Standardise
from pyro_voed.densities.critics import JointCritic, SeparableCritic, StandardisedCritic
from pyro_voed.estimators.critic import critic_objective, eig_critic
from pyro_voed.problems import finite, implicit_toy, linear_gaussian
from pyro_voed.results import EIGResult

SIDE, EITHER_SIDE = 4.0, 4.5
EVALUATION = {"num_samples": 8_000, "evaluation_batch_size": 200}
TRAINING = {"num_steps": 200, "batch_size": 128, "learning_rate": 5e-3, "progress": False} | EVALUATION
GAP = 0.05

TERMS = {"info_nce": info_nce, "nwj": nwj, "tuba": tuba}
SMALL_SCALES = (0.7, 1.0)
SMALL_EIG = linear_gaussian.exact_eig(
    torch.tensor(linear_gaussian.DEFAULT_DESIGN), prior_scales=SMALL_SCALES
).item()  # 0.749
MODELS = {
    "linear_gaussian": (linear_gaussian.linear_gaussian(prior_scales=SMALL_SCALES), SMALL_EIG),
    "implicit_toy": (implicit_toy.implicit_toy(), implicit_toy.DEFAULT_EIG),
    "finite": (finite.finite(), finite.DEFAULT_EIG),
}


# --- terms ----------------------------------------------------------------------------------------------------------

SCORES = torch.tensor([[2.0, 0.5], [-1.0, 1.0]], dtype=torch.double)


def test_terms_on_a_two_by_two_matrix():
    expected = [2 - math.log((math.exp(2) + math.exp(0.5)) / 2), 1 - math.log((math.exp(-1) + math.exp(1)) / 2)]
    assert info_nce_terms(SCORES).tolist() == pytest.approx(expected)
    assert nwj_terms(SCORES).tolist() == pytest.approx([2 - math.exp(0.5 - 1), 1 - math.exp(-1 - 1)])
    log_product = math.log((math.exp(0.5) + math.exp(-1)) / 2)
    assert donsker_varadhan_terms(SCORES).tolist() == pytest.approx([2 - log_product, 1 - log_product])
    log_baseline = torch.tensor([0.3, -0.2], dtype=torch.double)
    expected = [1 + 2 - 0.3 - math.exp(0.5 - 0.3), 1 + 1 + 0.2 - math.exp(-1 + 0.2)]
    assert tuba_terms(SCORES, log_baseline).tolist() == pytest.approx(expected)


def test_each_design_of_a_batch_has_its_own_terms():
    scores = torch.randn(5, 5, 2, 3, dtype=torch.double)
    log_baseline = torch.randn(5, 2, 3, dtype=torch.double)
    for terms in (info_nce, nwj, tuba, donsker_varadhan):
        together = terms(scores, log_baseline)
        assert together.shape == (5, 2, 3)
        torch.testing.assert_close(together[:, 1, 2], terms(scores[:, :, 1, 2], log_baseline[:, 1, 2]))


def test_no_info_nce_term_exceeds_log_num():
    assert info_nce_terms(100 * torch.randn(32, 32)).max() <= math.log(32) + 1e-5


def test_sides_are_declared():
    assert [terms.bound for terms in (info_nce, nwj, tuba, donsker_varadhan)] == ["lower", "lower", "lower", "neither"]
    assert critic_objective(donsker_varadhan).bound == "neither"


# --- critics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SeparableCritic, JointCritic])
def test_a_critic_scores_all_pairs_of_each_design(make):
    critic = make(2, 3)
    theta, context = torch.randn(5, 4, 2), torch.randn(6, 4, 3)
    scores = critic(theta, context)
    assert scores.shape == (6, 5, 4)
    one = critic(theta[3:4, 1:2], context[2:3, 1:2])
    torch.testing.assert_close(scores[2, 3, 1], one[0, 0, 0])


def test_chunks_do_not_change_scores():
    critic = JointCritic(1, 1, max_pairs=7)
    theta, context = torch.randn(9, 1), torch.randn(8, 1)
    with_gradients = critic(theta, context)
    with torch.no_grad():
        torch.testing.assert_close(critic(theta, context), with_gradients)


# --- the optimal critic gives the truth -------------------------------------------------------------------------------


def gaussian_channel(scale=1.0):
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(theta, 1.0))

    return model


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
    result = eig_critic(
        gaussian_channel(),
        "y",
        terms=terms,
        critic=optimal_critic(constant),
        num_steps=0,
        num_samples=16_000,
        evaluation_batch_size=400,
        seed=1,
    )
    # At 400 pairs the batch's own bias is about 1/800.
    assert abs(result.eig - 0.5 * math.log(2.0)) < EITHER_SIDE * result.standard_error + 1 / 800


@pytest.mark.slow
def test_standard_errors_are_those_of_repeats():
    # 40 repeats give their spread to within 11 %; 4.5 times that is 0.5.
    critic = StandardisedCritic(SeparableCritic(1, 1), Standardise(1), Standardise(1))
    repeats = [
        eig_critic(
            gaussian_channel(),
            "y",
            terms=nwj,
            critic=critic,
            num_steps=0,
            num_samples=1_000,
            evaluation_batch_size=25,
            seed=seed,
        )
        for seed in range(40)
    ]
    spread = torch.stack([result.eig for result in repeats]).std()
    stated = torch.stack([result.standard_error for result in repeats]).mean()
    assert 0.5 < stated / spread < 1.5


# --- laws after training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "model"),
    [
        ("info_nce", "linear_gaussian"),
        ("info_nce", "implicit_toy"),
        pytest.param("info_nce", "finite", marks=pytest.mark.slow),
        ("nwj", "linear_gaussian"),
        pytest.param("nwj", "implicit_toy", marks=pytest.mark.slow),
        ("nwj", "finite"),
        ("tuba", "linear_gaussian"),
        pytest.param("tuba", "implicit_toy", marks=pytest.mark.slow),
        pytest.param("tuba", "finite", marks=pytest.mark.slow),
    ],
)
def test_lower_bounds_lie_below_the_truth_and_close(terms, model):
    program, exact = MODELS[model]
    result = eig_critic(program, "y", "theta", terms=TERMS[terms], seed=2, **TRAINING)
    assert isinstance(result, EIGResult)
    assert result.bound == "lower"
    margin = SIDE * result.standard_error
    assert exact - GAP - margin < result.eig < exact + margin
    if terms == "info_nce":
        assert result.effective_sample_size is None
    else:
        assert result.certified
        assert result.effective_sample_size > 1_000


def test_donsker_varadhan_claims_no_side():
    program, exact = MODELS["linear_gaussian"]
    result = eig_critic(program, "y", "theta", terms=donsker_varadhan, seed=3, **TRAINING)
    assert result.bound == "neither"
    assert result.certified is None
    assert abs(result.eig - exact) < GAP + EITHER_SIDE * result.standard_error


@pytest.mark.filterwarnings("ignore:target theta never reaches the outcome")
@pytest.mark.parametrize(
    "terms", ["nwj", pytest.param("info_nce", marks=pytest.mark.slow), pytest.param("tuba", marks=pytest.mark.slow)]
)
def test_independence_gives_zero(terms):
    def independent():
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(1.0, 2.0))

    result = eig_critic(independent, "y", terms=TERMS[terms], seed=4, **TRAINING)
    # What is learnt is noise, which costs the bound little and gains it nothing.
    assert -0.01 - SIDE * result.standard_error < result.eig < SIDE * result.standard_error


def test_dependent_nuisance_needs_no_prior_density():
    result = eig_critic(linear_gaussian.dependent_nuisance(), "y", "theta", seed=5, **TRAINING)
    exact = linear_gaussian.DEPENDENT_NUISANCE_EIG
    margin = SIDE * result.standard_error
    assert exact - GAP - margin < result.eig < exact + margin
    assert result.nuisance_labels == ("u",)


def test_a_joint_critic_and_a_summary():
    program, exact = MODELS["linear_gaussian"]
    options = TRAINING | {"num_steps": 150, "batch_size": 64, "evaluation_batch_size": 50, "num_samples": 2_000}
    result = eig_critic(
        program,
        "y",
        "theta",
        critic=lambda m, n: JointCritic(m, n, hidden_dim=32),
        summary=nn.Linear(3, 2),
        seed=6,
        **options,
    )
    margin = SIDE * result.standard_error
    assert exact - 3 * GAP - margin < result.eig < exact + margin


def test_candidate_designs_share_one_critic():
    designs = torch.tensor([[0.2, 0.6], [1.0, 1.6]])
    result = eig_critic(implicit_toy.implicit_toy(), "y", "theta", designs={"xi": designs}, seed=7, **TRAINING)
    exact = implicit_toy.exact_eig(designs)
    assert result.eig.shape == exact.shape
    margin = SIDE * result.standard_error
    assert (result.eig < exact + margin).all()
    assert (result.eig > exact - 3 * GAP - margin).all()


def test_a_fixed_pool():
    program, exact = MODELS["finite"]
    options = EVALUATION | {"num_simulations": 1_001, "learning_rate": 3e-3, "progress": False}
    result = eig_critic(program, "y", "theta", terms=nwj, seed=8, **options)
    margin = SIDE * result.standard_error
    assert exact - GAP - margin < result.eig < exact + margin
    assert result.history.validation is not None


def test_info_nce_saturates_at_the_logarithm_of_the_batch_and_says_so():
    program = linear_gaussian.linear_gaussian(noise_scale=0.01)  # exact: 9.96 nats
    with pytest.warns(UserWarning, match=r"cannot exceed 3\.91 nats with 50 pairs"):
        result = eig_critic(
            program, "y", "theta", seed=9, **(TRAINING | {"num_steps": 100, "evaluation_batch_size": 50})
        )
    assert math.log(50) - 0.5 < result.eig <= math.log(50)


def test_nwj_at_large_information_is_not_certified():
    # The best critic at 11.5 nats: of 1.6 million product pairs some 20 look like joint ones.
    with pytest.warns(UserWarning, match="effective sample size"):
        result = eig_critic(
            gaussian_channel(100_000.0),
            "y",
            terms=nwj,
            critic=optimal_critic(1.0, 100_000.0),
            num_steps=0,
            seed=10,
            **EVALUATION,
        )
    assert result.certified is False
    assert result.effective_sample_size < 100


# --- at the door ----------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_results_and_a_trained_critic_can_be_used_again():
    program, _ = MODELS["finite"]
    options = TRAINING | {"num_steps": 20, "num_samples": 400, "evaluation_batch_size": 20}
    first = eig_critic(program, "y", "theta", seed=12, **options)
    assert eig_critic(program, "y", "theta", seed=12, **options).eig == first.eig
    again = eig_critic(program, "y", "theta", critic=first.density, seed=13, **(options | {"num_steps": 0}))
    assert again.history is None
    with pytest.raises(ValueError, match="no baseline"):
        eig_critic(program, "y", "theta", critic=first.density, terms=tuba)
    with pytest.raises(ValueError, match="trained for another model"):
        eig_critic(gaussian_pair, "y", "theta", critic=first.density)


def gaussian_pair():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(theta, 1.0).to_event(1))


class PairCritic(nn.Module):
    """Scores pairs row by row, not all of them."""

    def __init__(self, theta_dim, context_dim):
        super().__init__()

    def forward(self, theta, context):
        return theta[:1].sum(-1) + context[:1].sum(-1)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"evaluation_batch_size": 600, "num_samples": 1_000}, ValueError, "at most half"),
        ({"evaluation_batch_size": 1}, ValueError, "at least 2"),
        ({"critic": PairCritic}, ValueError, "scores of all pairs"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        eig_critic(gaussian_pair, "y", **wrong)


def test_no_warning_where_nothing_is_wrong():
    program, _ = MODELS["finite"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eig_critic(program, "y", "theta", terms=nwj, seed=14, **(TRAINING | {"num_steps": 50}))

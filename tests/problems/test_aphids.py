"""Aphids: both simulators against single runs written out in NumPy, each other, and the published information."""

import math
from functools import partial

import numpy
import pytest
import torch

from pyro_voed import Experiment, eig_lbkld, sample_joint
from pyro_voed.problems.aphids import (
    INITIAL_NUMBER,
    PRIOR_COVARIANCE,
    PRIOR_MEAN,
    PUBLISHED,
    AphidCounts,
    aphids,
    exact_counts,
    leaping_counts,
)

SIDE = 4.0
"""Standard errors apart that pass: equal means differ by more with probability 6.3e-5."""

BOTH = pytest.mark.parametrize("simulate", [exact_counts, leaping_counts])
BIRTH, DEATH = PRIOR_MEAN


def rates(num):
    return torch.full((num,), BIRTH), torch.full((num,), DEATH)


def counts_one_by_one(num, times, generator):
    """Gillespie's direct method in plain Python; times in ascending order."""
    counts = numpy.empty((num, len(times)))
    for run in range(num):
        number = cumulative = INITIAL_NUMBER
        now, seen = 0.0, 0
        while seen < len(times):
            births, deaths = BIRTH * number, DEATH * number * cumulative
            now += generator.exponential(1.0 / (births + deaths)) if number else math.inf
            while seen < len(times) and times[seen] < now:
                counts[run, seen] = number
                seen += 1
            if generator.random() * (births + deaths) < births:
                number, cumulative = number + 1, cumulative + 1
            else:
                number -= 1
    return torch.from_numpy(counts)


def assert_moments_agree(first, second, *, mean=0.0, scale=0.0):
    """Compare means and standard deviations of columns; `mean` and `scale` are relative errors allowed on top."""
    noise = torch.stack([x.std(0) / math.sqrt(len(x)) for x in (first, second)]).norm(dim=0)
    assert ((first.mean(0) - second.mean(0)).abs() <= SIDE * noise + mean * first.mean(0)).all()
    # The standard error of log s, by the fourth moment, which is not that of a normal.
    scores = [(x - x.mean(0)) / x.std(0) for x in (first, second)]
    noise = torch.stack([((z**4).mean(0) - 1).sqrt() / (2 * math.sqrt(len(z))) for z in scores]).norm(dim=0)
    assert ((first.std(0).log() - second.std(0).log()).abs() <= SIDE * noise + scale).all()


TIMES = (4.0, 10.0, 24.0, 36.0)


@pytest.fixture(scope="module")
def reference():
    return counts_one_by_one(60, TIMES, numpy.random.default_rng(3))


@pytest.fixture(scope="module")
def exact():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return exact_counts(*rates(6_000), torch.tensor(TIMES).expand(6_000, -1)).double()


def leapt(*step):
    return leaping_counts(*rates(6_000), torch.tensor(TIMES).expand(6_000, -1), *step).double()


def test_both_simulators_agree_with_single_runs(reference, exact):
    assert_moments_agree(reference, exact)
    assert_moments_agree(reference, leapt())  # its error is a fraction of the noise of 60 runs


# Relative errors of mean and standard deviation, twice what 40,000 runs measured; they shrink with the step.
@pytest.mark.parametrize(("step", "mean", "scale"), [(1.0, 0.03, 0.2), (0.25, 0.008, 0.06), (0.02, 0.0005, 0.004)])
def test_leaping_tends_to_the_exact_simulation(exact, step, mean, scale):
    assert_moments_agree(exact, leapt(step), mean=mean, scale=scale)


def test_the_comparison_sees_coarse_leaps(exact):
    # So that the comparisons above could fail.
    with pytest.raises(AssertionError):
        assert_moments_agree(exact, leapt(2.0))


@BOTH
def test_births_alone_are_a_yule_process(simulate):
    # Negative binomial: mean n e^{lambda t}, variance n e^{lambda t} (e^{lambda t} - 1).
    counts = simulate(torch.full((8_000,), 0.2), torch.zeros(8_000), torch.full((8_000, 1), 6.0)).double()
    growth = math.exp(0.2 * 6.0)
    error = math.sqrt(INITIAL_NUMBER * growth * (growth - 1) / 8_000)
    bias = 0.001 * INITIAL_NUMBER * growth if simulate is leaping_counts else 0.0
    assert abs(counts.mean() - INITIAL_NUMBER * growth) <= SIDE * error + bias


@BOTH
def test_extinct_populations_stay_extinct(simulate):
    times = torch.linspace(0.0, 50.0, 26).expand(400, -1)
    counts = simulate(torch.full((400,), 0.246), torch.full((400,), 4e-3), times)
    assert (counts >= 0).all()
    assert torch.equal(counts, counts.round())
    extinct = counts == 0
    assert extinct[:, -1].float().mean() > 0.9  # nearly all starve within 50 days at this rate
    assert (extinct.long().diff(dim=1) >= 0).all()


@BOTH
def test_nothing_happens_at_rates_of_zero_nor_before_the_start(simulate):
    times = torch.tensor([0.0, 30.0]).expand(3, -1)
    assert (simulate(torch.zeros(3), torch.zeros(3), times) == INITIAL_NUMBER).all()
    assert (simulate(*rates(3), torch.zeros(3, 2)) == INITIAL_NUMBER).all()


@BOTH
def test_times_come_in_any_order_and_repeatedly(simulate):
    # Births alone, so that counts rise with time on any path.
    times = torch.tensor([[8.0, 2.0, 8.0, 0.0, 5.0], [1.0, 9.0, 9.0, 3.0, 2.0]]).repeat(50, 1)
    counts = simulate(torch.full((100,), 0.3), torch.zeros(100), times)
    assert (counts.gather(1, times.argsort(dim=1)).diff(dim=1) >= 0).all()
    assert torch.equal(counts[::2, 0], counts[::2, 2])
    assert torch.equal(counts[1::2, 1], counts[1::2, 2])


@BOTH
def test_rows_have_their_own_rates_and_times(simulate):
    birth, death = torch.tensor([0.1, 0.3]).repeat(1_500, 1), torch.zeros(1_500, 2)
    times = torch.tensor([[3.0], [6.0]]).expand(1_500, 2, 1)
    counts = simulate(birth, death, times)
    assert counts.shape == (1_500, 2, 1)
    growth = torch.tensor([0.3, 1.8]).exp()
    error = (INITIAL_NUMBER * growth * (growth - 1) / 1_500).sqrt()
    assert ((counts[..., 0].mean(0) - INITIAL_NUMBER * growth).abs() <= SIDE * error + 0.001 * counts.mean()).all()


def test_the_distribution_only_samples():
    counts = AphidCounts(torch.tensor([0.2, 0.3]), torch.tensor(1e-4), torch.tensor([15.0, 25.0, 5.0]))
    assert (counts.batch_shape, counts.event_shape) == ((2,), (3,))
    assert counts.expand((4, 2)).sample((5,)).shape == (5, 4, 2, 3)
    with pytest.raises(NotImplementedError, match="only samples"):
        counts.log_prob(torch.zeros(2, 3))


# --- as a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simulator", [exact_counts, partial(leaping_counts, step=0.5)], ids=["exact", "leaping"])
def test_the_library_runs_it_together_at_a_batch_of_designs(simulator):
    designs = {"xi": torch.tensor([[2.0, 4.0], [4.0, 2.0], [1.0, 1.0]])}
    experiment = Experiment(aphids((2.0, 4.0), simulator=simulator), "y", "theta").laid_out(designs)
    assert experiment.observations[0].is_discrete
    sample = sample_joint(experiment, 1_500, designs)
    assert sample.y.shape == (1_500, 3, 2)
    mean, error = sample.y.mean(0), sample.y.std(0) / math.sqrt(1_500)
    assert ((mean[0] - mean[1].flip(-1)).abs() <= SIDE * math.sqrt(2) * error[0]).all()
    assert torch.equal(sample.y[:, 2, 0], sample.y[:, 2, 1])


def test_draws_of_the_targets_follow_the_prior():
    experiment = Experiment(aphids(), "y", "theta")
    theta = sample_joint(experiment, 4_000).theta.double()
    factor = torch.linalg.cholesky(torch.tensor(PRIOR_COVARIANCE, dtype=torch.double))
    z = torch.linalg.solve_triangular(factor, (theta - torch.tensor(PRIOR_MEAN)).mT, upper=False)
    assert (z.mean(1).abs() <= SIDE / math.sqrt(4_000)).all()
    assert ((torch.cov(z) - torch.eye(2)).abs() <= SIDE * math.sqrt(2 / 4_000)).all()


@pytest.mark.parametrize("times", [PUBLISHED[0], PUBLISHED[2], PUBLISHED[3]], ids=lambda row: str(row[0]))
def test_the_information_is_the_published_one(times):
    times, published, _ = times
    result = eig_lbkld(aphids(times), "y", "theta", num_samples=4_000, seed=0)
    # The table is rounded to hundredths, its standard errors up to 0.021; the bias of nearest neighbours is up to 0.02.
    error = math.hypot(result.standard_error.item(), 0.021)
    assert abs(result.eig.item() - published) <= SIDE * error + 0.03

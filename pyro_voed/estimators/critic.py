r"""Critic bounds: expected information gain by telling joint pairs from shuffled ones.

A critic :math:`T(\theta, y)` is trained to be high where target and outcome come from one experiment and low where
they come from two. It needs simulations only: no density of outcome or prior, any nuisance sites, targets of any kind.
With :math:`p = p(\theta, y \mid \xi)` and :math:`\pi = p(\theta)\, p(y \mid \xi)`, for any T and any positive
baseline a(y),

.. math::
    \mathrm{EIG} \ge \mathbb{E}_p\big[1 + T - \log a(y)\big] - \mathbb{E}_\pi\big[e^{T} / a(y)\big]
    \qquad \text{since } \log z \le z / a + \log a - 1 .

* `tuba` learns a(y); tight at :math:`T = \log p(y \mid \theta) + c(y)` with a(y) the average of exp(T).
* `nwj` fixes a = e (also called MINE-f); tight at :math:`T = 1 + \log p(y \mid \theta) / p(y)`.
* `info_nce` takes a(y) from the batch. With independent targets :math:`\theta_1 \dots \theta_n`, of which
  :math:`\theta_i` made :math:`y_i`, it averages :math:`T_{ii} - \log \frac1n \sum_j e^{T_{ij}}`. Its variance is small,
  but no term exceeds **log n**, so neither does the bound, however large the information.
* `donsker_varadhan` takes the logarithm outside, :math:`\mathbb{E}_p[T] - \log \mathbb{E}_\pi[e^T]`. The logarithm of
  an average over a batch lies below that of the expectation (Jensen), so the estimate is biased *upward* off a lower
  bound: it has no side.

The last terms of all but `info_nce` are exponential averages. Their relative variance grows like the exponential of the
information (Song and Ermon 2020; McAllester and Stratos 2020), so they are trustworthy at small information only. The
effective sample size of exp(T) over the shuffled pairs says how far: below 100 the estimate is marked as not certified.

*Standard errors.* All pairs of a batch are used, joint draws on the diagonal and product draws off it, which depend on
each other. The reported number is therefore the mean over independent batches, and its standard error comes from the
spread of their means. (At the optimal critic the first-order part of the dependence is zero, so that all n(n - 1)
products of a batch are worth far more than n independent ones.)

References:
    Nguyen, Wainwright and Jordan (2010), "Estimating divergence functionals and the likelihood ratio by convex risk
    minimization". Belghazi et al. (2018), "Mutual information neural estimation". Van den Oord, Li and Vinyals (2018),
    "Representation learning with contrastive predictive coding". Poole, Ozair, van den Oord, Alemi and Tucker (2019),
    "On variational bounds of mutual information", Eqs. 6 (TUBA), 7 (NWJ), 10 (InfoNCE). McAllester and Stratos (2020),
    "Formal limitations on the measurement of mutual information". Song and Ermon (2020), "Understanding the limitations
    of variational mutual information estimators".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.bounds.critic import CriticTerms, info_nce, log_mean_exp_product
from pyro_voed.checks import Labels, check_count
from pyro_voed.densities.critics import SeparableCritic, StandardisedCritic, build_critic
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.fit import default_num_samples, explain_terms, fit_of
from pyro_voed.estimators.objective import Objective
from pyro_voed.estimators.summarising import Summary, outcome_summary
from pyro_voed.experiment.designs import design_batch_shape, flat_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.failures import average_share, failed_share
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.monte_carlo import log_mean_exp, mean_and_standard_error
from pyro_voed.results import EIGResult, Learned, WeightCheck
from pyro_voed.training.settings import Training, check_training

RATE = 1e-3
MINIMAL_EFFECTIVE_SAMPLE_SIZE = 100.0
SATURATION_MARGIN = 0.5
PAIRS_AT_ONCE = 2**23
FEWEST_ROWS = 64


def critic_objective(terms: CriticTerms = info_nce, critic: Any = SeparableCritic) -> Objective:
    """Return a critic's bound as an objective: terms from a joint sample and a critic.

    Args:
        terms: Terms from scores.
        critic: A factory `(theta_dim, context_dim) -> module`, or a module that scores all pairs; used where a search
            is given no other.

    Example:
        >>> critic_objective().bound, critic_objective().evaluation_size
        ('lower', 256)
    """

    def score(sample: JointSample, trained: StandardisedCritic) -> Tensor:
        context = sample.context()
        return terms(trained(sample.theta, context), trained.log_baseline(context))

    def build(given: Any, pilot: JointSample, experiment: Experiment, summary: Summary) -> StandardisedCritic:
        return build_critic(
            critic if given is None else given,
            pilot.theta.reshape(-1, pilot.theta.shape[-1]),
            pilot.context().reshape(-1, pilot.context().shape[-1]),
            num_designs=0 if pilot.designs is None else pilot.designs.shape[-1],
            summary=outcome_summary(experiment, summary),
            with_baseline=terms.needs_baseline,
        )

    return Objective(score, bound=terms.bound, build=build, evaluation_size=256)


def eig_critic(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    terms: CriticTerms = info_nce,
    designs: Mapping[str, Any] | None = None,
    critic: Any = SeparableCritic,
    summary: Summary = None,
    training: Training | None = None,
    num_samples: int | None = None,
    evaluation_batch_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain with a learned critic on joint and shuffled pairs.

    Args:
        model: A Pyro program of one experiment, explicit or implicit; targets may be discrete or deterministic.
        terms: `info_nce`, `nwj`, `tuba` or `donsker_varadhan`.
        designs: As in `eig_flow`; one critic takes the design along with the outcome, pairs are shuffled within a
            design.
        critic: A factory `(theta_dim, context_dim) -> module` that scores all pairs (`SeparableCritic`,
            `JointCritic`), such a module, or the critic of an earlier result (its field `density`), which is trained
            further, or used as it is with `training=Fresh(num_steps=0)`.
        evaluation_batch_size: Pairs n in each independent batch of the evaluation, which bounds InfoNCE by log(n);
            default a sixteenth of `num_samples`, at most 1,024.
        observation_labels, target_labels, summary, training, num_samples, seed, progress: As in `eig_flow`.

    Returns:
        The estimate in nats with its standard error. Except for InfoNCE, `weights.effective_sample_size` is that
        of exp(critic) over shuffled pairs (the smallest among the designs), and `weights.passed` says of NWJ and TUBA
        whether it is at least 100.

    Raises:
        ValueError: If labels, designs or sizes are wrong, or a critic does not fit.

    Warns:
        UserWarning: If InfoNCE comes within 0.5 nats of its ceiling, or the effective sample size is below 100.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.training import Fresh
        >>> brief = Fresh(num_steps=200)
        >>> result = eig_critic(linear_gaussian(), "y", "theta", training=brief, num_samples=4000, seed=0)
        >>> result.bound, bool(0.9 < result.eig < 1.25)  # exact: 1.199
        ('lower', True)
    """
    check_training(training)
    if num_samples is not None:
        check_count(num_samples, "num_samples", 4)  # two batches of two pairs
    if not isinstance(terms, CriticTerms):
        raise TypeError(f"terms: expected info_nce, nwj, tuba, donsker_varadhan or other CriticTerms, got {terms!r}.")

    def found(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        batch = design_batch_shape(experiment, candidates)
        most = num_samples or default_num_samples(experiment, batch)
        size = _evaluation_size(evaluation_batch_size, most)
        fit = fit_of(experiment, candidates, training, name="eig_critic", rate=RATE, progress=progress)
        fit = replace(fit, draw=partial(_draw, experiment, candidates), fewest=4 * FEWEST_ROWS)
        pool = fit.pool()
        pilot = fit.pilot(pool, draw=lambda rows: sample_joint(experiment, max(8, rows // batch.numel()), candidates))
        objective = critic_objective(terms, critic)
        rows = max(FEWEST_ROWS, fit.batch_size // batch.numel())
        trained, history, rate = fit.train_best(
            lambda: objective.build(None, pilot, experiment, summary),
            lambda sample, density: _in_batches(sample, rows, lambda part: objective(part, density)),
            pool,
        )
        values, log_averages, outcome_range, failed = _evaluate(
            experiment, trained, terms, candidates, size, most // size
        )
        effective = _effective_sample_size(log_averages, size) if terms.exponential else None
        return Terms(
            values,
            Learned(trained, history=history, outcome_range=outcome_range, learning_rate=rate),
            _weight_check(terms, effective),
            num_samples=size * values.shape[0],
            failed=failed,
            doubts=_doubts(terms, values.mean(0), size, effective),
        )

    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, found, name="eig_critic", bound=getattr(terms, "bound", "neither"))


def _weight_check(terms: CriticTerms, effective: float | None) -> WeightCheck | None:
    if effective is None:
        return None
    passed = None if terms.bound == "neither" else effective >= MINIMAL_EFFECTIVE_SAMPLE_SIZE
    return WeightCheck(passed, effective_sample_size=effective)


@torch.no_grad()
def _draw(experiment: Experiment, designs: Mapping[str, Tensor], batch_size: int) -> JointSample:
    """Simulate one minibatch: several pairs at each of a few designs, since pairs are shuffled within a design."""
    batch = design_batch_shape(experiment, designs)
    if not batch:
        return sample_joint(experiment, batch_size, designs)
    chosen = torch.randperm(batch.numel())[:8]
    own = {name: value[chosen] for name, value in flat_designs(experiment, designs).items()}
    return sample_joint(experiment, max(2, batch_size // len(chosen)), own)


def _evaluation_size(given: int | None, num_samples: int) -> int:
    if given is None:
        return max(2, min(1_024, num_samples // 16)) if num_samples >= 4 else 2
    check_count(given, "evaluation_batch_size", 2)
    if 2 * given > num_samples:
        raise ValueError(
            f"evaluation_batch_size: expected at most half of num_samples ({num_samples}), so that two "
            f"batches give a standard error, got {given}."
        )
    return given


def _in_batches(sample: JointSample, rows: int, terms: Callable[[JointSample], Tensor]) -> Tensor:
    """Return the terms of a sample of any size in batches of the size trained with, so that the means compare."""
    parts = torch.arange(sample.num_samples).tensor_split(max(1, sample.num_samples // rows))
    return torch.cat([terms(sample[part]) for part in parts])


def _evaluate(
    experiment: Experiment,
    critic: StandardisedCritic,
    terms: CriticTerms,
    designs: Mapping[str, Tensor],
    size: int,
    num_batches: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return means of terms, log averages of exp(score) / a, `(num_batches, *design_batch)`, range and failures."""
    batch = design_batch_shape(experiment, designs)
    members = max(1, PAIRS_AT_ONCE // size**2)
    values, averages, ranges, failed = [], [], [], []
    with torch.no_grad(), pyro.validation_enabled(False):
        for _ in range(num_batches):
            sample = sample_joint(experiment, size, designs)
            theta = sample.theta.reshape(size, batch.numel(), -1)
            context = sample.context().reshape(size, batch.numel(), -1)
            for group in torch.arange(batch.numel()).split(members):
                # Double precision, in which exp(score) overflows at 709 instead of 88.
                log_baseline = critic.log_baseline(context[:, group]).double()
                scores = critic(theta[:, group], context[:, group]).double()
                own = terms(scores, log_baseline)
                if not torch.isfinite(own).all():
                    raise _not_finite(experiment, sample, own, scores)
                values.append(own.mean(0))
                averages.append(log_mean_exp(log_mean_exp_product(scores) - log_baseline, dim=0))
            failed.append(failed_share(sample, left_out=experiment.failures == "ignore"))
            y = sample.y.reshape(-1, sample.y.shape[-1])
            ranges.append(torch.stack([y.amin(0), y.amax(0)]))
    lowest, highest = torch.stack(ranges).unbind(1)
    means, log_averages = (
        torch.cat(parts).reshape(num_batches, *batch).to(experiment.dtype) for parts in (values, averages)
    )
    return means, log_averages, torch.stack([lowest.amin(0), highest.amax(0)]), average_share(failed)


def _not_finite(experiment: Experiment, sample: JointSample, terms: Tensor, scores: Tensor) -> ArithmeticError:
    bad = int((~torch.isfinite(terms)).sum())
    why = explain_terms(experiment, sample)
    if bool(torch.isfinite(scores).all()):
        why = f"Scores reach {scores.max().item():.0f}, whose exponential overflows: use info_nce, or train longer."
    return ArithmeticError(f"eig_critic: {bad} of {terms.numel()} terms of the evaluation are not finite. {why}")


def _effective_sample_size(log_averages: Tensor, size: int) -> float:
    r"""Return how many independent draws would average exp(score) as well as the shuffled pairs did.

    Of N independent weights of squared coefficient of variation v, Kish's size is :math:`N / (1 + v)`, that is
    :math:`1 / (1 / N + s^2)` with :math:`s^2 = v / N` the relative variance of their mean. Pairs of one batch are
    dependent, so s is taken from the batches' means. Smallest among the designs.
    """
    averages = (log_averages - log_averages.amax(0)).double().exp()
    mean, standard_error = mean_and_standard_error(averages)
    num_pairs = averages.shape[0] * size * (size - 1)
    return float((1.0 / (1.0 / num_pairs + (standard_error / mean) ** 2)).amin())


def _doubts(terms: CriticTerms, eig: Tensor, size: int, effective: float | None) -> tuple[str, ...]:
    doubts: tuple[str, ...] = ()
    if terms.ceiling is not None and bool((eig > terms.ceiling(size) - SATURATION_MARGIN).any()):
        doubts += (
            f"{terms.name} cannot exceed {terms.ceiling(size):.2f} nats with {size} pairs in a batch, and "
            f"the estimate {eig.max().item():.2f} is close to that: the information may be much larger. Raise "
            "evaluation_batch_size (and num_samples with it), or use eig_flow",
        )
    if effective is not None and effective < MINIMAL_EFFECTIVE_SAMPLE_SIZE:
        doubts += (
            f"the effective sample size of exp(critic) over shuffled pairs is {effective:.1f}, below "
            f"{MINIMAL_EFFECTIVE_SAMPLE_SIZE:.0f}: the information is too large for {terms.name}, and neither "
            "estimate nor standard error can be trusted. Use info_nce or eig_flow",
        )
    return doubts

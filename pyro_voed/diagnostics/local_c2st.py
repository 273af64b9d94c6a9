r"""Is the posterior right at this very outcome?

The local classifier two-sample test trains a classifier :math:`c(\theta, y)` to tell the truths of simulated
experiments, :math:`(\theta^\star, y) \sim p(\theta, y)`, from draws of the approximate posterior at the same outcomes,
:math:`(\theta, y) \sim q(\theta \mid y)\, p(y)`. The best one answers

.. math:: c(\theta, y) = \frac{p(\theta \mid y)}{p(\theta \mid y) + q(\theta \mid y)} ,

which at a given outcome is 1/2 everywhere just where :math:`q` is right. So at the outcome :math:`y_o` in hand, from
draws :math:`\theta_1, \dots, \theta_L \sim q(\theta \mid y_o)` only and without the true posterior, the statistic is

.. math:: t(y_o) = \frac1L \sum_l \left( c(\theta_l, y_o) - \tfrac12 \right)^2 .

What :math:`t` is by chance is found by classifiers trained in the same way on the same experiments, where for each a
coin decides which of the two, truth or draw, is called the truth. If :math:`q(\theta \mid y) = p(\theta \mid y)` for
all outcomes, the two are exchangeable and the p-value is exact. If :math:`q` is right at :math:`y_o` only, the
classifier must tell this outcome from its neighbours, and the p-value is right as far as it does. A difference that
the classifier does not learn goes unseen.

References:
    J. Linhart, A. Gramfort and P. L. C. Rodrigues (2023), L-C2ST: local diagnostics for posterior approximations in
    simulation-based inference. NeurIPS, section 3 and algorithm 1 (there the null permutes labels over all pairs; the
    coin within each pair keeps outcomes balanced).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_count, check_finite, check_shape
from pyro_voed.diagnostics.classifiers import train_classifiers
from pyro_voed.diagnostics.draws import MIN_DRAWS
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.diagnostics.uniformity import rank_p_value
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.inference.flow import DesignIndex, flow_posterior, trained_density
from pyro_voed.inference.outcomes import check_outcome, pack_outcome
from pyro_voed.results import DesignResult, EIGResult

# Measured on a posterior that is off by half a unit where the outcome is positive, with 500 experiments: with half as
# many epochs or units as here the error spills over to negative outcomes (p = 0.02 in two and in one of five repeats);
# twice as many epochs show no more.
WIDTH = 32
NUM_EPOCHS = 20


@dataclass(frozen=True)
class LocalC2STResult:
    """How well truths can be distinguished from posterior draws at one outcome.

    Attributes:
        statistic: Mean of `(probability - 1/2)^2` over the draws: 0 where the two are indistinguishable, 1/4 at most.
        null: The statistic of each classifier that was trained with labels that mean nothing.
        p_value: Share of the null (the statistic in hand counted in) that is at least the statistic.
        probability: Of being a truth rather than a draw, for each draw: above 1/2 where the posterior puts too little
            mass, below where it puts too much.
        draws: The posterior draws at the outcome that they belong to.
        num_simulations: Simulated experiments that the classifiers learned from.
    """

    statistic: float
    null: Float[Tensor, " num_null"]
    p_value: float
    probability: Float[Tensor, " num_draws"] = field(repr=False)
    draws: Float[Tensor, "num_draws dim"] = field(repr=False)
    num_simulations: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"local C2ST {self.statistic:.5f} (by chance {self.null.mean().item():.5f} +- "
            f"{self.null.std(correction=0).item():.5f}, p = {self.p_value:.3g}; {self.num_simulations:,} experiments)"
        )


def local_c2st(
    simulated: SimulatedPosteriors,
    result: EIGResult | DesignResult,
    observations: Tensor | Mapping[str, Any],
    *,
    num_draws: int = 1_000,
    num_null: int = 100,
    design_index: DesignIndex = None,
    seed: int | None = None,
) -> LocalC2STResult:
    """Test the trained posterior at one outcome, against simulated experiments alone.

    Uses the first draw of each experiment. A thousand experiments or more are wanted: the classifier must learn how
    differences depend on the outcome.

    Args:
        simulated: What `simulate_posteriors` made of the result, at the same design, without quantities.
        result: This, `observations` and `design_index`: as in `flow_posterior`.
        num_draws: Draws of the posterior at the outcome.
        num_null: Classifiers trained with labels that mean nothing; the smallest p-value is `1 / (num_null + 1)`.

    Example:
        >>> from pyro_voed import Fresh, eig_flow
        >>> from pyro_voed.diagnostics.simulated import simulate_posteriors
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> trained = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
        >>> simulated = simulate_posteriors(trained, 200, 1, seed=0)
        >>> local_c2st(simulated, trained, torch.tensor([1.0, 2.0, 1.5]), num_null=19, seed=0).p_value >= 0.05
        True
    """
    if simulated.y is None:
        raise ValueError("simulated: expected packed outcomes y. Make it with simulate_posteriors.")
    with isolated(seed):
        trained = trained_density(result, design_index)
        y_outcome = pack_outcome(trained.experiment, check_outcome(trained.experiment, observations), trained.designs)
        posterior = flow_posterior(result, observations, num_draws, design_index=design_index)
        unknown = [name for name in simulated.columns if name not in posterior.columns]
        if unknown:
            raise ValueError(
                f"simulated: columns {unknown} are not among the targets' {posterior.columns}. Leave quantities out, "
                "or compute them of draws at the outcome and call local_classifier_test."
            )
        order = [posterior.columns.index(name) for name in simulated.columns]
        return local_classifier_test(
            simulated.truths,
            simulated.draws[:, 0],
            simulated.y,
            draws_at_outcome=posterior.matrix()[:, order],
            y_outcome=y_outcome,
            num_null=num_null,
        )


def local_classifier_test(
    truths: Tensor,
    draws: Tensor,
    y: Tensor,
    *,
    draws_at_outcome: Tensor,
    y_outcome: Tensor,
    num_null: int = 100,
    seed: int | None = None,
) -> LocalC2STResult:
    """Test any approximate posterior at one outcome, from simulated experiments and its draws.

    All classifiers are trained at once: a thousand experiments of two targets and three outcomes with 100 null
    classifiers take two seconds on one core.

    Args:
        truths: What the experiments were simulated with, `(num_simulations, dim)`, at least 100.
        draws: One draw of the posterior of each experiment, `(num_simulations, dim)`.
        y: Outcome of each experiment, `(num_simulations, y_dim)`.
        draws_at_outcome: Draws of the posterior of the outcome in question, `(num_draws, dim)`.
        y_outcome: The outcome in question, `(y_dim,)`.
        num_null: Classifiers trained with labels that mean nothing.
        seed: Seed of labels, weights and minibatches.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> truths, at_outcome = torch.randn(300, 1), 3.0 + torch.randn(200, 1) / 2**0.5
        >>> y = truths + torch.randn(300, 1)
        >>> draws, here = y / 2 + 3.0 + torch.randn(300, 1) / 2**0.5, {"draws_at_outcome": at_outcome}
        >>> local_classifier_test(truths, draws, y, **here, y_outcome=torch.zeros(1), num_null=19, seed=0).p_value
        0.05
    """
    started = time.perf_counter()
    _check_shapes(truths, draws, y, draws_at_outcome, y_outcome)
    check_count(num_null, "num_null")
    pairs = torch.stack([torch.cat([theta, y], 1).detach().double() for theta in (truths, draws)], 1)
    at_outcome = torch.cat([draws_at_outcome, y_outcome.expand(len(draws_at_outcome), -1)], 1).double()
    mean, scale = pairs.flatten(0, 1).mean(0), pairs.flatten(0, 1).std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    pairs, at_outcome = (((inputs - mean) / scale).float() for inputs in (pairs, at_outcome))
    with isolated(seed), torch.enable_grad():
        swapped = torch.rand(1 + num_null, len(truths)) < 0.5
        swapped[0] = False  # the one classifier whose labels are right
        labels = torch.stack([~swapped, swapped], -1).to(pairs)
        # Truth and draw of an experiment share a minibatch, so that what their outcome says about labels cancels.
        logits = train_classifiers(pairs, labels, torch.ones_like(labels), width=WIDTH, num_epochs=NUM_EPOCHS)
    probability = torch.sigmoid(logits(at_outcome).double())
    statistics = (probability - 0.5).square().mean(1)
    return LocalC2STResult(
        statistic=statistics[0].item(),
        null=statistics[1:],
        p_value=rank_p_value(statistics[0], statistics[1:]),
        probability=probability[0],
        draws=draws_at_outcome,
        num_simulations=len(truths),
        seconds=time.perf_counter() - started,
    )


def _check_shapes(truths: Tensor, draws: Tensor, y: Tensor, draws_at_outcome: Tensor, y_outcome: Tensor) -> None:
    for name, value in (("truths", truths), ("y", y)):
        check_shape(value, (None, None), name)
    (num, dim), num_draws = truths.shape, len(draws_at_outcome)
    check_shape(draws, (num, dim), "draws")
    check_shape(y, (num, None), "y")
    check_shape(draws_at_outcome, (None, dim), "draws_at_outcome")
    check_shape(y_outcome, (y.shape[1],), "y_outcome")
    parts = {"truths": truths, "draws": draws, "y": y, "draws_at_outcome": draws_at_outcome, "y_outcome": y_outcome}
    for name, value in parts.items():
        check_finite(value, name)
    if num < MIN_DRAWS or num_draws < 1:
        raise ValueError(
            f"truths: expected at least {MIN_DRAWS} experiments and a draw at the outcome, got {num} and {num_draws}."
        )

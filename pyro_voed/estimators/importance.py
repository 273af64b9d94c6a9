r"""Two sides from one proposal: ACE below, VNMC above.

The outcome's density is an average of weights :math:`w_l = p(\theta_l)\, p(y \mid \theta_l) / q(\theta_l \mid y)` over
draws of a proposal q. With :math:`\theta_0` the draw that made y and
:math:`\theta_1, ..., \theta_L \sim q(\cdot \mid y)`,

.. math::
    \mathrm{EIG} \ge \mathbb{E}\Big[\log p(y \mid \theta_0) - \log \frac{1}{L + 1} \sum_{l=0}^{L} w_l\Big]
    \quad (\text{ACE}), \qquad
    \mathrm{EIG} \le \mathbb{E}\Big[\log p(y \mid \theta_0) - \log \frac1L \sum_{l=1}^{L} w_l\Big]
    \quad (\text{VNMC}).

Both are exact for any L when q is the posterior, and close as L grows whatever q is, at a few draws where nested Monte
Carlo, whose proposal is the prior, needs thousands. The proposal is mixed with the prior,
:math:`q_\alpha = (1 - \alpha) q + \alpha p`, which bounds the weights by :math:`p(y \mid \theta) / \alpha`; it does not
cure heavy tails of the terms themselves. What may serve as q is in `proposals`: besides a flow that is trained here,
Laplace's Gaussian (`laplace_proposal`) and the guide that `eig_ba` fitted, which are used as they are.

References:
    Foster, Jankowiak, O'Meara, Teh and Rainforth (2020), "A unified stochastic gradient approach to designing
    Bayesian-optimal experiments", Eq. 11 (ACE); Foster et al. (2019), "Variational Bayesian optimal experimental
    design", Eq. 9 (VNMC); Hesterberg (1995), "Weighted average importance sampling and defensive mixture
    distributions".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_voed.checks import Labels, check_count
from pyro_voed.estimators.guide import GuideDensity
from pyro_voed.estimators.importance_terms import HEAVY_TAIL, ace_terms, importance_terms
from pyro_voed.estimators.learning import check_sizes, default_budget
from pyro_voed.estimators.nested import PAIR_MEMORY, check_densities, check_no_nuisance, check_scores_targets
from pyro_voed.estimators.objective import Objective
from pyro_voed.estimators.posterior_bound import flow_bound
from pyro_voed.estimators.proposals import Proposal, as_proposal
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.resolve import resolve
from pyro_voed.experiment.simulate import (
    JointSample,
    candidate_designs,
    design_batch_shape,
    flat_designs,
)
from pyro_voed.experiment.sites import Experiment
from pyro_voed.monte_carlo import mean_and_standard_error, pareto_k
from pyro_voed.results import EIGResult


@dataclass(frozen=True)
class AdaptiveContrastiveTerms:
    """ACE terms with gradients to design and proposal.

    Attributes:
        num_inner_samples: Proposal draws for each outcome.
    """

    num_inner_samples: int = 8

    def __call__(self, sample: JointSample, density: Any) -> Tensor:
        """Return the terms."""
        if sample.log_joint is None or sample.log_prior is None or sample.log_likelihood is None:
            raise ValueError("the sample scores no other targets: search with optimise_design, which asks for that.")
        context = sample.context()
        theta = density.condition(context).rsample((self.num_inner_samples,)).transpose(0, 1)
        log_prior, log_likelihood = sample.log_joint(theta)
        inner = log_prior + log_likelihood - density.log_prob(theta, context.unsqueeze(1))
        own = sample.log_prior + sample.log_likelihood - density.log_prob(sample.theta, context)
        return ace_terms(sample.log_likelihood, own, inner)


adaptive_contrastive = Objective(AdaptiveContrastiveTerms(), bound="lower", needs_likelihood=True, needs_log_joint=True)
"""Adaptive contrastive estimation as an objective for design search: trains the proposal on its own bound."""


def eig_ace(
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    designs: Mapping[str, Any] | None = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    density: Any = None,
    summary: Summary = None,
    num_inner_samples: int = 32,
    num_simulations: int | None = None,
    num_steps: int | None = None,
    max_steps: int = 10_000,
    batch_size: int | None = None,
    learning_rate: float = 2e-3,
    num_samples: int = 5_000,
    vectorize: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain from below by importance sampling from a learned posterior.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities; targets must be all its latents.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about, continuous; default: all other latent sites.
        design_labels: Design sites.
        designs: Candidate designs, `(*design_batch, *shape)` each.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        density: The proposal, trained as by `eig_flow`: a factory, a density or that of an earlier result. Or one
            used as it is: `laplace_proposal()`, or the guide density of an `eig_ba` result.
        summary: A module from standardised packed outcomes `(num, y_dim)` to learned statistics `(num, summary_dim)`,
            such as those of `pyro_voed.summaries`, or a mapping from outcome sites to such modules. Default: picked
            from the outcome's plates and shape, a set network for exchangeable rows; `torch.nn.Identity()` for none.
        num_inner_samples: Proposal draws L for each outer draw.
        num_simulations: Train on a fixed pool of this many simulations.
        num_steps: Train for exactly this many steps; 0 uses `density` as it is.
        max_steps: Most steps on fresh simulations.
        batch_size: Experiments a step.
        learning_rate: Peak learning rate.
        num_samples: Outer draws at each design.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The lower bound in nats with its standard error, the tail index of its terms and the trained proposal.

    Raises:
        NotImplementedError: If the outcome has no density, there are nuisance sites, or a replaced prior cannot score
            targets that it did not draw.
        ArithmeticError: If a term is not finite.

    References:
        Foster et al. (2020), Eq. 11.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_ace(linear_gaussian(), "y", "theta", num_steps=200, num_samples=1000, seed=0)
        >>> result.bound, bool(1.05 < result.eig < 1.35)  # exact: 1.199
        ('lower', True)
    """
    check_sizes(num_simulations, num_steps, max_steps, batch_size, learning_rate, num_samples)
    check_count(num_inner_samples, "num_inner_samples")
    with isolated(seed):
        return _estimate(
            model,
            observation_labels,
            target_labels,
            design_labels,
            designs,
            model_args,
            model_kwargs,
            prior,
            vectorize,
            density,
            summary,
            {
                "num_simulations": num_simulations,
                "num_steps": num_steps,
                "max_steps": max_steps,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
            },
            progress,
            num_samples,
            num_inner_samples,
            "eig_ace",
            "lower",
        )


def eig_vnmc(
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    designs: Mapping[str, Any] | None = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    density: Any = None,
    summary: Summary = None,
    num_inner_samples: int = 32,
    num_simulations: int | None = None,
    num_steps: int | None = None,
    max_steps: int = 10_000,
    batch_size: int | None = None,
    learning_rate: float = 2e-3,
    num_samples: int = 5_000,
    vectorize: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain from above by importance sampling from a learned posterior.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities; targets must be all its latents.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about, continuous; default: all other latent sites.
        design_labels: Design sites.
        designs: Candidate designs, `(*design_batch, *shape)` each.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        density: The proposal, trained as by `eig_flow`: a factory, a density or that of an earlier result. Or one
            used as it is: `laplace_proposal()`, or the guide density of an `eig_ba` result.
        summary: A module from standardised packed outcomes `(num, y_dim)` to learned statistics `(num, summary_dim)`,
            such as those of `pyro_voed.summaries`, or a mapping from outcome sites to such modules. Default: picked
            from the outcome's plates and shape, a set network for exchangeable rows; `torch.nn.Identity()` for none.
        num_inner_samples: Proposal draws L for each outer draw.
        num_simulations: Train on a fixed pool of this many simulations.
        num_steps: Train for exactly this many steps; 0 uses `density` as it is.
        max_steps: Most steps on fresh simulations.
        batch_size: Experiments a step.
        learning_rate: Peak learning rate.
        num_samples: Outer draws at each design.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The upper bound in nats with its standard error, the tail index of its terms and the trained proposal.

    Raises:
        NotImplementedError: If the outcome has no density, there are nuisance sites, or a replaced prior cannot score
            targets that it did not draw.
        ArithmeticError: If a term is not finite.

    References:
        Foster et al. (2019), Eq. 9.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_vnmc(linear_gaussian(), "y", "theta", num_steps=200, num_samples=1000, seed=0)
        >>> result.bound, bool(1.05 < result.eig < 1.35)  # exact: 1.199
        ('upper', True)
    """
    check_sizes(num_simulations, num_steps, max_steps, batch_size, learning_rate, num_samples)
    check_count(num_inner_samples, "num_inner_samples")
    with isolated(seed):
        return _estimate(
            model,
            observation_labels,
            target_labels,
            design_labels,
            designs,
            model_args,
            model_kwargs,
            prior,
            vectorize,
            density,
            summary,
            {
                "num_simulations": num_simulations,
                "num_steps": num_steps,
                "max_steps": max_steps,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
            },
            progress,
            num_samples,
            num_inner_samples,
            "eig_vnmc",
            "upper",
        )


def _estimate(
    model: Callable[..., Any],
    observation_labels: Labels,
    target_labels: Labels,
    design_labels: Labels,
    designs: Mapping[str, Any] | None,
    model_args: Sequence[Any],
    model_kwargs: Mapping[str, Any] | None,
    prior: Callable[..., Any] | None,
    vectorize: bool,
    density: Any,
    summary: Summary,
    sizes: dict[str, Any],
    progress: bool | None,
    num_samples: int,
    num_inner: int,
    estimator: str,
    bound: Literal["lower", "upper"],
) -> EIGResult:
    started = time.perf_counter()
    experiment = resolve(
        model,
        observation_labels,
        target_labels,
        design_labels=design_labels,
        designs=designs,
        model_args=model_args,
        model_kwargs=model_kwargs,
        prior=prior,
        vectorize=vectorize,
    )
    check_importance(experiment, "importance sampling")
    candidates = candidate_designs(experiment, designs)
    if isinstance(density, Proposal | GuideDensity):
        return importance_estimate(
            experiment,
            candidates,
            as_proposal(density, experiment, model_args, model_kwargs or {}, candidates),
            num_samples,
            num_inner,
            estimator=estimator,
            bound=bound,
            started=started,
        )
    budget = default_budget(experiment, design_batch_shape(experiment, candidates), num_samples=2, **sizes)
    trained = flow_bound(experiment, candidates, budget, density, summary, None, progress, started)
    estimate = importance_estimate(
        experiment,
        candidates,
        trained.density,
        num_samples,
        num_inner,
        estimator=estimator,
        bound=bound,
        started=started,
    )
    return replace(estimate, history=trained.history, observation_range=trained.observation_range)


def check_importance(experiment: Experiment, estimator: str) -> None:
    """Raise NotImplementedError where targets from a proposal cannot be weighed."""
    check_densities(experiment, estimator)
    check_no_nuisance(experiment, estimator)
    check_scores_targets(experiment, estimator)


def importance_estimate(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    proposal: Any,
    num_samples: int,
    num_inner: int,
    *,
    estimator: str,
    bound: Literal["lower", "upper"],
    started: float,
    max_bytes: int = PAIR_MEMORY,
) -> EIGResult:
    """Average ACE or VNMC terms at each design with a proposal as it stands, inside `isolated`."""
    batch = design_batch_shape(experiment, designs)
    members = flat_designs(experiment, designs)
    terms = []
    for member in range(batch.numel()):
        own = {name: value[member] for name, value in members.items()}
        lower, upper, _ = importance_terms(experiment, own, proposal, num_samples, num_inner, max_bytes=max_bytes)
        terms.append(lower if bound == "lower" else upper)
    stacked = torch.stack(terms, -1).reshape(-1, *batch)
    eig, standard_error = mean_and_standard_error(stacked)
    tail = pareto_k(stacked)
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound=bound,
        estimator=estimator,
        num_samples=num_samples,
        num_simulations=experiment.program.num_calls,
        seconds=time.perf_counter() - started,
        designs=designs,
        target_labels=experiment.target_labels,
        observation_labels=experiment.observation_labels,
        density=proposal,
        experiment=experiment,
        pareto_k=tail,
        certified=bool((tail <= HEAVY_TAIL).all()),
    )

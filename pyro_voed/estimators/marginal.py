r"""The marginal upper bound: expected information gain by a learned outcome density.

For any density q of the outcome,

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}\Big[\log \frac{p(y \mid \theta, \xi)}{p(y \mid \xi)}\Big]
    \;\le\; \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log p(y \mid \theta, \xi) - \log q(y \mid \xi)\big],

off by the Kullback-Leibler divergence from p(y) to q. It needs the outcome's density given the targets.

*The design gradient* at a fixed density, with outcomes written as :math:`y = g(\theta, \varepsilon, \xi)`, is

.. math::
    \nabla_\xi U(\xi, q) = \mathbb{E}_{\theta, \varepsilon}\big[\nabla_\xi \log p(g \mid \theta, \xi)
    - \nabla_\xi \log q(g)\big]

(Eq. 17), where outcomes that are not reparametrised add the terms times the gradient of log p(y | theta). At the best
density it is the gradient of the tightest bound too, by the envelope theorem (Eq. 16: `marginal_saddle`).

*Discrete outcomes.* Where the outcomes seen are few, q is a mass function: the average of p(y | theta') over draws of
its own, which is exact in the limit and an upper bound before; where the model enumerates its outcomes they are summed
over rather than drawn. Where they are many, uniform noise makes them
continuous: with :math:`q(y) = \int_0^1 q(y + u) du`, Jensen's inequality gives
:math:`-\mathbb{E}_u \log q(y + u) \ge -\log q(y)`, so the side is kept.

References:
    Foster, Jankowiak, Bingham, Horsfall, Teh, Rainforth and Goodman (2019), "Variational Bayesian optimal experimental
    design", Eq. 6. Dong et al. (2025), Eqs. 13 to 17. Theis, van den Oord and Bethge (2016), "A note on the evaluation
    of generative models" (dequantisation).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import Labels, check_count
from pyro_voed.estimators.building import build_density
from pyro_voed.estimators.guide import GuideDensity
from pyro_voed.estimators.learning import (
    Budget,
    check_pilot,
    check_sizes,
    default_budget,
    draw_pool,
    draw_training,
    evaluate_terms,
    train_density,
)
from pyro_voed.estimators.nested import check_densities, check_no_nuisance, log_marginal
from pyro_voed.estimators.objective import Objective, detached_module
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.programs import ProgramRun, run_rows
from pyro_voed.experiment.resolve import resolve
from pyro_voed.experiment.scoring import pairwise_log_likelihood
from pyro_voed.experiment.simulate import (
    JointSample,
    candidate_designs,
    design_batch_shape,
    flat_designs,
    sample_joint,
)
from pyro_voed.experiment.sites import Experiment
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import EIGResult, FitHistory

MASS_FUNCTION_DRAWS = 10_000
MASS_FUNCTION_OUTCOMES = 1_024


def marginal_terms(log_likelihood: Float[Tensor, "*batch"], log_q: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return marginal terms, nats, whose mean is an upper bound on the expected information gain.

    Args:
        log_likelihood: Log density of an outcome given the targets that made it.
        log_q: Its log density under the learned outcome density, in the same coordinates.

    Example:
        >>> marginal_terms(torch.tensor([-0.5]), torch.tensor([-1.5]))
        tensor([1.])
    """
    return log_likelihood - log_q


def build_outcome_density(given: Any, pilot: JointSample, experiment: Experiment, summary: Summary) -> Any:
    """Return a density of the packed outcome (given the design, over several)."""
    y = pilot.y.reshape(-1, pilot.y.shape[-1])
    context = _design_context(pilot).reshape(len(y), -1)
    return build_density(given, y, context, num_designs=context.shape[-1], summary=None)


def _saddle_terms(sample: JointSample, density: Any) -> Tensor:
    """Marginal terms, whose gradient raises them in the design and, its sign turned, lowers them in the density."""
    assert sample.log_likelihood is not None  # asked for by the objective
    context = _design_context(sample)
    held = marginal_terms(sample.log_likelihood, detached_module(density)(sample.y, context))
    learnt = density.log_prob(sample.y.detach(), context)
    return held + (learnt - learnt.detach())


def _rescale_outcome(density: Any, sample: JointSample) -> None:
    density.theta_scaling.fit_(sample.y)


def marginal_saddle(inner_steps: int = 4) -> Objective:
    r"""Return the saddle-point objective of the marginal upper bound.

    .. math::  \max_\xi \min_\phi \mathbb{E}\big[\log p(y \mid \theta, \xi) - \log q_\phi(y)\big]

    An upper bound cannot be ascended in design and density together, since the density would be driven to loosen it. So
    the density descends for `inner_steps` steps between two steps of the design, whose gradient is that of the bound at
    the density as it stands.

    Args:
        inner_steps: Steps of the density for each step of the design.

    References:
        Dong et al. (2025), Eqs. 16, 17 and 31.

    Example:
        >>> marginal_saddle().bound
        'upper'
    """
    return Objective(
        _saddle_terms,
        bound="upper",
        needs_likelihood=True,
        needs_log_prior=False,
        build=build_outcome_density,
        rescale=_rescale_outcome,
        inner_steps=check_count(inner_steps, "inner_steps"),
    )


def eig_marginal(
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
    guide: Callable[..., Any] | None = None,
    dequantise: bool = False,
    num_simulations: int | None = None,
    num_steps: int | None = None,
    max_steps: int = 10_000,
    batch_size: int | None = None,
    learning_rate: float = 2e-3,
    num_samples: int | None = None,
    vectorize: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain from above with a learned outcome density.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities; targets must be all its latents.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about, discrete ones included; default: all other latent sites.
        design_labels: Design sites.
        designs: Candidate designs, `(*design_batch, *shape)` each, evaluated with one density given the design.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        density: A factory `(y_dim, context_dim) -> density`, a density, or the density of an earlier result.
            Default: a spline coupling flow. The context is the design where there are several, else empty.
        guide: Instead of a density: a Pyro guide that samples the outcome sites, with parameters of its own, called
            with the model's arguments. Its parameters are fitted in a copy; the store is left alone.
        dequantise: Spread discrete outcomes by uniform noise even where they are few.
        num_simulations: Train on a fixed pool of this many simulations.
        num_steps: Train for exactly this many steps.
        max_steps: Most steps on fresh simulations.
        batch_size: Experiments a step.
        learning_rate: Peak learning rate.
        num_samples: Fresh experiments at each design behind the reported number.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The upper bound in nats with its standard error; the history holds the bound too, which falls.

    Raises:
        NotImplementedError: If the outcome has no density, or there are nuisance sites.
        ValueError: If both a guide and a density are given, or labels, designs or sizes are wrong.
        ArithmeticError: If a term is not finite.

    References:
        Foster et al. (2019), Eq. 6; Dong et al. (2025).

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_marginal(linear_gaussian(), "y", "theta", num_steps=200, seed=0)
        >>> result.bound, bool(1.15 < result.eig < 1.5)  # exact: 1.199
        ('upper', True)
    """
    check_sizes(num_simulations, num_steps, max_steps, batch_size, learning_rate, num_samples)
    if guide is not None and density is not None:
        raise ValueError("give a guide or a density for the outcome, not both.")
    with isolated(seed):
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
        candidates = candidate_designs(experiment, designs)
        budget = default_budget(
            experiment,
            design_batch_shape(experiment, candidates),
            num_simulations=num_simulations,
            num_steps=num_steps,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            num_samples=num_samples,
        )
        if guide is not None:
            density = GuideDensity(guide, experiment, model_args, model_kwargs or {}, candidates)
        elif isinstance(density, GuideDensity):
            density = copy.deepcopy(density)
        result = marginal_bound(experiment, candidates, budget, density, progress, dequantise=dequantise)
        return replace(result, num_simulations=experiment.program.num_calls)


def marginal_bound(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    budget: Budget,
    density: Any,
    progress: bool | None,
    *,
    dequantise: bool = False,
) -> EIGResult:
    """Estimate on a resolved model, inside `isolated`."""
    started, calls = time.perf_counter(), experiment.program.num_calls
    check_densities(experiment, "eig_marginal")
    check_no_nuisance(experiment, "eig_marginal")
    discrete = [site.is_discrete for site in experiment.observations]
    terms = None
    history = None
    if all(discrete) and density is None and not dequantise:
        terms = _mass_function_terms(experiment, designs, budget.num_samples)
    if terms is None:
        noise = (
            dequantiser(experiment)
            if any(discrete) and not isinstance(density, GuideDensity)
            else lambda sample: sample
        )
        density, history, terms = _learn(experiment, designs, budget, density, noise, progress)
    eig, standard_error = mean_and_standard_error(terms)
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound="upper",
        estimator="eig_marginal",
        num_simulations=experiment.program.num_calls - calls,
        num_samples=terms.shape[0],
        seconds=time.perf_counter() - started,
        designs=designs,
        target_labels=experiment.target_labels,
        observation_labels=experiment.observation_labels,
        history=history,
        density=density,
        experiment=experiment,
    )


def _objective(sample: JointSample, density: Any) -> Tensor:
    """Terms to ascend: the marginal terms with their sign changed."""
    if sample.log_likelihood is None:
        raise ValueError("the sample has no log likelihood: draw it with sample_joint(..., likelihood=True).")
    return -marginal_terms(sample.log_likelihood, _log_q(sample, density))


def _log_q(sample: JointSample, density: Any) -> Tensor:
    if isinstance(density, GuideDensity):
        return density.log_prob(sample)
    return density.log_prob(sample.y, _design_context(sample))


def _design_context(sample: JointSample) -> Tensor:
    """What an outcome density is conditioned on: the design where there are several, else nothing."""
    return sample.y[..., :0] if sample.designs is None else sample.designs.expand(*sample.y.shape[:-1], -1)


def _learn(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    budget: Budget,
    density: Any,
    noise: Callable[[JointSample], JointSample],
    progress: bool | None,
) -> tuple[Any, FitHistory | None, Tensor]:
    with torch.no_grad():
        pool = draw_pool(experiment, budget, designs, likelihood=True, prepare=noise)
        pilot = pool if pool is not None else noise(draw_training(experiment, 1_000, designs, likelihood=True))
    check_pilot(experiment, pilot)
    if not isinstance(density, GuideDensity):
        density = build_outcome_density(density, pilot, experiment, None)
    history = None
    if budget.num_steps != 0:
        history = train_density(
            experiment,
            density,
            _objective,
            budget,
            designs,
            likelihood=True,
            prepare=noise,
            pool=pool,
            progress=progress,
            description="eig_marginal",
        )
        validation = None if history.validation is None else -history.validation
        history = replace(history, bound=-history.bound, validation=validation)
    terms, _ = evaluate_terms(
        experiment,
        lambda sample: -_objective(noise(sample), density),
        budget.num_samples,
        designs,
        likelihood=True,
        estimator="eig_marginal",
    )
    return density, history, terms


def dequantiser(experiment: Experiment) -> Callable[[JointSample], JointSample]:
    """Return a function that adds uniform noise on [0, 1) to the discrete outcomes of a sample."""
    discrete = torch.cat(
        [torch.full((site.packed_dim,), site.is_discrete, device=experiment.device) for site in experiment.observations]
    )

    def spread(sample: JointSample) -> JointSample:
        return replace(
            sample, y=sample.y + torch.where(discrete, torch.rand_like(sample.y), torch.zeros_like(sample.y))
        )

    return spread


def _mass_function_terms(experiment: Experiment, designs: Mapping[str, Tensor], num_samples: int) -> Tensor | None:
    """Return terms with the averaged mass function, or None where there are too many distinct outcomes."""
    members = flat_designs(experiment, designs)
    batch = design_batch_shape(experiment, designs)
    possible = None if experiment.linked_outcomes else enumerated_outcomes(experiment)
    terms = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for member in range(batch.numel()):
            own = {name: value[member] for name, value in members.items()}
            if possible is not None:
                terms.append(_enumerated_terms(experiment, own, possible, num_samples))
                continue
            seen = _seen_terms(experiment, own, num_samples)
            if seen is None:
                return None
            terms.append(seen)
    return torch.stack(terms, -1).reshape(-1, *batch)


def enumerated_outcomes(experiment: Experiment) -> dict[str, Tensor] | None:
    """Return all outcomes, `(num_outcomes, *shape)` for each site, or None where they are not few and finitely many."""
    supports = []
    for site in experiment.observations:
        if site.support_values is None or site.measured is not None:
            return None
        supports += [site.support_values] * site.shape.numel()
    if math.prod(len(support) for support in supports) > MASS_FUNCTION_OUTCOMES:
        return None
    table = torch.cartesian_prod(*supports).reshape(-1, len(supports))
    pieces = table.split([site.shape.numel() for site in experiment.observations], -1)
    return {
        site.name: piece.reshape(-1, *site.shape).to(site.dtype)
        for site, piece in zip(experiment.observations, pieces, strict=True)
    }


def _enumerated_terms(
    experiment: Experiment, designs: Mapping[str, Tensor], outcomes: Mapping[str, Tensor], num_samples: int
) -> Tensor:
    """Terms with the outcome summed over (Rao-Blackwell), so that only the targets are drawn."""
    log_q = log_marginal(experiment, designs, outcomes, _mass_function_draws(experiment, designs, num_samples))
    outer = run_rows(experiment.program, num_samples, experiment.shapes, designs=designs)
    log_p = pairwise_log_likelihood(experiment, outcomes, outer)  # (num_outcomes, num_samples)
    # Outcomes that a draw makes impossible contribute nothing: p log p -> 0.
    weighted = log_p.exp() * marginal_terms(log_p, log_q.unsqueeze(-1).expand_as(log_p))
    return torch.where(log_p == -torch.inf, torch.zeros_like(weighted), weighted).sum(0)


def _seen_terms(experiment: Experiment, designs: Mapping[str, Tensor], num_samples: int) -> Tensor | None:
    """Terms with the mass function at the outcomes seen; None where they are many."""
    sample = sample_joint(experiment, num_samples, designs, likelihood=True)
    distinct, index = torch.unique(sample.y, dim=0, return_inverse=True)
    if distinct.shape[0] > MASS_FUNCTION_OUTCOMES:
        return None
    first = torch.full((distinct.shape[0],), num_samples, device=index.device).scatter_reduce(
        0, index, torch.arange(num_samples, device=index.device), reduce="amin"
    )
    outcomes = {site.name: sample.values[site.name][first] for site in experiment.observations}
    log_q = log_marginal(experiment, designs, outcomes, _mass_function_draws(experiment, designs, num_samples))
    assert sample.log_likelihood is not None  # asked for above
    return marginal_terms(sample.log_likelihood, log_q[index])


def _mass_function_draws(experiment: Experiment, designs: Mapping[str, Tensor], num_samples: int) -> ProgramRun:
    draws = MASS_FUNCTION_DRAWS if experiment.program.vectorised else num_samples
    return run_rows(experiment.program, draws, experiment.shapes, designs=designs)

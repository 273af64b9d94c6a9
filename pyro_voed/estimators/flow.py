r"""The flow lower bound: expected information gain by a learned posterior.

For any conditional density q, Barber and Agakov's bound

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}_{p(\theta, y \mid \xi)}\Big[\log \frac{p(\theta \mid y, \xi)}{p(\theta)}\Big]
    \;\ge\; \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q(\theta \mid y, \xi) - \log p(\theta)\big]

is off by the expected Kullback-Leibler divergence from the posterior to q. With q a conditional normalising flow it
can be made tight (vOED-NFs). It needs simulations only, no outcome density.

References:
    Barber and Agakov (2003), "The IM algorithm: a variational approach to information maximization".
    Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational Bayesian optimal experimental design
    with normalizing flows".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.caller_state import isolated
from pyro_voed.checks import Labels
from pyro_voed.estimators.learning import (
    Budget,
    build_density,
    check_sizes,
    default_budget,
    discrete_values,
    draw_training,
    evaluate_terms,
    train_density,
    warn_constant,
)
from pyro_voed.estimators.marginal import marginal_bound
from pyro_voed.estimators.nested import InnerDraws, nested_estimate
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.resolve import resolve
from pyro_voed.results import EIGResult
from pyro_voed.simulate import JointSample, candidate_designs, design_batch_shape, sample_joint
from pyro_voed.sites import Sites
from pyro_voed.training import kept_on_error

PILOT_SIZE = 1_000
NMC_SIZE = 2_000


def ba_terms(log_q: Float[Tensor, "*batch"], log_prior: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return Barber-Agakov terms, nats, whose mean is a lower bound on the expected information gain.

    Args:
        log_q: Log density of the targets that made an outcome, under the learned posterior given that outcome.
        log_prior: Their log prior density, in the same coordinates.

    Example:
        >>> ba_terms(torch.tensor([-0.5]), torch.tensor([-1.5]))
        tensor([1.])
    """
    return log_q - log_prior


class BarberAgakov:
    """The Barber-Agakov objective: terms from a joint sample and a conditional density.

    Example:
        >>> from pyro_voed.densities import SplineCouplingFlow
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> sample = sample_joint(resolve(linear_gaussian()), 64)
        >>> barber_agakov(sample, SplineCouplingFlow(2, 3)).shape
        torch.Size([64])
    """

    bound = "lower"
    needs_likelihood = False

    def __call__(self, sample: JointSample, density: Any) -> Float[Tensor, "num_samples *design_batch"]:
        """Return the terms."""
        if sample.log_prior is None:
            raise ValueError("the sample has no log prior: the model does not state the density of its targets.")
        return ba_terms(density.log_prob(sample.theta, sample.context()), sample.log_prior)


barber_agakov = BarberAgakov()


def eig_flow(
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    designs: Mapping[str, Any] | None = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    prior_entropy: float | None = None,
    density: Any = None,
    summary: nn.Module | None = None,
    marginal: bool = False,
    nmc: bool = False,
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
    """Estimate the expected information gain from below with a conditional normalising flow.

    Args:
        model: A Pyro program of one experiment.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about; default: all other latent sites.
        design_labels: Design sites; default: the explicit `pyro.param` / `PyroParam` sites.
        designs: Candidate designs, `(*design_batch, *shape)` for each label, evaluated with one density that takes
            the design as context; the parameter store is neither read nor changed for them. Default: the one design
            in the store, else the model's initial one.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        prior_entropy: Differential entropy of the targets in nats, for targets whose density the model does not
            state (deterministic ones, or ones drawn given a nuisance site).
        density: A factory `(theta_dim, context_dim) -> density`, or a density; the density of an earlier result is
            trained further (or used as it is, with `num_steps=0`). Default: a spline coupling flow.
        summary: A module from standardised outcomes `(num, y_dim)` to learned statistics `(num, summary_dim)`.
        marginal: Also estimate the marginal upper bound (field `marginal`); needs an outcome density.
        nmc: Also give a nested Monte Carlo reference (field `nmc`); needs an outcome density.
        num_simulations: Train on a fixed pool of this many simulations, part of it kept for validation. Default:
            fresh simulations every step, or a pool of 10,000 where experiments are run one by one.
        num_steps: Train for exactly this many steps. Default: until the bound no longer rises by more than its
            noise, then cool down.
        max_steps: Most steps on fresh simulations.
        batch_size: Experiments a step; default from the dimensions.
        learning_rate: Peak learning rate.
        num_samples: Fresh experiments at each design behind the reported number; default 20,000 shared among the
            designs (at least 2,000 each), 2,000 where experiments are run one by one.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator. Equal seeds give equal results.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The lower bound in nats with its standard error, of the shape of the design batch.

    Raises:
        ValueError: If labels, designs or sizes are wrong, or the model's information gain is undefined.
        NotImplementedError: If a target is discrete, or its density is neither stated nor its entropy given.
        ArithmeticError: If a term is not finite. This error, like any that ends a run, carries the density as last
            trained (`error.density`), with which training can go on.

    References:
        Barber and Agakov (2003); Dong et al. (2025), Eq. 12.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_flow(linear_gaussian(), "y", "theta", num_steps=200, seed=0)
        >>> result.bound, bool(0.9 < result.eig < 1.25)  # exact: 1.199
        ('lower', True)
    """
    check_sizes(num_simulations, num_steps, max_steps, batch_size, learning_rate, num_samples)
    with isolated(seed):
        started = time.perf_counter()
        sites = resolve(
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
        candidates = candidate_designs(sites, designs)
        budget = default_budget(
            sites,
            design_batch_shape(sites, candidates),
            num_simulations=num_simulations,
            num_steps=num_steps,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            num_samples=num_samples,
        )
        result = flow_bound(sites, candidates, budget, density, summary, prior_entropy, progress, started)
        if marginal:
            result = replace(result, marginal=marginal_bound(sites, candidates, budget, None, progress))
        if nmc:
            reference = nested_estimate(
                sites, candidates, NMC_SIZE, InnerDraws(None, 100), estimator="eig_nmc", bound="upper"
            )
            result = replace(result, nmc=reference)
        return replace(result, num_simulations=sites.program.num_calls, seconds=time.perf_counter() - started)


def flow_bound(
    sites: Sites,
    designs: Mapping[str, Tensor],
    budget: Budget,
    density: Any,
    summary: nn.Module | None,
    prior_entropy: float | None,
    progress: bool | None,
    started: float,
) -> EIGResult:
    """Train and evaluate the flow bound on a resolved model, inside `isolated`."""
    check_flow_targets(sites, prior_entropy)
    prepare = stated_prior(prior_entropy)
    batch = design_batch_shape(sites, designs)
    with torch.no_grad():
        pool = None
        if budget.num_simulations is not None and budget.num_steps != 0:
            pool = prepare(sample_joint(sites, max(4, budget.num_simulations // batch.numel()), designs))
        pilot = (
            pool if pool is not None else prepare(draw_training(sites, _pilot_size(sites), designs, likelihood=False))
        )
    warn_constant(sites, pilot)
    trained = build_density(
        density,
        pilot.theta.reshape(-1, pilot.theta.shape[-1]),
        pilot.context().reshape(-1, pilot.context().shape[-1]),
        num_designs=0 if pilot.designs is None else pilot.designs.shape[-1],
        summary=summary,
        discrete=discrete_values(sites),
    )
    history = None
    trained.eval()
    with kept_on_error(lambda: {"density": trained}):
        if budget.num_steps != 0:
            history = train_density(
                sites,
                trained,
                barber_agakov,
                budget,
                designs,
                likelihood=False,
                prepare=prepare,
                pool=pool,
                progress=progress,
                description="eig_flow",
            )
        terms, outcome_range = evaluate_terms(
            sites,
            lambda sample: barber_agakov(prepare(sample), trained),
            budget.num_samples,
            designs,
            likelihood=False,
            estimator="eig_flow",
        )
    eig, standard_error = mean_and_standard_error(terms)
    return EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound="lower",
        estimator="eig_flow",
        num_simulations=sites.program.num_calls,
        num_samples=budget.num_samples,
        seconds=time.perf_counter() - started,
        designs=designs,
        target_labels=sites.target_labels,
        observation_labels=sites.observation_labels,
        nuisance_labels=tuple(site.name for site in sites.nuisance),
        history=history,
        density=trained,
        sites=sites,
        observation_range=outcome_range,
    )


def check_flow_targets(sites: Sites, prior_entropy: float | None) -> None:
    """Raise NotImplementedError where a flow over the targets gives no bound."""
    endless = [site.name for site in sites.targets if site.is_discrete and site.support_values is None]
    if endless:
        raise NotImplementedError(
            f"targets {endless} are discrete without finitely many values of their own, so no classifier can stand for "
            "their posterior. Use eig_nmc or eig_marginal, which only need the outcome's density, or other targets."
        )
    if sites.has_log_prior or prior_entropy is not None:
        return
    leaking = ", ".join(f"'{name}' is drawn given '{parent}'" for name, parent in sites.leaking_nuisance.items())
    unstated = [site.name for site in sites.targets if not site.has_density]
    why = leaking or f"{unstated} have no log density"
    raise NotImplementedError(
        f"the model does not state the prior density of the targets: {why}. Make what they are drawn given a target "
        "too, or give the targets' entropy in nats as prior_entropy=."
    )


def stated_prior(prior_entropy: float | None) -> Callable[[JointSample], JointSample]:
    """Return a function that puts a given prior entropy where the model states no density."""
    if prior_entropy is None:
        return lambda sample: sample
    entropy = prior_entropy

    def prepare(sample: JointSample) -> JointSample:
        # E[log q(theta)] + H[theta], the density of q taken in the targets' own coordinates.
        return replace(sample, log_prior=sample.log_det - entropy)

    return prepare


def _pilot_size(sites: Sites) -> int:
    return PILOT_SIZE if sites.program.vectorised else 200

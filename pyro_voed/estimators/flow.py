r"""The flow lower bound: expected information gain by a learned posterior.

For any conditional density q, Barber and Agakov's bound

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}_{p(\theta, y \mid \xi)}\Big[\log \frac{p(\theta \mid y, \xi)}{p(\theta)}\Big]
    \;\ge\; \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q(\theta \mid y, \xi) - \log p(\theta)\big]

is off by the expected Kullback-Leibler divergence from the posterior to q. With q a conditional normalising flow it
can be made tight (vOED-NFs). It needs simulations only, no outcome density. Of the targets it needs the prior density,
or their entropy; with neither a density of them is learned too, whose divergence from the prior is added, upwards, and
no side is left (`learned_prior`).

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

from pyro_voed.certificates.certificate import MOST_SIMULATIONS, certified, check_request
from pyro_voed.checks import Labels, check_positive
from pyro_voed.estimators.learning import check_sizes, default_budget
from pyro_voed.estimators.marginal import marginal_bound
from pyro_voed.estimators.nested import InnerDraws, nested_estimate
from pyro_voed.estimators.posterior_bound import flow_bound
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.resolve import resolve
from pyro_voed.experiment.simulate import candidate_designs, design_batch_shape
from pyro_voed.results import EIGResult

NMC_SIZE = 2_000


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
    learn_prior: bool = False,
    density: Any = None,
    summary: Summary = None,
    marginal: bool = False,
    nmc: bool = False,
    certify: bool = False,
    width: float = 0.05,
    confidence: float = 0.95,
    num_simulations: int | None = None,
    redraw_outcomes: bool = True,
    ensemble: bool = False,
    num_steps: int | None = None,
    max_steps: int = 10_000,
    batch_size: int | None = None,
    learning_rate: float | Sequence[float] = 2e-3,
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
        learn_prior: For such targets, learn their density first, from as many simulations again (or the same pool).
            Its divergence from the prior is added to the estimate, which then has no side (`bound` is "neither").
            Without effect where the model states the density.
        density: A factory `(theta_dim, context_dim) -> density`, or a density; the density of an earlier result is
            trained further (or used as it is, with `num_steps=0`). Default: a spline coupling flow.
        summary: A module from standardised packed outcomes `(num, y_dim)` to learned statistics `(num, summary_dim)`,
            such as those of `pyro_voed.summaries`, or a mapping from outcome sites to such modules. Default: picked
            from the outcome's plates and shape, a set network for exchangeable rows; `torch.nn.Identity()` for none.
        marginal: Also estimate the marginal upper bound (field `marginal`); needs an outcome density.
        nmc: Also give a nested Monte Carlo reference (field `nmc`); needs an outcome density.
        certify: Also give a certified two-sided interval (field `interval`); needs an outcome density.
        width: Width asked for of the interval, nats.
        confidence: Probability with which the interval holds the truth.
        num_simulations: Train on a fixed pool of this many simulations, part of it kept for validation. Default:
            fresh simulations every step, or a pool of 10,000 where experiments are run one by one.
        redraw_outcomes: Where outcomes are a forward map plus explicit noise, run that map once for each experiment
            of the pool and draw its outcomes anew for every pass; False keeps each experiment's one outcome.
        ensemble: Over a batch of designs, train one density for each design, all stacked, rather than one that takes
            the design as context.
        num_steps: Train for exactly this many steps. Default: until the bound no longer rises by more than its
            noise, then cool down.
        max_steps: Most steps on fresh simulations.
        batch_size: Experiments a step; default from the dimensions.
        learning_rate: Peak learning rate; or several, of which the best is chosen (in an ensemble for each design):
            trained side by side on the same fresh simulations, or one after the other on the same pool, compared on
            validation draws, and reported on others.
        num_samples: Fresh experiments at each design behind the reported number; default 20,000 shared among the
            designs (at least 2,000 each), 2,000 where experiments are run one by one.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator. Equal seeds give equal results.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The lower bound in nats with its standard error, of the shape of the design batch; with a learned prior density
        an estimate that may err to either side.

    Raises:
        ValueError: If labels, designs or sizes are wrong, or the model's information gain is undefined; if a prior
            density is to be learned and the entropy is given, or nothing is to be trained.
        NotImplementedError: If a target is discrete without finitely many values, or the density of the targets is
            neither stated nor learned, nor their entropy given.
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
    rates = _rates(learning_rate)
    check_sizes(num_simulations, num_steps, max_steps, batch_size, max(rates), num_samples)
    if learn_prior and (prior_entropy is not None or num_steps == 0):
        raise ValueError(
            "learn_prior: give either prior_entropy= or learn_prior=True, which needs steps to train. With num_steps=0 "
            "there is no density of the targets to use as it is."
        )
    if certify:
        check_request(width, confidence, MOST_SIMULATIONS)
    with isolated(seed):
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
        candidates = candidate_designs(experiment, designs)
        budget = default_budget(
            experiment,
            design_batch_shape(experiment, candidates),
            num_simulations=num_simulations,
            num_steps=num_steps,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=rates if len(rates) > 1 else rates[0],
            num_samples=num_samples,
            ensemble=ensemble,
        )
        budget = replace(budget, redraw_outcomes=redraw_outcomes)
        result = flow_bound(
            experiment,
            candidates,
            budget,
            density,
            summary,
            prior_entropy,
            progress,
            started,
            learn_prior=learn_prior,
            ensemble=ensemble,
        )
        if marginal:
            result = replace(result, marginal=marginal_bound(experiment, candidates, budget, None, progress))
        if nmc:
            reference = nested_estimate(
                experiment, candidates, NMC_SIZE, InnerDraws(None, 100), estimator="eig_nmc", bound="upper"
            )
            result = replace(result, nmc=reference)
        if certify:
            result = certified(result, width, confidence, MOST_SIMULATIONS)
        return replace(result, num_simulations=experiment.program.num_calls, seconds=time.perf_counter() - started)


def _rates(learning_rate: Any) -> tuple[float, ...]:
    given = tuple(learning_rate) if isinstance(learning_rate, Sequence) else (learning_rate,)
    if not given:
        raise ValueError("learning_rate: expected a positive number or several, got none.")
    return tuple(float(check_positive(rate, "learning_rate")) for rate in given)

r"""Posterior of one outcome by the No-U-Turn sampler: the reference that flows are held against.

For an outcome y at a design xi the sampler explores all latent sites,

.. math::
    p(\phi \mid y, \xi) \propto p(y \mid \phi, \xi)\, p(\phi), \qquad u = T_\phi^{-1}(\phi), \quad
    U(u) = -\log p(y, \phi) - \log \lvert \det \partial\phi / \partial u \rvert ,

in unconstrained coordinates u. Pyro takes the bijections T from one trace and keeps them, which is wrong where the
bounds of one site depend on another; so they are applied inside the model here, at every run.

Chains run one after the other in this process, from draws of the prior, which is wider than the posterior as R-hat
wants its starting points. (Pyro's parallel chains fork or pickle the model, which closures often do not survive.)

References:
    M. D. Hoffman and A. Gelman (2014), The No-U-Turn sampler. Journal of Machine Learning Research 15.
    A. Gelman et al. (2013), Bayesian data analysis, 3rd edition, section 11.4 (split R-hat, effective sample size).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from jaxtyping import Bool
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_voed.checks import Labels, check_count, check_positive, warn
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.designs import design_batch_shape
from pyro_voed.experiment.experiment import Experiment, as_experiment
from pyro_voed.experiment.programs import (
    Assign,
    base_distribution,
    is_plate,
    run_rows,
    support_transform,
)
from pyro_voed.inference.outcomes import check_outcome, deterministic_outcomes, like_simulated, to_inference_data
from pyro_voed.results import PosteriorSample

MAX_R_HAT = 1.05
MIN_EFFECTIVE_SAMPLE_SIZE = 100


def nuts_posterior(
    model: Callable[..., Any] | Experiment,
    observations: Tensor | Mapping[str, Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    num_warmup: int = 500,
    num_chains: int = 2,
    target_accept_prob: float = 0.8,
    jit_compile: bool = False,
    seed: int | None = None,
    progress: bool | None = None,
) -> PosteriorSample:
    """Draw from the posterior of one outcome with NUTS.

    All latent sites are sampled, the targets are returned. Warns, naming the sites, where R-hat exceeds 1.05, an
    effective sample size falls below 100, or a transition diverged.

    Args:
        model: A Pyro program of one experiment.
        observations: The outcome, of one experiment's shape: a dict by site, or a tensor where there is one site.
        observation_labels: Outcome sites; default: the sites given with `obs=`, whose own data are ignored.
        target_labels: Sites to return, deterministic ones too; default: all latent sites.
        designs: The design of the outcome, one value a label; default: the store's, else the model's initial one. The
            store is not touched.
        num_samples: Draws kept of each chain, at least 4.
        num_warmup: Draws of each chain that adapt the sampler and are dropped.
        num_chains: Chains, run one after the other.
        target_accept_prob: Acceptance that the step size is adapted to, in (0, 1); raise it where transitions diverge.
        jit_compile: Compile the log density with the JIT, about twice as fast for models without Python control flow.
        seed: Seed; None draws one from the global generator. Equal seeds give equal draws.
        progress: Show a progress bar for each chain; None shows them on a terminal only.

    Returns:
        Draws `(num_chains, num_samples, *shape)` of each target, with diagnostics.

    Raises:
        ValueError: If labels, designs, sizes or the outcome's shape are wrong, or a measured value is not finite.
        NotImplementedError: If the outcome has no density or a latent site is discrete.

    References:
        Hoffman and Gelman (2014).

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> outcome = torch.tensor([1.0, 2.0, 4.0])
        >>> posterior = nuts_posterior(linear_gaussian(), outcome, "y", num_samples=150, num_warmup=100, seed=0)
        >>> posterior.values["theta"].shape, posterior.num_divergences
        (torch.Size([2, 150, 2]), 0)
    """
    check_count(num_samples, "num_samples", minimum=4)
    check_count(num_warmup, "num_warmup")
    check_count(num_chains, "num_chains")
    if check_positive(target_accept_prob, "target_accept_prob") >= 1:
        raise ValueError(f"target_accept_prob: expected a number in (0, 1), got {target_accept_prob}.")
    with isolated(seed):
        started = time.perf_counter()
        # Before the experiment is read, which would ask for the targets first.
        _refuse_implicit(deterministic_outcomes(model, observation_labels))
        # Chains never run rows together, so a model need not be batch-friendly for its reference posterior.
        experiment, values = as_experiment(model, observation_labels, target_labels, designs, vectorize=False)
        _check_sampleable(experiment)
        if batch := design_batch_shape(experiment, values):
            raise ValueError(f"designs: expected the one design of the outcome, got a batch of shape {tuple(batch)}.")
        observed = check_outcome(experiment, observations)
        with torch.no_grad():
            run = run_rows(experiment.program, 1, experiment.shapes, designs=values)
        conditioned = _conditioned(experiment, like_simulated(experiment, run, observed), values)
        disable_bar = not (sys.stderr.isatty() if progress is None else progress)
        chains, flags = [], []
        for chain_seed in torch.randint(2**31 - 1, (num_chains,)).tolist():
            kernel = NUTS(
                conditioned,
                target_accept_prob=target_accept_prob,
                jit_compile=jit_compile,
                ignore_jit_warnings=True,
                init_strategy=init_to_sample,
            )
            samples, diverging = _run_chain(kernel, num_samples, num_warmup, chain_seed, disable_bar)
            chains.append(_targets(experiment, conditioned, samples))
            flags.append(diverging)
        draws = {name: torch.stack([chain[name] for chain in chains]) for name in experiment.target_labels}
        diverging = torch.stack(flags)
        num_divergences = int(diverging.sum())
        r_hat, effective = mixing(draws)
        _warn_mixing(r_hat, effective, num_divergences)
        return PosteriorSample(
            values=draws,
            observations=observed,
            method="NUTS",
            seconds=time.perf_counter() - started,
            effective_sample_size=effective,
            r_hat=r_hat,
            num_divergences=num_divergences,
            inference_data=to_inference_data(draws, observed, diverging),
        )


def mixing(draws: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return split R-hat and effective sample size of each site's elements; NaN where an element never changes.

    Args:
        draws: Draws of each site, `(num_chains, num_draws, *shape)`.

    Example:
        >>> r_hat, effective = mixing({"theta": torch.randn(4, 500)})
        >>> bool(r_hat["theta"] < 1.05), bool(effective["theta"] > 1000)
        (True, True)
    """
    # Sums over thousands of draws whose spread is far smaller than their size need double precision.
    double = {name: value.double() for name, value in draws.items()}
    r_hat = {name: split_gelman_rubin(value) for name, value in double.items()}
    return r_hat, {name: _effective_sample_size(value) for name, value in double.items()}


def _effective_sample_size(draws: Tensor) -> Tensor:
    # Element by element: one that never changes would turn Pyro's answer for all the others into NaN.
    flat = draws.reshape(*draws.shape[:2], -1)
    varying = (flat != flat[:1, :1]).any(1).all(0)
    effective = flat.new_full((flat.shape[-1],), torch.nan)
    for element in varying.nonzero().flatten().tolist():
        effective[element] = effective_sample_size(flat[..., element])
    return effective.reshape(draws.shape[2:])


class _RealCoordinates(Messenger):
    """Let a sampler see every latent site on the real line, with bijections made afresh at every run."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or is_plate(msg):
            return
        fn = msg["fn"]
        if isinstance(base_distribution(fn), dist.Delta):
            # A guide used as prior hands its draws on like this; nothing is left to sample. Its log density there is
            # the Jacobian of the hand-over, which the coordinates that are sampled, real already, must not get again.
            msg["value"] = fn()
            msg["fn"] = dist.Delta(msg["value"], event_dim=fn.event_dim)
        elif _is_real(fn.support):
            return
        else:
            to_support = support_transform(fn)
            real = dist.TransformedDistribution(fn, [to_support.inv])
            msg["value"] = to_support(pyro.sample(_real_name(msg["name"]), real))
            msg["fn"] = dist.Delta(msg["value"], event_dim=fn.event_dim)
        msg["is_observed"] = True


def _real_name(name: str) -> str:
    return f"_{name}_unconstrained"


def _is_real(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def _conditioned(
    experiment: Experiment, observed: Mapping[str, Tensor], designs: Mapping[str, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    """Return the model of the posterior, whose latent sites are real; a run returns the targets."""
    program = pyro.condition(experiment.program.call, data=dict(observed))
    fixed = {**experiment.program.constants, **designs}

    def posterior_model() -> dict[str, Tensor]:
        with ExitStack() as handlers:
            if fixed:
                handlers.enter_context(poutine.substitute(data=fixed))
            handlers.enter_context(_RealCoordinates())
            recorder = handlers.enter_context(poutine.trace())
            program()
        return {name: recorder.trace.nodes[name]["value"] for name in experiment.target_labels}

    return posterior_model


def _run_chain(
    kernel: NUTS, num_samples: int, num_warmup: int, seed: int, disable_bar: bool
) -> tuple[dict[str, Tensor], Bool[Tensor, " num_samples"]]:
    """Return a chain's draws `(num_samples, *shape)` by latent site, and which transitions diverged."""
    pyro.set_rng_seed(seed)
    sampler = MCMC(kernel, num_samples, num_warmup, disable_progbar=disable_bar)
    with torch.enable_grad():
        sampler.run()
    diverging = torch.zeros(num_samples, dtype=torch.bool)
    diverging[list(sampler.diagnostics()["divergences"]["chain 0"])] = True
    return {name: draws.detach() for name, draws in sampler.get_samples().items()}, diverging


def _targets(
    experiment: Experiment, conditioned: Callable[[], dict[str, Tensor]], samples: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the targets' draws `(num_draws, *shape)`: sampled as they are, or computed by the model from what is."""
    if set(experiment.target_labels) <= set(samples):
        targets = {name: samples[name] for name in experiment.target_labels}
    else:
        rows = []
        with torch.no_grad(), pyro.validation_enabled(False):
            for index in range(len(next(iter(samples.values())))):
                with poutine.block(), Assign({name: value[index] for name, value in samples.items()}):
                    rows.append(conditioned())
        targets = {name: torch.stack([row[name] for row in rows]) for name in experiment.target_labels}
    for site in experiment.targets:
        if targets[site.name].shape[1:] != site.shape:
            raise NotImplementedError(
                f"site '{site.name}': NUTS returned draws of shape {tuple(targets[site.name].shape[1:])}, where one "
                f"experiment has {tuple(site.shape)}. Something in the model is enumerated; use flow_posterior."
            )
    return targets


def _refuse_implicit(names: Sequence[str]) -> None:
    if names:
        raise NotImplementedError(
            f"outcomes {list(names)} have no density given the latent sites, which NUTS needs. Train a flow with "
            "eig_flow, which needs simulations only, and use flow_posterior."
        )


def _check_sampleable(experiment: Experiment) -> None:
    _refuse_implicit([site.name for site in experiment.observations if not site.has_density])
    latent = [
        site
        for site in (*experiment.targets, *experiment.others)
        if not site.is_deterministic and site.role != "history"
    ]
    discrete = [site.name for site in latent if site.is_discrete]
    if discrete:
        raise NotImplementedError(
            f"latent sites {discrete} are discrete: NUTS moves along gradients, and Pyro's enumeration of them changes "
            "the shapes of other sites. Sum them out in the model, or use flow_posterior for continuous targets."
        )


def _warn_mixing(r_hat: Mapping[str, Tensor], effective: Mapping[str, Tensor], num_divergences: int) -> None:
    found = []
    for name in r_hat:
        # Some elements are constant by nature (a Cholesky factor's zeros), a site that never moves is not.
        moved = ~r_hat[name].isnan()
        if not moved.any():
            found.append(f"'{name}' never moved")
            continue
        worst, fewest = r_hat[name][moved].max().item(), effective[name][moved].min().item()
        if worst > MAX_R_HAT:
            found.append(f"'{name}' has R-hat {worst:.3f}")
        if not fewest >= MIN_EFFECTIVE_SAMPLE_SIZE:
            found.append(f"'{name}' has an effective sample size of {fewest:.0f}")
    if num_divergences:
        found.append(f"{num_divergences} transitions of sites {list(r_hat)} diverged")
    if found:
        warn(
            f"NUTS did not mix well, so its draws are no reference: {'; '.join(found)}. Raise num_samples and "
            "num_warmup, raise target_accept_prob against divergences, or reparametrise the model.",
        )

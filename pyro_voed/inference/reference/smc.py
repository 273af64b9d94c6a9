r"""Posterior of one outcome by sequential Monte Carlo: the reference for several modes, with the evidence.

Particles u, all latent sites in unconstrained coordinates, start as draws of the prior and pass through

.. math::
    \pi_t(u) \propto p(u)\, p(y \mid u, \xi)^{\lambda_t}, \qquad 0 = \lambda_0 < \lambda_1 < \dots < \lambda_T = 1 .

A stage reweights, resamples and moves them. The weights :math:`p(y \mid u)^{\lambda_t - \lambda_{t-1}}` are those of
the next power, at which a given share of the particles is still effective; their means multiply up to an estimate of
the evidence :math:`p(y \mid \xi)`. Moves are Metropolis steps along the difference of a random pair of the resampled
particles: symmetric, and shaped like the posterior around each mode, where one covariance for all modes would be far
too wide.

The effective sample size counts what the particles owe to common ancestors, usually those of the prior: descendants
that have moved apart count as many draws, those that have not as one. It is held against the spread of the means of
independent runs, which also sees what all particles of a run share. `smc_terms` has the formulas and their sources.

References:
    P. Del Moral, A. Doucet and A. Jasra (2006), Sequential Monte Carlo samplers. JRSS B 68.
    N. Chopin (2002), A sequential particle filter method for static models. Biometrika 89.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_voed.checks import Labels, check_count, check_share, warn
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import ProgramRun
from pyro_voed.inference.reference.conditioned import between_runs, conditioned, mixing_faults
from pyro_voed.inference.reference.latents import Latents, latents_of
from pyro_voed.inference.reference.smc_terms import (
    Particles,
    combined_evidence,
    effective_size,
    far_ancestors,
    gaussian_log_scale,
    move_particles,
    next_temperature,
    stratified_ancestors,
)
from pyro_voed.monte_carlo import log_mean_exp
from pyro_voed.posterior_sample import PosteriorSample

MIN_ACCEPTANCE = 0.03


def smc_posterior(
    model: Callable[..., Any] | Experiment,
    observations: Tensor | Mapping[str, Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    num_particles: int = 2_000,
    num_runs: int = 4,
    effective_share: float = 0.5,
    max_moves: int = 100,
    seed: int | None = None,
) -> PosteriorSample:
    """Draw from the posterior of one outcome with sequential Monte Carlo, and estimate the evidence.

    All latent sites are sampled, the targets are returned. Warns, naming the sites, where R-hat between runs exceeds
    1.05, runs disagree by more than their own errors, or an effective sample size falls below 100; and where fewer than
    3 % of a stage's steps are accepted, or its moves end at `max_moves`.

    Args:
        model: This and `observations`, labels, `designs` and `seed`: as in `nuts_posterior`.
        num_particles: Particles of each run, at least 50 and more than twice the latent coordinates.
        num_runs: Independent runs, at least 2, from which R-hat and the error of the evidence come.
        effective_share: Share of the particles that reweighting leaves effective, in (0, 1); larger takes more stages.
        max_moves: Most moves of one stage.

    Returns:
        Draws `(num_runs, num_particles, *shape)` of each target, with the log evidence and its standard error (the
        larger of what the runs' spread and their weights say; the logarithm errs downwards, by half its variance),
        temperatures and acceptance rates of the stages, and diagnostics.

    Raises:
        ValueError: As for `nuts_posterior`.
        NotImplementedError: If outcomes or latent sites have no density, or a latent site is discrete.
        ArithmeticError: If a log density is NaN or infinite, or no draw of the prior explains the outcome at all.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> outcome = torch.tensor([1.0, 2.0, 1.5])
        >>> posterior = smc_posterior(linear_gaussian(), outcome, "y", num_particles=500, seed=0)
        >>> posterior.values["theta"].shape
        torch.Size([4, 500, 2])
        >>> abs(posterior.log_evidence + 4.825) < 4 * posterior.log_evidence_error
        True
    """
    check_count(num_particles, "num_particles", minimum=50)
    check_count(num_runs, "num_runs", minimum=2)
    check_count(max_moves, "max_moves")
    check_share(effective_share, "effective_share")
    with isolated(seed):
        case = conditioned(model, observations, observation_labels, target_labels, designs, scored_by="SMC")
        with torch.no_grad(), pyro.validation_enabled(False):
            latents = latents_of(case)
            if num_particles <= 2 * sum(latents.sizes):
                raise ValueError(
                    f"num_particles: expected more than twice the {sum(latents.sizes)} latent coordinates, got "
                    f"{num_particles}. Differences of fewer particles may not span the space."
                )
            runs = [_run(latents, num_particles, effective_share, max_moves) for _ in range(num_runs)]
            chains = [latents.targets(run.theta) for run in runs]
        draws = {name: torch.stack([chain[name] for chain in chains]) for name in case.experiment.target_labels}
        r_hat = between_runs(draws)
        judged = {name: effective_size(value, [run.ancestors for run in runs]) for name, value in draws.items()}
        effective = {name: size for name, (size, _) in judged.items()}
        disagreeing = [name for name, (_, disagree) in judged.items() if disagree.any()]
        _warn_mixing(mixing_faults(effective, r_hat), disagreeing, runs)
        log_evidence, error = combined_evidence(
            torch.stack([run.log_evidence for run in runs]), torch.stack([run.relative_variance for run in runs])
        )
        return case.sample(
            "SMC",
            draws,
            effective,
            r_hat=r_hat,
            log_evidence=log_evidence,
            log_evidence_error=error,
            acceptance_rate=tuple(run.acceptance_rate for run in runs),
            temperatures=tuple(run.temperatures for run in runs),
            num_simulations=case.experiment.num_calls,
        )


@dataclass(frozen=True)
class _Run:
    """One run's particles, each one's ancestor, and what happened at each stage."""

    theta: Float[Tensor, "num_particles dim"]
    ancestors: Int[Tensor, " num_particles"]
    log_evidence: Float[Tensor, ""]
    relative_variance: Float[Tensor, ""]
    temperatures: Float[Tensor, " num_stages"]
    acceptance_rate: Float[Tensor, " num_stages"]
    ended_early: bool


def _densities(latents: Latents, run: ProgramRun) -> tuple[Float[Tensor, " num_rows"], Float[Tensor, " num_rows"]]:
    """Return log prior of the coordinates and log likelihood, nats, double precision; either may be -inf."""
    log_priors = latents.log_priors(run)
    for name, terms in log_priors.items():
        _check_density(terms, f"the prior of latent site '{name}'")
    log_prior = torch.stack(list(log_priors.values())).double().sum(0)
    # Where the prior has no mass the likelihood may be anything, and models overflow there.
    possible = log_prior > -torch.inf
    log_likelihood = latents.log_likelihood(run).double()
    _check_density(log_likelihood[possible], f"the likelihood of outcome {list(latents.outcome)}")
    return log_prior, torch.where(possible, log_likelihood, -torch.inf)


def _check_density(terms: Tensor, what: str) -> None:
    if bad := int((terms.isnan() | (terms == torch.inf)).sum()):
        raise ArithmeticError(
            f"SMC: the log density of {what} is NaN or infinite at {bad} of {len(terms)} particles. Where values "
            "overflow, double precision in the model helps."
        )


def _run(latents: Latents, num_particles: int, effective_share: float, max_moves: int) -> _Run:
    drawn = latents.run(num_particles)
    theta = latents.coordinates(drawn)
    log_prior, log_likelihood = _densities(latents, drawn)
    log_evidence = relative_variance = theta.new_zeros((), dtype=torch.double)
    log_scale = gaussian_log_scale(theta)
    temperatures, rates, ended = [0.0], [], []
    lineages: list[Tensor] = []
    while temperatures[-1] < 1.0:
        temperature = next_temperature(log_likelihood, temperatures[-1], effective_share)
        log_weights = (temperature - temperatures[-1]) * log_likelihood
        weights = (log_weights - log_weights.max()).exp()
        log_evidence = log_evidence + log_mean_exp(log_weights)
        relative_variance = relative_variance + weights.var() / weights.mean().square() / num_particles
        chosen = stratified_ancestors(weights)
        lineages = [earlier[chosen] for earlier in lineages] + [chosen]
        moved = move_particles(
            Particles(theta[chosen], log_prior[chosen], log_likelihood[chosen]),
            lambda rows: _densities(latents, latents.run(len(rows), rows)),
            temperature,
            log_scale,
            max_moves=max_moves,
        )
        theta, log_prior, log_likelihood = vars(moved.particles).values()
        log_scale = moved.log_scale
        temperatures.append(temperature)
        rates.append(moved.acceptance_rate)
        ended.append(moved.ended_early)
    return _Run(
        theta=theta,
        ancestors=far_ancestors(lineages),
        log_evidence=log_evidence,
        relative_variance=relative_variance,
        temperatures=torch.tensor(temperatures[1:]),
        acceptance_rate=torch.tensor(rates),
        ended_early=any(ended),
    )


def _warn_mixing(found: list[str], disagreeing: Sequence[str], runs: Sequence[_Run]) -> None:
    found += [f"the runs' means of '{name}' differ by more than their own errors" for name in disagreeing]
    lowest = min(float(run.acceptance_rate.min()) for run in runs)
    if lowest < MIN_ACCEPTANCE:
        found.append(f"at one temperature {lowest:.1%} of the steps were accepted")
    if any(run.ended_early for run in runs):
        found.append("moves ended at max_moves while particles were still getting away")
    if found:
        warn(
            f"SMC did not mix well, so its draws are no reference: {'; '.join(found)}. Raise num_particles, "
            "effective_share or max_moves, or reparametrise the model."
        )

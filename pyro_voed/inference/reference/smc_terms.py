r"""What sequential Monte Carlo computes of its particles: powers, ancestors, moves, and the errors of its answers.

Particles :math:`u_1, \dots, u_N`, in real coordinates, stand at
:math:`\pi_t(u) \propto p(u)\, p(y \mid u)^{\lambda_t}`; `smc` says what for. Here a model is its log densities.

The next power :math:`\lambda_{t+1}` is the largest up to 1 that leaves the weights
:math:`w_i = p(y \mid u_i)^{\lambda_{t+1} - \lambda_t}` a given effective share :math:`(\sum w)^2 / (N \sum w^2)`, found
by bisection. Resampling is stratified. Moves are Metropolis steps

.. math::
    u_i' = u_i + \gamma_i (v_j - v_k), \qquad \log \gamma_i \sim N(\log \gamma, 0.5^2),

with v the particles as they were resampled and j, k a random pair. One step in ten takes :math:`\gamma_i = 1`, which
carries particles from mode to mode. :math:`\log \gamma` becomes the mean of :math:`\log \gamma_i` weighted by the
acceptance probability times :math:`\gamma_i`, at most that of :math:`2.38 / \sqrt{2 d}`, the best for a Gaussian. Moves
end once 90 % of the particles have accepted a step and the median distance from where they stood grows by less than 2 %
a step.

With D the deviations from the run's mean and :math:`n_a` the number of descendants of ancestor a,

.. math::
    V = \frac{1}{N^2 (1 - \sum_a n_a^2 / N^2)} \sum_a \Big(\sum_{i:\ \text{ancestor } a} D_i\Big)^2

estimates the variance of a run's mean, over ancestors as far back as 30 effective ones are left.

References:
    A. Buchholz, N. Chopin and P. E. Jacob (2021), Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte
    Carlo. Bayesian Analysis 16 (powers by bisection, moves until distances stop growing).
    C. J. F. ter Braak (2006), A Markov chain Monte Carlo version of the genetic algorithm differential evolution.
    Statistics and Computing 16 (differences of pairs as steps).
    R. Douc, O. Cappe and E. Moulines (2005), Comparison of resampling schemes for particle filtering. ISPA.
    P. Fearnhead and B. M. Taylor (2013), An adaptive sequential Monte Carlo sampler. Bayesian Analysis 8 (step sizes).
    A. Lee and N. Whiteley (2018), Variance estimation in the particle filter. Biometrika 105; J. Olsson and R. Douc
    (2019), Numerically stable online estimation of variance in particle filters. Bernoulli 25 (ancestors, lagged).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_voed.monte_carlo import log_mean_exp

FEWEST_ANCESTORS = 30
SHARE_MOVED, GROWTH = 0.9, 0.02
LOG_STEP_SPREAD, SHARE_OF_JUMPS = 0.5, 0.1
DISAGREEMENT = 1e-4
"""Runs disagree where their means spread as they do one time in 10,000 by chance."""


PerParticle = Float[Tensor, " num_particles"]
Ancestors = Int[Tensor, " num_particles"]
PerRun = Float[Tensor, " num_runs"]


def next_temperature(log_likelihood: PerParticle, temperature: float, effective_share: float) -> float:
    """Return the largest power up to 1 whose weights leave the given share of the particles effective.

    The share, in (0, 1), is of those particles that the outcome does not rule out (log likelihood -inf).
    """
    possible = log_likelihood[log_likelihood > -torch.inf]
    if len(possible) == 0:
        raise ArithmeticError(
            f"SMC: the outcome has density 0 under all of {len(log_likelihood)} draws of the prior. Check the outcome "
            "and its units, or take more particles."
        )

    def share(step: float) -> float:
        log_weights = step * possible
        log_effective = 2.0 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2.0 * log_weights, 0)
        return float(log_effective.exp()) / len(possible)

    low, high = 0.0, 1.0 - temperature
    if share(high) >= effective_share:
        return 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= effective_share else (low, middle)
    if temperature + low <= temperature:
        raise ArithmeticError(
            f"SMC: log likelihoods differ by up to {float(possible.max() - possible.min()):.3g} nats, so no power "
            f"above {temperature:.3g} leaves {effective_share:.0%} of the particles effective. Check the "
            "scale of the noise."
        )
    return temperature + low


def stratified_ancestors(weights: PerParticle) -> Ancestors:
    """Draw an ancestor for each particle, one from each of as many equal strata of the weights' distribution.

    The variance is at most that of independent draws, for any weights; these need not add up to one.
    """
    size = len(weights)
    ends = weights.double().cumsum(0)
    offsets = torch.arange(size, dtype=torch.double, device=weights.device)
    points = (offsets + torch.rand_like(offsets)) * (ends[-1] / size)
    # Rounding may put the last point on the last end; the last particle of positive weight takes it.
    return torch.searchsorted(ends, points, right=True).clamp(max=int(weights.nonzero().max()))


@dataclass(frozen=True)
class Particles:
    """Equally weighted particles in real coordinates, and their log densities, nats."""

    theta: Float[Tensor, "num_particles dim"]
    log_prior: PerParticle
    log_likelihood: PerParticle


@dataclass(frozen=True)
class Moved:
    """Particles after the moves of one stage, the mean log step size arrived at, and how the moves went."""

    particles: Particles
    log_scale: float
    acceptance_rate: float
    ended_early: bool


def move_particles(
    particles: Particles,
    densities: Callable[[Tensor], tuple[Tensor, Tensor]],
    temperature: float,
    log_scale: float,
    *,
    max_moves: int,
) -> Moved:
    """Move particles at one temperature until most have moved and they get no further from where they stood.

    `densities` maps coordinates `(num_particles, dim)` to log prior and log likelihood `(num_particles,)`, nats.

    Example:
        >>> def densities(theta):
        ...     return -0.5 * theta.square().sum(-1), -0.5 * (theta - 1.0).square().sum(-1)
        >>> theta = 0.5 + math.sqrt(0.5) * torch.randn(2000, 1)
        >>> moved = move_particles(Particles(theta, *densities(theta)), densities, 1.0, 0.0, max_moves=50)
        >>> bool((moved.particles.theta.mean() - 0.5).abs() < 0.1), moved.ended_early
        (True, False)
    """
    start, size = particles.theta, len(particles.theta)
    spread = start.std(0).clamp_min(torch.finfo(start.dtype).tiny)
    ever = torch.zeros(size, dtype=torch.bool, device=start.device)
    distance, rates = 0.0, []
    for _ in range(max_moves):
        log_steps = log_scale + LOG_STEP_SPREAD * torch.randn(size, dtype=torch.double, device=start.device)
        jumps = torch.rand(size, device=start.device) < SHARE_OF_JUMPS
        steps = torch.where(jumps, 1.0, log_steps.exp()).to(start.dtype).unsqueeze(-1)
        proposed = particles.theta + steps * (start[_random_rows(size, start)] - start[_random_rows(size, start)])
        log_prior, log_likelihood = densities(proposed)
        change = log_prior - particles.log_prior + temperature * (log_likelihood - particles.log_likelihood)
        probability = change.exp().clamp(max=1.0)
        accepted = torch.rand_like(change) < probability
        particles = Particles(
            torch.where(accepted.unsqueeze(-1), proposed, particles.theta),
            torch.where(accepted, log_prior, particles.log_prior),
            torch.where(accepted, log_likelihood, particles.log_likelihood),
        )
        gain = torch.where(jumps, 0.0, probability * log_steps.exp())
        better = (gain * log_steps).sum() / gain.sum() if gain.sum() > 0 else log_scale - 2.0 * LOG_STEP_SPREAD
        log_scale = min(float(better), gaussian_log_scale(start))
        rates.append(float(accepted.double().mean()))
        ever |= accepted
        before, distance = distance, float(((particles.theta - start).abs() / spread).sum(-1).median())
        if ever.double().mean() >= SHARE_MOVED and distance <= (1.0 + GROWTH) * before:
            return Moved(particles, log_scale, sum(rates) / len(rates), False)
    return Moved(particles, log_scale, sum(rates) / len(rates), True)


def gaussian_log_scale(theta: Tensor) -> float:
    """Return the log of the step size best for a Gaussian of as many coordinates."""
    # Differences of pairs are root 2 times as wide as the particles.
    return math.log(2.38 / math.sqrt(2.0 * theta.shape[-1]))


def far_ancestors(lineages: Sequence[Ancestors]) -> Ancestors:
    """Return the ancestors of the earliest generation of which enough are left, else those of the last.

    Example:
        >>> far_ancestors([torch.zeros(100, dtype=torch.long), torch.arange(100)])[:3].tolist()
        [0, 1, 2]
    """
    enough = (ancestors for ancestors in lineages if _pair_share(ancestors) * FEWEST_ANCESTORS <= 1.0)
    return next(enough, lineages[-1])


def ancestral_variance(values: Float[Tensor, "num_particles *shape"], ancestors: Ancestors) -> Float[Tensor, "*shape"]:
    """Return the variance of the particles' mean, from the sums over the descendants of each ancestor.

    It is NaN where all have one ancestor, which says nothing.
    """
    size = len(values)
    flat = values.double().reshape(size, -1)
    sums = torch.zeros_like(flat).index_add_(0, ancestors, flat - flat.mean(0))
    apart = 1.0 - _pair_share(ancestors)
    variance = sums.square().sum(0) / (size**2 * apart) if apart > 0 else torch.full_like(sums[0], torch.nan)
    return variance.reshape(values.shape[1:])


def effective_size(
    draws: Float[Tensor, "num_runs num_particles *shape"], ancestors: Sequence[Ancestors]
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Return the effective number of draws of all runs together, and where runs disagree.

    Runs disagree where their means spread, by a chi-squared test, more than their ancestral variances explain; the
    effective number is then that of the spread. It is at most that of the draws, NaN where an element never changes.
    """
    from scipy.special import chdtri  # here, because `import pyro_voed` should not pay for it

    num_runs, double = len(draws), draws.double()
    own = torch.stack([ancestral_variance(run, names) for run, names in zip(double, ancestors, strict=True)])
    explained, between = own.mean(0) / num_runs, double.mean(1).var(0) / num_runs
    limit = float(chdtri(num_runs - 1, DISAGREEMENT)) / (num_runs - 1)
    # Where all particles of a run have one ancestor nothing is explained, and the spread is all there is.
    disagree = ~(between <= limit * explained)
    variance = double.flatten(0, 1).var(0)
    effective = (variance / torch.where(disagree, between, explained)).clamp(max=draws.shape[:2].numel())
    return torch.where(variance > 0, effective, torch.full_like(effective, torch.nan)), disagree & (variance > 0)


def combined_evidence(log_evidence: PerRun, relative_variance: PerRun) -> tuple[float, float]:
    """Return the log of the mean evidence of runs, nats, and its standard error.

    The spread of a few runs is itself uncertain, so the error is never less than what the weights of the runs say: the
    relative variance is that of each run's evidence over its square, were its stages independent.
    """
    num_runs = len(log_evidence)
    log_mean = log_mean_exp(log_evidence)
    spread = (log_evidence - log_mean).exp().std() / math.sqrt(num_runs)
    return float(log_mean), max(float(spread), float((relative_variance.mean() / num_runs).sqrt()))


def _pair_share(ancestors: Tensor) -> float:
    """Share of the pairs of particles, a particle with itself included, that have one ancestor."""
    return float(ancestors.bincount().double().square().sum()) / len(ancestors) ** 2


def _random_rows(size: int, like: Tensor) -> Tensor:
    return torch.randint(size, (size,), device=like.device)

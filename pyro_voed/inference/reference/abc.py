r"""Posterior of one outcome from simulations alone: approximate Bayesian computation, for any model that can be run.

Targets theta and outcomes y are simulated, and those kept whose statistics come within a tolerance of the observed:

.. math::
    p_\varepsilon(\theta \mid y_o) \propto p(\theta) \int p(y \mid \theta, \xi)\,
    1\{\rho(s(y), s(y_o)) \le \varepsilon\}\, dy \;\longrightarrow\; p(\theta \mid s(y_o)), \qquad \varepsilon \to 0 .

With the whole outcome as statistic and a tolerance of 0, reached by discrete outcomes only, that is the posterior.
Otherwise it is wider, by the tolerance, and the number of simulations that a tolerance takes grows exponentially with
the number of statistics: give a `statistic` where outcomes have more than a few elements.

One population is rejection. More are population Monte Carlo: the next one proposes from

.. math::
    q(\theta) = 0.1\, p(\theta) + 0.9 \sum_j w_j\, N(\theta; \theta_j, 2 \Sigma_w), \qquad
    w(\theta) = p(\theta) / q(\theta),

with the weighted draws kept of the one before and their covariance, in unconstrained coordinates. The share of the
prior bounds the weights by 10 and keeps regions in play that earlier populations missed. Every population makes as many
simulations and keeps the nearest, so that the cost is known beforehand; the draws are those of the last.

Regression adjustment moves each kept draw to where it would be had its simulation hit the outcome, along a regression
of theta on the statistics with weights :math:`w_i (1 - \rho_i^2 / \varepsilon^2)`: right where that dependence is
linear within the tolerance and the spread about it constant. `abc_terms` has its formula.

References:
    T. Toni et al. (2009), Approximate Bayesian computation scheme for parameter inference and model selection in
    dynamical systems. Journal of the Royal Society Interface 6.
    M. A. Beaumont, J.-M. Cornuet, J.-M. Marin and C. P. Robert (2009), Adaptive approximate Bayesian computation.
    Biometrika 96 (the kernel).
    M. A. Beaumont, W. Zhang and D. J. Balding (2002), Approximate Bayesian computation in population genetics. Genetics
    162 (the adjustment).
    T. Hesterberg (1995), Weighted average importance sampling and defensive mixture distributions. Technometrics 37.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import Labels, check_callable, check_count, warn
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample, combine, pack_run, put_targets, unpack_targets
from pyro_voed.experiment.sampling import draw_joint
from pyro_voed.inference.outcomes import pack_outcome
from pyro_voed.inference.reference.abc_terms import (
    Metric,
    adjusted,
    euclidean,
    kernel_factor,
    mixture_log_density,
    prior_metric,
    weighted_effective_size,
)
from pyro_voed.inference.reference.conditioned import conditioned, mixing_faults
from pyro_voed.inference.reference.smc_terms import stratified_ancestors
from pyro_voed.posterior_sample import PosteriorSample

MAX_TOLERANCE = 0.3
"""Warned above, as a share of the median distance between two unrelated outcomes of the prior."""
SHARE_OF_PRIOR = 0.1


def abc_posterior(
    model: Callable[..., Any] | Experiment,
    observations: Tensor | Mapping[str, Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    num_simulations: int = 100_000,
    num_populations: int = 1,
    quantile: float = 0.01,
    tolerance: float | None = None,
    statistic: Callable[[Tensor], Tensor] | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] = euclidean,
    regression_adjustment: bool = False,
    seed: int | None = None,
) -> PosteriorSample:
    """Draw the targets from their approximate posterior given one outcome, by simulations near it.

    The model needs no densities; several populations need that of the targets. Warns, naming the sites, where an
    effective sample size falls below 100, or the tolerance exceeds 0.3 times the median distance between two unrelated
    outcomes of the prior.

    Args:
        model: This and `observations`, labels, `designs` and `seed`: as in `nuts_posterior`. With a deterministic
            outcome targets must be named.
        num_simulations: Experiments to simulate, over all populations.
        num_populations: 1 for rejection; more for population Monte Carlo, worth it where a posterior is far narrower
            than the prior.
        quantile: Share of each population's simulations that is kept, the nearest ones and all as near as the last of
            them, in (0, 1].
        tolerance: Distance within which simulations are kept, in place of the quantile; earlier populations keep the
            larger of the two sets.
        statistic: Maps packed outcomes `(num_rows, y_dim)` to `(num_rows, num_statistics)`, such as a trained summary;
            default: the outcomes themselves. Statistics are then divided by their scale under the prior predictive:
            1.4826 median absolute deviations, or standard deviations where those are 0.
        distance: Maps standardised statistics `(num_rows, num_statistics)` and the observed ones `(num_statistics,)` to
            distances `(num_rows,)`, at least 0.
        regression_adjustment: Adjust the kept draws by local linear regression on the statistics.

    Returns:
        Draws `(1, num_kept, *shape)` of each target, resampled where they had unequal weights, with the tolerance, the
        share kept of each population and the number of simulations. The effective sample size is that of the weights,
        element by element, less what resampling costs; it says nothing of the error that the tolerance makes.

    Raises:
        ValueError: As for `nuts_posterior`.
        NotImplementedError: If several populations or an adjustment are asked for and the targets are discrete,
            deterministic, or (several populations) without a density of their own.
        ArithmeticError: If a simulation is not finite or none comes within the tolerance.

    Example:
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> posterior = abc_posterior(implicit_toy(), torch.tensor(1.0), "y", "theta", num_simulations=20_000, seed=0)
        >>> posterior.values["theta"].shape, posterior.tolerance < 0.1
        (torch.Size([1, 200]), True)
    """
    check_callable(distance, "distance")
    if statistic is not None:
        check_callable(statistic, "statistic")
    check_count(num_populations, "num_populations")
    check_count(num_simulations, "num_simulations", minimum=100 * num_populations)
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile: expected a number in (0, 1], got {quantile!r}.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a finite number of at least 0, got {tolerance!r}.")
    with isolated(seed), torch.no_grad():
        case = conditioned(model, observations, observation_labels, target_labels, designs)
        experiment, values = case.experiment, case.designs
        _check_movable(experiment, num_populations, regression_adjustment)
        packed = pack_outcome(experiment, case.observed, values)
        with pyro.validation_enabled(False):
            num_rows = num_simulations // num_populations
            first = _checked(draw_joint(experiment, num_rows, values), 1)
            metric = prior_metric(first.y, packed, statistic, distance)
            kept = [_keep(first, metric, quantile, tolerance, num_populations == 1)]
            for population in range(1, num_populations):
                sample, proposal = _proposed(experiment, values, num_rows, kept[-1])
                last = population == num_populations - 1
                kept.append(_keep(_checked(sample, population + 1), metric, quantile, tolerance, last, proposal))
            draws, effective = _draws(experiment, values, kept[-1], regression_adjustment)
        draws = {name: value.unsqueeze(0) for name, value in draws.items()}
        reached = kept[-1].tolerance
        _warn_coarse(experiment, effective, reached, metric.spread)
        return case.sample(
            "ABC",
            draws,
            effective,
            acceptance_rate=(torch.tensor([part.share for part in kept]),),
            tolerance=reached,
            num_simulations=experiment.num_calls,
        )


@dataclass(frozen=True)
class _Kept:
    """What one population kept: packed targets, their values, weights that add up to one, and where they came from."""

    theta: Float[Tensor, "num_kept theta_dim"]
    values: Mapping[str, Tensor]
    weights: Float[Tensor, " num_kept"]
    differences: Float[Tensor, "num_kept num_statistics"]
    distances: Float[Tensor, " num_kept"]
    tolerance: float
    share: float


def _keep(
    sample: JointSample,
    metric: Metric,
    quantile: float,
    tolerance: float | None,
    is_last: bool,
    proposal: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> _Kept:
    statistics = metric.statistics(sample.y)
    distances = metric.distances(statistics)
    nearest = float(distances.kthvalue(max(1, math.ceil(quantile * len(distances)))).values)
    limit = nearest if tolerance is None else tolerance if is_last else max(nearest, tolerance)
    near = distances <= limit
    if not near.any():
        raise ArithmeticError(
            f"ABC: none of {len(distances)} simulations came within {limit:.3g} of the outcome; the nearest is "
            f"{float(distances.min()):.3g} away. Raise num_simulations, num_populations or tolerance."
        )
    theta = sample.theta[near]
    log_weights = torch.zeros(len(theta), dtype=torch.double, device=theta.device)
    if proposal is not None and sample.log_prior is not None:
        log_prior = sample.log_prior[near].double()
        log_weights = log_prior - proposal(theta, log_prior)
        if not (log_weights > -torch.inf).any():
            raise ArithmeticError(f"ABC: all {len(theta)} draws kept lie where the prior has density 0.")
    return _Kept(
        theta=theta,
        values={name: value[near] for name, value in sample.values.items()},
        weights=torch.softmax(log_weights, 0),
        differences=statistics[near] - metric.observed,
        distances=distances[near],
        tolerance=float(distances[near].max()) if tolerance is None else limit,
        share=float(near.double().mean()),
    )


def _proposed(
    experiment: Experiment, designs: Mapping[str, Tensor], num_rows: int, before: _Kept
) -> tuple[JointSample, Callable[[Tensor, Tensor], Tensor]]:
    """Simulate from prior and kernel; return the log density of that mixture, given packed targets and log prior."""
    factor = kernel_factor(before.theta, before.weights)
    num_prior = max(1, round(SHARE_OF_PRIOR * num_rows))
    # The counts of the two parts are fixed, and so is their share in the density.
    share = num_prior / num_rows
    points = num_rows - num_prior
    chosen = torch.multinomial(before.weights, points, replacement=True)
    noise = torch.randn(points, before.theta.shape[-1], dtype=torch.double, device=before.theta.device)
    theta = (before.theta[chosen].double() + noise @ factor.mT).to(before.theta)
    moved = pack_run(experiment, put_targets(experiment, theta, designs), torch.Size([points]), False)
    drawn = draw_joint(experiment, num_prior, designs)

    def log_proposal(theta: Tensor, log_prior: Tensor) -> Tensor:
        kernel = mixture_log_density(theta, before.theta, before.weights, factor)
        return torch.logaddexp(math.log(share) + log_prior, math.log1p(-share) + kernel)

    return combine([drawn, moved], torch.cat, None), log_proposal


def _checked(sample: JointSample, population: int) -> JointSample:
    # An outcome is judged packed, since elements that were not measured may hold anything.
    for what, values in (("targets", sample.theta), ("outcomes", sample.y)):
        if count := int((~torch.isfinite(values)).any(-1).sum()):
            raise ArithmeticError(
                f"ABC: {what} are not finite in {count} of {sample.num_samples} simulations of population {population}."
            )
    if sample.log_prior is not None and (count := int(sample.log_prior.isnan().sum())):
        raise ArithmeticError(f"ABC: the log prior is NaN at {count} draws of population {population}.")
    return sample


def _draws(
    experiment: Experiment, designs: Mapping[str, Tensor], kept: _Kept, regression_adjustment: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return draws of equal weight `(num_kept, *shape)` of each target, and their effective numbers."""
    values, weights = {name: kept.values[name] for name in experiment.target_labels}, kept.weights
    if regression_adjustment and kept.tolerance > 0:
        nearness = 1.0 - (kept.distances.double() / kept.tolerance).square()
        if not (nearness > 0).any():
            raise ArithmeticError("ABC: all draws kept lie at the tolerance itself, where the adjustment has weight 0.")
        weights = weights * nearness
        values = unpack_targets(experiment, adjusted(kept.theta, kept.differences, weights), designs)
    effective = {name: weighted_effective_size(value, weights) for name, value in values.items()}
    if (weights != weights[0]).any():
        chosen = stratified_ancestors(weights)
        values = {name: value[chosen] for name, value in values.items()}
        # Resampling adds at most the variance of independent draws.
        effective = {name: 1.0 / (1.0 / size + 1.0 / len(weights)) for name, size in effective.items()}
    return values, effective


def _check_movable(experiment: Experiment, num_populations: int, regression_adjustment: bool) -> None:
    if num_populations == 1 and not regression_adjustment:
        return
    asked = "num_populations > 1 moves" if num_populations > 1 else "regression_adjustment moves"
    still = [site.name for site in experiment.targets if site.is_discrete or site.is_deterministic]
    if still:
        raise NotImplementedError(
            f"targets {still} are discrete or deterministic, and {asked} real coordinates of sample sites. Use "
            "num_populations=1 without adjustment, or name other targets."
        )
    if num_populations > 1 and (not experiment.has_log_prior or experiment.has_auxiliary_density):
        raise NotImplementedError(
            f"targets {list(experiment.target_labels)} have no prior density of their own (it depends on nuisance "
            "sites, or a replaced prior does not state it), which the weights of several populations need. Use "
            "num_populations=1, or name all latent sites as targets."
        )


def _warn_coarse(experiment: Experiment, effective: Mapping[str, Tensor], tolerance: float, spread: float) -> None:
    found = mixing_faults(effective)
    if tolerance > MAX_TOLERANCE * spread:
        found.append(
            f"the tolerance {tolerance:.3g} of outcome {list(experiment.observation_labels)} is large beside the "
            f"median distance {spread:.3g} between two unrelated outcomes, so the posterior may be far too wide"
        )
    if found:
        warn(
            f"ABC is no reference here: {'; '.join(found)}. Raise num_simulations or num_populations, adjust quantile, "
            "or give a statistic with fewer elements."
        )

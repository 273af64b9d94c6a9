"""Case 3 of the paper, its numbers: kept simulations, densities trained on pools of them, re-used nested Monte Carlo.

A simulation is kept without noise, targets and mean currents, at 50 times of which every fifth are the 10. Outcomes
are drawn from the means: for a pool anew at every pass, as `eig_flow(training=Pool(...))` does where outcomes are a
forward map plus noise, or once. Densities are of the targets' normal scores, in which the prior is standard normal.

All estimators are evaluated on the same experiments, so that what two of them differ by is known far better than
either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from pyro_voed import JointSample, Pool, barber_agakov, eig_flow, eig_marginal, eig_nmc, smc_posterior
from pyro_voed.bounds import marginal_terms
from pyro_voed.densities import AffineCouplingFlow, StandardisedDensity
from pyro_voed.diagnostics import c2st
from pyro_voed.estimators.building import build_density, target_rows
from pyro_voed.problems.electrocoating import (
    EFFICIENCY,
    MINIMUM_CHARGE,
    MINIMUM_CURRENT,
    RELATIVE_NOISE,
    TruncatedNormal,
    electrocoating,
    simulate,
)
from pyro_voed.summaries import RecurrentSummary
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_pool

Simulations = Mapping[str, Tensor]

TARGETS = ("efficiency", "minimum_current", "minimum_charge")
PRIORS = torch.tensor([EFFICIENCY, MINIMUM_CURRENT, MINIMUM_CHARGE])
MOST_TIMES = 50
#: Experiments on which a bound is followed during training.
WATCHED = 2_000
CHUNK = 2_000

GAUSSIAN = partial(AffineCouplingFlow, num_transforms=0, hidden_dim=32, activation=nn.ReLU)


def simulate_pool(current: float, size: int, seed: int) -> dict[str, Tensor]:
    """Draw targets and solve for their mean currents, mA."""
    torch.manual_seed(seed)
    theta = TruncatedNormal(*PRIORS.unbind(-1)).sample((size,))
    with torch.no_grad():
        solved = [simulate(rows, torch.tensor(current), num_times=MOST_TIMES).current for rows in theta.split(CHUNK)]
    return {"theta": theta, "mean": 1e3 * torch.cat(solved)}


def normal_scores(theta: Tensor) -> Tensor:
    """Return standard normal coordinates of targets, by the prior's distribution function."""
    below, within, standard = _prior_masses(theta)
    places = (torch.special.ndtr(standard) - below) / within
    return torch.special.ndtri(places.clamp(1e-12, 1.0 - 1e-12)).to(theta)


def from_normal_scores(scores: Tensor) -> Tensor:
    """Return targets from their normal scores."""
    below, within, _ = _prior_masses(PRIORS[:, 0])
    drawn = torch.special.ndtri(below + within * torch.special.ndtr(scores.double()))
    return (PRIORS[:, 0] + PRIORS[:, 1] * drawn).to(scores)


def _prior_masses(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    location, scale, low, high = PRIORS.double().unbind(-1)
    below, above = (torch.special.ndtr((end - location) / scale) for end in (low, high))
    return below, above - below, (theta.double() - location) / scale


def experiments(pool: Simulations, num_times: int) -> JointSample:
    """Give every simulation an outcome, and the means to draw it anew."""
    mean = _mean(pool, num_times)
    theta = normal_scores(pool["theta"])
    log_prior = Normal(0.0, 1.0).log_prob(theta).sum(-1)
    log_det = log_prior - TruncatedNormal(*PRIORS.unbind(-1)).log_prob(pool["theta"]).sum(-1)
    outcome = Normal(mean, RELATIVE_NOISE * mean)

    def drawn() -> JointSample:
        y = outcome.sample()
        return JointSample(
            theta=theta,
            y=y,
            log_det=log_det,
            outcome_log_det=torch.zeros_like(log_det),
            log_prior=log_prior,
            log_likelihood=outcome.log_prob(y).sum(-1),
        )

    return replace(drawn(), redraw=drawn)


def evaluation(pool: Simulations, num_times: int) -> JointSample:
    """Return the experiments that every estimator is evaluated on."""
    torch.manual_seed(20)
    return experiments(pool, num_times)


def reference(pool: Simulations, num_times: int) -> dict[str, Tensor]:
    """Return re-used nested Monte Carlo terms of both sides: the own draw left out (upper) and counted (lower)."""
    y, mean = evaluation(pool, num_times).y.double(), _mean(pool, num_times).double()
    inverse, offset, size = 1.0 / mean, mean.log().sum(-1), len(mean)
    precision = 0.5 / RELATIVE_NOISE**2
    parts = []
    for start in range(0, size, 50):
        rows = y[start : start + 50]
        # Sums of ((y - mean) / mean)^2 for all pairs, by matrix products.
        squares = rows.square() @ inverse.square().T - 2.0 * rows @ inverse.T + num_times
        pairs = -precision * squares - offset
        pairs.diagonal(start).fill_(-math.inf)
        largest = pairs.amax(-1, keepdim=True)
        # Differences from the maximum need no more than single precision, whose exponential is the cheaper.
        parts.append(largest.squeeze(-1) + pairs.sub_(largest).float().exp_().sum(-1).double().log())
    others = torch.cat(parts)
    own = -precision * (y * inverse - 1.0).square().sum(-1) - offset
    return {
        "upper": own - others + math.log(size - 1),
        "lower": own - torch.logaddexp(others, own) + math.log(size),
    }


def _mean(pool: Simulations, num_times: int) -> Tensor:
    every = MOST_TIMES // num_times
    return pool["mean"][:, every - 1 :: every]


def is_upper(method: str) -> bool:
    """Whether the method learns the outcome's density, for a bound from above."""
    return method == "marginal"


def build(method: str, sample: JointSample) -> StandardisedDensity:
    """Return the density of a method: `eig_flow`'s and `eig_marginal`'s own, or a Gaussian, or with an LSTM."""
    if is_upper(method):
        return build_density(None, sample.y, sample.y[:, :0], num_designs=0, summary=None)
    lstm = RecurrentSummary(sample.y.shape[-1], summary_dim=10) if method == "lstm" else None
    given = GAUSSIAN if method == "gaussian" else None
    return build_density(given, sample.theta, sample.y, num_designs=0, summary=lstm)


def terms(method: str, sample: JointSample, density: Any) -> Tensor:
    """Return the terms of the bound, nats; those of the upper one have their sign changed, to be ascended."""
    if is_upper(method):
        assert sample.log_likelihood is not None
        return -marginal_terms(sample.log_likelihood, density.log_prob(sample.y, sample.y[..., :0]))
    return barber_agakov(sample, density)


def train(
    kept: Simulations,
    held_out: Simulations,
    *,
    method: str,
    num_times: int,
    size: int,
    batch_size: int,
    max_epochs: int,
    redraw: bool,
    seed: int,
) -> dict[str, Any]:
    """Train a density on the first `size` simulations of a pool and evaluate it on other ones.

    Returns:
        The bound's terms; the bound on the watched experiments before every epoch; the weights; steps and seconds of
        processor time.
    """
    fresh = evaluation(held_out, num_times)
    torch.manual_seed(seed)
    sample = experiments(_head(kept, size), num_times)
    density = build(method, sample)
    sign = -1.0 if is_upper(method) else 1.0
    watched, followed = fresh[torch.arange(min(WATCHED, fresh.num_samples))], []

    def next_pass(part: JointSample) -> JointSample:
        with torch.no_grad():
            followed.append(sign * terms(method, watched, density).mean().item())
        assert part.redraw is not None
        return replace(part.redraw(), redraw=part.redraw) if redraw else part

    started = time.process_time()
    ascent = Ascent([{"params": list(density.parameters()), "lr": 2e-3}])
    history = fit_pool(
        sample,
        lambda rows: terms(method, rows, density),
        ascent,
        batch_size=batch_size,
        max_epochs=max_epochs,
        refresh=next_pass,
        begin=lambda part: None if is_upper(method) else density.fit_scales_(*target_rows(part)),
        progress=False,
    )
    seconds = time.process_time() - started
    with torch.no_grad():
        rows = torch.arange(fresh.num_samples).split(CHUNK)
        evaluated = sign * torch.cat([terms(method, fresh[own], density) for own in rows])
    assert history.validation is not None
    return {
        "terms": evaluated,
        # The passes that made the validation copies come first.
        "followed": followed[-len(history.validation) :],
        "weights": dict(density.state_dict()),
        "steps": history.num_steps,
        "seconds": seconds,
    }


def _head(pool: Simulations, size: int) -> dict[str, Tensor]:
    return {name: value[:size] for name, value in pool.items()}


def trained_density(
    weights: Mapping[str, Tensor], method: str, kept: Simulations, num_times: int
) -> StandardisedDensity:
    """Return the density of a finished training."""
    density = build(method, experiments(_head(kept, 100), num_times))
    density.load_state_dict(weights)
    return density.eval()


def draw_posterior(density: StandardisedDensity, y: Tensor, num_draws: int) -> Tensor:
    """Draw targets given one outcome, in their own units, `(num_draws, 3)`."""
    torch.manual_seed(0)
    with torch.no_grad():
        return from_normal_scores(density.condition(y).sample((num_draws,)))


def draw_outcomes(density: StandardisedDensity, num_draws: int) -> Tensor:
    """Draw outcomes of a learned density, `(num_draws, num_times)`."""
    torch.manual_seed(0)
    with torch.no_grad():
        return density.condition(torch.zeros(0)).sample((num_draws,))


def sequential_monte_carlo(current: float, y: Tensor, num_particles: int, max_moves: int) -> dict[str, Any]:
    """Return draws of the reference posterior, the least effective number of them and the largest R-hat."""
    sizes = {"num_particles": num_particles, "max_moves": max_moves, "num_runs": 2}
    posterior = smc_posterior(electrocoating(current, len(y)), y, "y", **sizes, seed=0)
    assert posterior.r_hat is not None
    return {
        "draws": torch.stack([posterior.flat(name) for name in TARGETS], -1),
        "effective": min(value.item() for value in posterior.effective_sample_size.values()),
        "r_hat": max(value.item() for value in posterior.r_hat.values()),
        "simulations": posterior.num_simulations,
    }


def accuracy_between(first: Tensor, second: Tensor, num_draws: int) -> str:
    """Return the accuracy of a classifier between two sets of draws, and its standard error."""
    chosen = [draws[torch.linspace(0, len(draws) - 1, num_draws).long()] for draws in (first, second)]
    result = c2st(*chosen, seed=0)
    return f"{result.accuracy:.3f} ± {result.standard_error:.3f}"


def without_limit(
    current: float, size: int, num_samples: int, max_epochs: int = 1_000
) -> dict[str, tuple[float, float]]:
    """Estimate the information of the current where the rectifier has no voltage limit; it is 0."""
    model = electrocoating(current, 10, voltage_limit=None)
    learning = {"training": Pool(size, max_epochs=max_epochs), "num_samples": num_samples, "seed": 0, "progress": False}
    results = {
        "flow, lower bound": eig_flow(model, "y", **learning),
        "marginal, upper bound": eig_marginal(model, "y", **learning),
        "re-used nested Monte Carlo": eig_nmc(model, "y", num_outer_samples=num_samples, seed=0),
    }
    return {name: (result.eig.item(), result.standard_error.item()) for name, result in results.items()}

"""Draws and posteriors that are known exactly.

Thresholds are four standard errors, as stated by a result or known: a right estimate exceeds them 1 time in 16,000 on
one or either side. Shares counted over repeats have the standard error of a binomial share. Seeds are fixed besides.
"""

import math
from dataclasses import replace

import torch

from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.posterior_sample import PosteriorSample

THRESHOLD = 4.0


def near(share, expected, num):
    """Whether a share counted over `num` repeats is the one expected."""
    return abs(share - expected) < THRESHOLD * math.sqrt(expected * (1 - expected) / num)


def normal(num_draws, dim, shift=0.0, scale=1.0):
    """Normal draws, shifted along the first column."""
    draws = scale * torch.randn(num_draws, dim, dtype=torch.double)
    draws[:, 0] += shift
    return draws


def chain(values, effective):
    """A posterior sample with the same effective size in every column."""
    sizes = {name: torch.full(draws.shape[2:], float(effective)) for name, draws in values.items()}
    return PosteriorSample(values, {}, "NUTS", 0.0, sizes)


def conjugate(num_simulations, num_draws, *, dim=1, scale=1.0, bias=0.0, densities=True):
    """theta ~ N(0, 1), y ~ N(theta, 1) and draws of N(y / 2, 1 / 2), `scale` times as wide and `bias` sd too high."""
    spread = math.sqrt(0.5)
    truths = torch.randn(num_simulations, dim, dtype=torch.float64)
    y = truths + torch.randn_like(truths)
    posterior = torch.distributions.Normal((0.5 * y + bias * spread).unsqueeze(1), scale * spread)
    draws = posterior.sample((num_draws,)).squeeze(2).movedim(0, 1)
    columns = tuple(f"theta[{index}]" for index in range(dim))
    if not densities:
        return SimulatedPosteriors(truths, draws, columns)
    log_density = posterior.log_prob(truths.unsqueeze(1)).sum(-1).squeeze(1)
    return SimulatedPosteriors(truths, draws, columns, y, log_density, posterior.log_prob(draws).sum(-1))


def with_density(result, density):
    """An estimate as if it had learned another density."""
    return replace(result, learned=replace(result.learned, density=density))

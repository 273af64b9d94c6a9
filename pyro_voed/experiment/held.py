r"""Densities as averages over runs of the model in which sites are held.

What is held enters by its density, everything else is drawn (likelihood weighting). So with :math:`\eta` the nuisance
sites :math:`p(\theta) = \mathbb{E}\, p(\theta \mid \eta)`. The logarithm of an average over L draws of them errs
downwards (Jensen); with the draw that the targets were made from counted among L + 1 it errs upwards, because that one
is a draw from the posterior (Foster et al. 2020, theorem 1). A lower bound on the information subtracts the latter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.pairs import PAIR_MEMORY, log_sums
from pyro_voed.experiment.programs import ProgramRun, run_rows

PRIOR_DRAWS = 32
"""Nuisance draws behind a target's density, where the model must be run again for each."""


def averaged_log_prior(
    experiment: Experiment, run: ProgramRun, designs: Mapping[str, Tensor], *, below: bool = False
) -> Tensor:
    """Return log densities of a run's targets, `(num_rows,)` nats, in their own coordinates, averaged over nuisance.

    They err upwards, with `below` downwards. Where targets depend on nuisance sites alone, the rows of the run share
    their nuisance draws; to first order the fluctuations of these cancel in a mean over the rows.
    """
    targets = {site.name: run.value(site.name) for site in experiment.targets}
    num_rows = len(run.traces) * run.rows_per_trace
    own = torch.stack([run.log_prob(name) for name in targets]).sum(0)
    num_draws = PRIOR_DRAWS if experiment.joined_targets else num_rows - 1
    if experiment.joined_targets:
        sums = held_log_sums(experiment, designs, targets, experiment.target_labels, num_draws)
    else:
        sums = log_sums(experiment, designs, targets, run, sites=experiment.targets, omit_own=True)
    return sums - math.log(num_draws) if below else torch.logaddexp(sums, own) - math.log(num_draws + 1)


def held_log_sums(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    scored: tuple[str, ...],
    num_inner: int,
    max_bytes: int = PAIR_MEMORY,
) -> Tensor:
    """Return the log of the sum of the `scored` sites' density over runs with `held` values put in, `(num_rows,)`."""
    rows = max(1, max_bytes // (8 * max(1, experiment.bytes_per_row)))
    parts = []
    step = max(1, rows // num_inner)
    for pieces in zip(*(value.split(step) for value in held.values()), strict=True):
        chunk, count = dict(zip(held, pieces, strict=True)), len(pieces[0])
        sums = torch.full((count,), -torch.inf, dtype=experiment.dtype, device=experiment.device)
        # Where even one outer draw's inner runs exceed the memory, its sum is streamed.
        most = max(1, rows // count)
        for start in range(0, num_inner, most):
            size = min(most, num_inner - start)
            repeated = {name: value.repeat_interleave(size, 0) for name, value in chunk.items()}
            run = run_rows(experiment.program, count * size, experiment.shapes, designs=designs, row_values=repeated)
            weights = torch.stack([run.log_prob(name, on_support=True) for name in scored]).sum(0)
            sums = torch.logaddexp(sums, weights.reshape(count, size).logsumexp(-1))
        parts.append(sums)
    return torch.cat(parts)

r"""Does each element of a computed outcome have noise of its own?

Where one random number is shared by several readings, or none is there at all, some combination of the readings is free
of noise and tells continuous targets exactly: their information is infinite, and what is reported merely large. So the
targets are held while the rest is drawn anew. With N the covariance of the outcome then and T that of whole runs, the
largest :math:`\operatorname{Var}_T(a^\top y) / \operatorname{Var}_N(a^\top y)` over directions a says how far above its
noise the outcome moves.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.experiment.designs import flat_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import ProgramRun, run_rows

ENTRIES_TOGETHER, ENTRIES_ALONE = 8, 3
"""Elements of the outcome that are looked at, three experiments for each; one by one each is paid for."""

LARGEST_RATIO = 1e8
"""Of variances: nine nats in one direction. Rounding in single precision keeps ratios below about 1e10."""


def check_noise(experiment: Experiment, designs: Mapping[str, Tensor]) -> None:
    """Warn where a computed outcome moves without noise in some direction; looked at at the first design."""
    computed = [site for site in experiment.observations if site.is_deterministic and not site.is_discrete]
    held = all(site.has_density for site in experiment.targets)
    if not computed or not held or all(site.is_discrete for site in experiment.targets):
        return
    own = {name: value[0] for name, value in flat_designs(experiment, designs).items()}
    total = sum(site.shape.numel() for site in computed)
    most = ENTRIES_TOGETHER if experiment.runs_together else ENTRIES_ALONE
    entries = torch.linspace(0, total - 1, min(most, total)).round().long()
    size = 3 * len(entries) + 3

    def outcomes(run: ProgramRun) -> Tensor:
        flat = torch.cat([run.flat_value(site.name) for site in computed], -1)
        return flat[:, entries.to(flat.device)].double()

    with common_stream(0), torch.no_grad(), pyro.validation_enabled(False):
        free = run_rows(experiment.program, size, experiment.shapes, designs=own)
        every = outcomes(free)
        # At two values of the targets, since noise may vanish at one by chance.
        given = []
        for row in range(2):
            targets = {name: free.value(name)[[row]] for name in experiment.target_labels}
            values = {name: value.expand(size, *value.shape[1:]) for name, value in targets.items()}
            run = run_rows(experiment.program, size, experiment.shapes, designs=own, row_values=values)
            given.append(outcomes(run))
    free_of_noise = min(noiseless_directions(every, noise) for noise in given)
    if free_of_noise:
        warn(
            f"outcome {[site.name for site in computed]}: of {len(entries)} elements looked at, {free_of_noise} "
            "combination(s) are moved by the targets and by nothing else. Without noise information is infinite, and "
            "what is reported means nothing. Give each element noise of its own, as by .expand([n]) or in a plate."
        )


def noiseless_directions(every: Float[Tensor, "num dim"], noise: Float[Tensor, "num dim"]) -> int:
    """Return in how many directions the outcome of whole runs moves but hardly does by noise alone.

    Example:
        >>> theta, shared = torch.randn(2, 30, 1).double()
        >>> slopes = torch.tensor([1.0, 2.0, 3.0])
        >>> noiseless_directions(theta * slopes + shared, 0.7 * slopes + shared.flip(0))
        1
    """
    every, noise = (values[torch.isfinite(values).all(-1)] for values in (every, noise))
    if min(len(every), len(noise)) <= every.shape[-1]:
        return 0
    scale = every.std(0)
    moving = scale > 0
    every, noise = (((values - values.mean(0)) / scale)[:, moving] for values in (every, noise))
    covariance, own = (values.T @ values / (len(values) - 1) for values in (every, noise))
    # What does not move by noise at all is as good as infinitely above it.
    factor = torch.linalg.cholesky(own + 1e-12 * torch.eye(len(own), dtype=own.dtype, device=own.device))
    half = torch.linalg.solve_triangular(factor, covariance, upper=False)
    ratios = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    return int((ratios > LARGEST_RATIO).sum())

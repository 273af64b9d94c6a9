"""Simulate experiments: draws of targets and outcomes, packed, with their log densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.experiment.designs import at_each_design, batch_shape, design_batch_shape, flat_designs, pack_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.failures import valid_runs
from pyro_voed.experiment.held import averaged_log_prior
from pyro_voed.experiment.packing import JointSample, combine, pack_run
from pyro_voed.experiment.pairs import log_likelihood_of_pairs
from pyro_voed.experiment.programs import ProgramRun, run_rows

DEFAULT_MEMORY = 2**28
"""Bytes that one chunk of simulations may take, by the size of its site values and as much again for workings."""

MOST_AVERAGED = 4_096
"""Experiments in one chunk where the targets' density is an average over the nuisance draws of all of them."""


def sample_joint(
    experiment: Experiment,
    num_samples: int,
    designs: Mapping[str, Tensor] | None = None,
    *,
    likelihood: bool = False,
    score: Sequence[str] = (),
    controls: bool = False,
    redraw: bool = False,
    max_bytes: int = DEFAULT_MEMORY,
) -> JointSample:
    """Simulate experiments from prior and model.

    Args:
        experiment: The experiment.
        num_samples: Experiments to simulate at each design.
        designs: Design values `(*design_batch, *shape)`, the batch shape equal across labels; default: the resolved
            values. Gradients flow to them where the model's sites are reparametrised.
        likelihood: Also return the log density of the outcomes given the latents.
        score: Sites whose log density is wanted for score-function gradients.
        controls: Also return controls for `monte_carlo.controlled_terms`.
        redraw: Keep what is needed to draw the outcomes anew (`JointSample.redraw`).
        max_bytes: Without gradients, simulations run in chunks of about this much memory.

    Returns:
        Targets and outcomes of leading shape `(num_samples, *design_batch)`.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> sample = sample_joint(Experiment(linear_gaussian(), "y"), 100)
        >>> sample.theta.shape, sample.y.shape
        (torch.Size([100, 2]), torch.Size([100, 3]))
    """
    designs = {**experiment.design_values, **(designs or {})}
    design_batch_shape(experiment, designs)
    return draw_joint(
        experiment,
        num_samples,
        designs,
        likelihood=likelihood,
        score=score,
        controls=controls,
        redraw=redraw,
        max_bytes=max_bytes,
    )


def draw_joint(
    experiment: Experiment,
    num_samples: int,
    designs: Mapping[str, Tensor],
    *,
    likelihood: bool = False,
    score: Sequence[str] = (),
    controls: bool = False,
    redraw: bool = False,
    pairs: bool = False,
    max_bytes: int = DEFAULT_MEMORY,
) -> JointSample:
    """Simulate as `sample_joint` does, at all designs, which are known to be right: nothing waits for the device.

    With `pairs`, at one design, the sample scores all pairs of outcomes and draws (`JointSample.pairs`).
    """
    batch = batch_shape(experiment, designs)

    def pack(
        run: ProgramRun, leading: torch.Size, own: Mapping[str, Tensor], packed: Tensor | None = None
    ) -> JointSample:
        return pack_run(
            experiment,
            run,
            leading,
            likelihood,
            designs=packed,
            score=score,
            controls=controls,
            redraw=redraw,
            log_prior=_prior_given_nuisance(experiment, run, own) if experiment.averages_prior else None,
        )

    if pairs:
        run = run_rows(experiment.program, num_samples, experiment.shapes, designs=designs)
        sample = pack(run, torch.Size([num_samples]), designs)
        outcomes = {site.name: sample.values[site.name] for site in experiment.observations}
        return replace(sample, pairs=partial(log_likelihood_of_pairs, experiment, designs, outcomes, run, num_samples))
    simulate = partial(_every_run, experiment, designs=designs, batch=batch, pack=pack, max_bytes=max_bytes)
    if experiment.failures == "error":
        return simulate(num_samples)
    # Densities of runs that failed are not defined.
    with pyro.validation_enabled(False):
        return simulate(num_samples) if experiment.failures == "outcome" else valid_runs(simulate, num_samples)


def _every_run(
    experiment: Experiment,
    num_samples: int,
    designs: Mapping[str, Tensor],
    batch: torch.Size,
    pack: Callable[..., JointSample],
    max_bytes: int,
) -> JointSample:
    if torch.is_grad_enabled() and any(value.requires_grad for value in designs.values()):
        return _sample_chunk(experiment, num_samples, designs, batch, pack)
    # Site values are what is known; workings of the model are guessed to take seven times as much.
    bytes_per_sample = 8 * max(1, experiment.bytes_per_row) * batch.numel()
    chunk = max(1, min(num_samples, max_bytes // bytes_per_sample))
    if experiment.averages_prior:
        chunk = min(chunk, max(1, MOST_AVERAGED // batch.numel()))
    parts = [
        _sample_chunk(experiment, min(chunk, num_samples - start), designs, batch, pack)
        for start in range(0, num_samples, chunk)
    ]
    return parts[0] if len(parts) == 1 else combine(parts, torch.cat, parts[0].designs)


def draw_in_common(
    experiment: Experiment,
    num_samples: int,
    designs: Mapping[str, Tensor],
    then: Callable[[JointSample], JointSample] = lambda sample: sample,
    **options: Any,
) -> JointSample:
    """Simulate as `draw_joint` does, without gradients, and on common random numbers at all designs of the batch.

    Equal designs give equal experiments, and differences between designs are free of what they share. The model runs
    at one design after the other; `then` is applied to what it gave there, on the same random numbers too.
    """

    def one(own: dict[str, Tensor]) -> JointSample:
        sample = draw_joint(experiment, num_samples, own, **options)
        return then(replace(sample, designs=pack_designs(experiment, own)))

    batch = batch_shape(experiment, designs)
    members = at_each_design(experiment, designs, one)
    packed = pack_designs(experiment, designs)
    return combine(members, lambda tensors: torch.stack(tensors, 1).unflatten(1, batch), packed)


def _prior_given_nuisance(experiment: Experiment, run: ProgramRun, designs: Mapping[str, Tensor]) -> Tensor:
    """Return the log densities of targets that are drawn given nuisance sites, from above."""
    if experiment.prior_follows_design:
        return averaged_log_prior(experiment, run, designs)
    # At any design it is the same.
    with torch.no_grad():
        return averaged_log_prior(experiment, run, experiment.design_values)


def _sample_chunk(
    experiment: Experiment,
    num_samples: int,
    designs: Mapping[str, Tensor],
    batch: torch.Size,
    pack: Callable[..., JointSample],
) -> JointSample:
    if not batch:
        run = run_rows(experiment.program, num_samples, experiment.shapes, designs=designs)
        return pack(run, torch.Size([num_samples]), designs)
    packed = pack_designs(experiment, {name: value.detach() for name, value in designs.items()})
    members = flat_designs(experiment, designs)
    if not experiment.takes_design_rows:
        parts = []
        for member in range(batch.numel()):
            own = {name: value[member] for name, value in members.items()}
            run = run_rows(experiment.program, num_samples, experiment.shapes, designs=own)
            parts.append(pack(run, torch.Size([num_samples]), own))
        return combine(parts, lambda tensors: torch.stack(tensors, 1).unflatten(1, batch), packed)
    rows = {name: value.expand(num_samples, *value.shape).flatten(0, 1) for name, value in members.items()}
    run = run_rows(experiment.program, num_samples * batch.numel(), experiment.shapes, row_designs=rows)
    return pack(run, torch.Size([num_samples, *batch]), designs, packed)


def non_finite_sites(sample: JointSample) -> str:
    """Return which sites of a sample hold values that are not finite, with counts, or an empty string."""
    found = []
    for name, value in sample.values.items():
        if value.dtype.is_floating_point and (bad := int((~torch.isfinite(value)).sum())):
            found.append(f"site '{name}' has {bad} of {value.numel()} values not finite")
    for name in ("theta", "y", "log_prior", "log_likelihood"):
        tensor = getattr(sample, name)
        if not found and tensor is not None and (bad := int((~torch.isfinite(tensor)).sum())):
            found.append(f"{name} has {bad} of {tensor.numel()} values not finite")
    return "; ".join(found)

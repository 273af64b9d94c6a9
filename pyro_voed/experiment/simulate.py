"""Simulate experiments: draws of targets and outcomes, packed, with their log densities.

`sample_joint` draws `theta, y ~ p(theta) p(y | theta, xi)` for one design or a batch of them; `log_likelihood` scores
given outcomes. Densities are those of the packed vectors, that is in unconstrained coordinates, so that
`log q(theta | y) - log p(theta)` and `log p(y | theta) - log q(y)` need no further Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

from pyro_voed.experiment.programs import (
    ProgramRun,
    base_distribution,
    run_rows,
)
from pyro_voed.experiment.sites import Experiment, Site, check_designs, given_designs

DEFAULT_MEMORY = 2**28
"""Bytes that one chunk of simulations may take, by the size of its site values and as much again for workings."""


@dataclass(frozen=True)
class JointSample:
    """Simulated experiments.

    Attributes:
        theta: Packed targets in unconstrained coordinates.
        y: Packed outcomes (unconstrained where the support is fixed, raw elsewhere; unmeasured entries left out).
        log_det: Log of `|d target values / d theta|`, nats, for densities stated in the targets' own coordinates.
        outcome_log_det: Log of `|d outcome values / d y|`, nats, likewise.
        log_prior: Log density of `theta` under the prior, nats; None where the model does not state it.
        log_likelihood: Log density of `y` given the latents, nats; None where not asked for.
        score: Log density of draws that carry no gradient themselves, nats; None where not asked for.
        controls: Quantities of expectation zero that go along with the draws, for variance reduction; None where not
            asked for.
        log_joint: Scores other targets at these outcomes: from packed targets `(num_samples, num_inner, theta_dim)` to
            their log prior and log likelihood, `(num_samples, num_inner)` each; None where not asked for.
        designs: What densities see of the designs, one a member of the batch, packed `(*design_batch, design_dim)`.
        redraw: Gives the same experiments with their outcomes drawn anew, the model not run again; None where not
            asked for.
        values: Values of the target and outcome sites as the model has them, `(num_samples, *design_batch, *shape)`.
    """

    theta: Float[Tensor, "num_samples *design_batch theta_dim"]
    y: Float[Tensor, "num_samples *design_batch y_dim"]
    log_det: Float[Tensor, "num_samples *design_batch"]
    outcome_log_det: Float[Tensor, "num_samples *design_batch"]
    log_prior: Float[Tensor, "num_samples *design_batch"] | None = None
    log_likelihood: Float[Tensor, "num_samples *design_batch"] | None = None
    score: Float[Tensor, "num_samples *design_batch"] | None = None
    controls: Float[Tensor, "num_samples *design_batch num_controls"] | None = None
    log_joint: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    designs: Float[Tensor, "*design_batch design_dim"] | None = None
    redraw: Callable[[], JointSample] | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_samples(self) -> int:
        """Experiments simulated at each design."""
        return self.theta.shape[0]

    def context(self) -> Tensor:
        """Return what a density is conditioned on: the outcome, then the packed design of its batch member."""
        if self.designs is None:
            return self.y
        return torch.cat([self.y, self.designs.expand(*self.y.shape[:-1], -1)], dim=-1)

    def __getitem__(self, rows: Any) -> JointSample:
        """Select experiments along the first axis."""
        return _combine([self], lambda tensors: tensors[0][rows], self.designs)


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
        controls: Also return controls for `monte_carlo.controlled_mean`.
        redraw: Keep what is needed to draw the outcomes anew (`JointSample.redraw`).
        max_bytes: Without gradients, simulations run in chunks of about this much memory.

    Returns:
        Targets and outcomes of leading shape `(num_samples, *design_batch)`.

    Raises:
        ValueError: If designs are unknown, misshapen or outside their constraints.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.experiment.resolve import resolve
        >>> sample = sample_joint(resolve(linear_gaussian(), "y"), 100)
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
    max_bytes: int = DEFAULT_MEMORY,
) -> JointSample:
    """Simulate as `sample_joint` does, at all designs, which are known to be right: nothing waits for the device."""
    batch = batch_shape(experiment, designs)
    pack = partial(pack_run, experiment, likelihood=likelihood, score=score, controls=controls, redraw=redraw)
    if torch.is_grad_enabled() and any(value.requires_grad for value in designs.values()):
        return _sample_chunk(experiment, num_samples, designs, batch, pack)
    # Site values are what is known; workings of the model are guessed to take seven times as much.
    bytes_per_sample = 8 * max(1, experiment.bytes_per_row) * batch.numel()
    chunk = max(1, min(num_samples, max_bytes // bytes_per_sample))
    parts = [
        _sample_chunk(experiment, min(chunk, num_samples - start), designs, batch, pack)
        for start in range(0, num_samples, chunk)
    ]
    return parts[0] if len(parts) == 1 else _combine(parts, torch.cat, parts[0].designs)


def design_batch_shape(experiment: Experiment, designs: Mapping[str, Tensor]) -> torch.Size:
    """Return the batch shape of designs, `()` for one design; see `sites.check_designs`."""
    return check_designs(experiment.designs, designs)


def batch_shape(experiment: Experiment, designs: Mapping[str, Tensor]) -> torch.Size:
    """Return the batch shape of designs that are known to be right; nothing waits for the device."""
    given = [(designs[site.name].shape, site.value.dim()) for site in experiment.designs if site.name in designs]
    leading = (shape[: len(shape) - own] for shape, own in given)
    return next((shape for shape in leading if shape), torch.Size())


def candidate_designs(experiment: Experiment, designs: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return the designs to evaluate, detached, those not given at their resolved values; checked."""
    return {**experiment.design_values, **given_designs(experiment.designs, designs)}


def flat_designs(experiment: Experiment, designs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every design's values with the batch in one dimension, `(num_members, *shape)`."""
    batch = batch_shape(experiment, designs)
    return {
        site.name: designs[site.name].expand(batch + site.value.shape).reshape(-1, *site.value.shape)
        for site in experiment.designs
    }


def pack_designs(experiment: Experiment, designs: Mapping[str, Tensor]) -> Tensor:
    """Return what densities see of designs, side by side, `(*design_batch, design_dim)`.

    Values in an interval come as their place `u` in [0, 1] and as the angle `arcsin(2 u - 1)`, which resolves what
    happens near the ends; an unconstrained coordinate would be infinite there. Other designs come in unconstrained
    coordinates.
    """
    batch = batch_shape(experiment, designs)
    packed = []
    for site in experiment.designs:
        value = designs[site.name].expand(batch + site.value.shape)
        ends = site.interval_ends
        if ends is None:
            packed.append(site.transform.inv(value).reshape(*batch, -1))
        else:
            place = ((value - ends[0]) / (ends[1] - ends[0])).expand(value.shape).reshape(*batch, -1)
            packed += [place, torch.asin((2.0 * place - 1.0).clamp(-1.0, 1.0))]
    return torch.cat(packed, dim=-1).to(experiment.dtype)


def unpack_designs(experiment: Experiment, packed: Float[Tensor, "num_members design_dim"]) -> dict[str, Tensor]:
    """Return design values `(num_members, *shape)` from what `pack_designs` made of them."""
    sizes = [
        site.transform.inv(site.value).numel() * (1 if site.interval_ends is None else 2) for site in experiment.designs
    ]
    values = {}
    for site, piece in zip(experiment.designs, packed.split(sizes, -1), strict=True):
        ends = site.interval_ends
        if ends is None:
            shape = site.transform.inv(site.value).shape
            values[site.name] = site.transform(piece.reshape(-1, *shape))
        else:
            place = piece[:, : piece.shape[-1] // 2].reshape(-1, *site.value.shape)
            values[site.name] = ends[0] + (ends[1] - ends[0]) * place
    return values


def _sample_chunk(
    experiment: Experiment,
    num_samples: int,
    designs: Mapping[str, Tensor],
    batch: torch.Size,
    pack: Callable[..., JointSample],
) -> JointSample:
    if not batch:
        return pack(
            run_rows(experiment.program, num_samples, experiment.shapes, designs=designs), torch.Size([num_samples])
        )
    packed = pack_designs(experiment, {name: value.detach() for name, value in designs.items()})
    members = flat_designs(experiment, designs)
    if experiment.program.design_singletons is None:
        parts = []
        for member in range(batch.numel()):
            own = {name: value[member] for name, value in members.items()}
            run = run_rows(experiment.program, num_samples, experiment.shapes, designs=own)
            parts.append(pack(run, torch.Size([num_samples])))
        return _combine(parts, lambda tensors: torch.stack(tensors, 1).unflatten(1, batch), packed)
    rows = {name: value.expand(num_samples, *value.shape).flatten(0, 1) for name, value in members.items()}
    run = run_rows(experiment.program, num_samples * batch.numel(), experiment.shapes, row_designs=rows)
    return pack(run, torch.Size([num_samples, *batch]), designs=packed)


def pack_run(
    experiment: Experiment,
    run: ProgramRun,
    leading: torch.Size,
    likelihood: bool,
    *,
    designs: Tensor | None = None,
    score: Sequence[str] = (),
    controls: bool = False,
    redraw: bool = False,
) -> JointSample:
    """Pack the rows of a run into a joint sample of leading shape `leading`."""
    theta, log_det = _pack_targets(experiment, run)
    y, outcome_log_det = pack_outcomes(experiment, run)
    log_prior = _log_prior(experiment, run, log_det)
    observed = [site.name for site in experiment.observations]
    log_likelihood = _sum_log_prob(run, observed, outcome_log_det) if likelihood else None
    own_score = _sum_log_prob(run, score, torch.zeros_like(log_det)) if score else None

    def drawn_again() -> JointSample:
        return pack_run(experiment, run.redrawn(observed), leading, likelihood, designs=designs, controls=controls)

    def shaped(rows: Tensor) -> Tensor:
        return rows.reshape(*leading, *rows.shape[1:])

    return JointSample(
        theta=shaped(theta.to(experiment.dtype)),
        y=shaped(y.to(experiment.dtype)),
        log_det=shaped(log_det),
        outcome_log_det=shaped(outcome_log_det),
        log_prior=None if log_prior is None else shaped(log_prior),
        log_likelihood=None if log_likelihood is None else shaped(log_likelihood),
        score=None if own_score is None else shaped(own_score),
        controls=shaped(run_controls(experiment, run)) if controls else None,
        designs=designs,
        redraw=drawn_again if redraw else None,
        values={site.name: shaped(run.value(site.name)) for site in (*experiment.targets, *experiment.observations)},
    )


def run_controls(experiment: Experiment, run: ProgramRun) -> Tensor:
    """Return controls, of expectation zero, of all random sites that state an entropy, `(num_rows, num_controls)`."""
    names = [
        site.name for site in (*experiment.targets, *experiment.observations, *experiment.nuisance) if site.has_density
    ]
    columns = [column for column in (run.control(name) for name in names) if column is not None]
    if columns:
        return torch.stack(columns, -1)
    return torch.zeros(len(run.traces) * run.rows_per_trace, 0, dtype=experiment.dtype, device=experiment.device)


def _sum_log_prob(run: ProgramRun, names: Iterable[str], start: Tensor) -> Tensor:
    total = start
    for name in names:
        total = total + run.log_prob(name)
    return total


def _pack_targets(experiment: Experiment, run: ProgramRun) -> tuple[Tensor, Tensor]:
    packed, log_det = [], torch.zeros((), dtype=experiment.dtype, device=experiment.device)
    for site in experiment.targets:
        if site.transform is None:
            coordinates = run.flat_value(site.name)
        else:
            # A replaced prior may hand its draws on as Delta sites, which know no support of their own.
            fn = run.traces[0].nodes[site.name]["fn"]
            given = site.transform if isinstance(base_distribution(fn), dist.Delta) else None
            coordinates, own = run.unconstrained(site.name, given)
            log_det = log_det + own
        packed.append(coordinates)
    theta = torch.cat(packed, dim=-1)
    return theta, log_det.expand(theta.shape[0])


def _log_prior(experiment: Experiment, run: ProgramRun, log_det: Tensor) -> Tensor | None:
    if not experiment.has_log_prior:
        return None
    # Auxiliary sites of a replaced prior carry the density of the draws that its Delta sites hand on.
    auxiliary = [site.name for site in experiment.others if site.role == "auxiliary" and site.has_density]
    return _sum_log_prob(run, [*experiment.target_labels, *auxiliary], log_det)


def pack_outcomes(experiment: Experiment, run: ProgramRun) -> tuple[Tensor, Tensor]:
    """Return packed outcomes `(num_rows, y_dim)` and the log `|d outcome / d packed|` of each row."""
    packed, log_det = [], torch.zeros((), dtype=experiment.dtype, device=experiment.device)
    for site in experiment.observations:
        if site.transform is not None:
            coordinates, own = run.unconstrained(site.name)
            log_det = log_det + own
        else:
            coordinates = _raw(run.flat_value(site.name), site)
        packed.append(coordinates.to(experiment.dtype))
    y = torch.cat(packed, dim=-1)
    return y, log_det.expand(y.shape[0])


def _raw(flat: Tensor, site: Site) -> Tensor:
    return flat if site.measured is None else flat[:, site.measured.flatten()]


def _combine(
    parts: list[JointSample], combine: Callable[[list[Tensor]], Tensor], designs: Tensor | None
) -> JointSample:
    """Combine the tensors of samples field by field; what is None in one is None in all."""
    redraws = [part.redraw for part in parts]

    def optional(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else combine([tensor for tensor in tensors if tensor is not None])

    return JointSample(
        theta=combine([part.theta for part in parts]),
        y=combine([part.y for part in parts]),
        log_det=combine([part.log_det for part in parts]),
        outcome_log_det=combine([part.outcome_log_det for part in parts]),
        log_prior=optional([part.log_prior for part in parts]),
        log_likelihood=optional([part.log_likelihood for part in parts]),
        score=optional([part.score for part in parts]),
        controls=optional([part.controls for part in parts]),
        designs=designs,
        redraw=None
        if any(draw is None for draw in redraws)
        else lambda: _combine([draw() for draw in redraws if draw], combine, designs),
        values={name: combine([part.values[name] for part in parts]) for name in parts[0].values},
    )


def unpack_targets(
    experiment: Experiment, theta: Float[Tensor, "*batch theta_dim"], designs: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the target sites' values at packed coordinates, `(*batch, *shape)` each.

    Supports that depend on other targets are rebuilt parents first, by running the model with the coordinates put in
    at each target site; fixed supports need no simulation.
    """
    batch, flat = theta.shape[:-1], theta.reshape(-1, theta.shape[-1])
    if any(site.dependent_support for site in experiment.targets):
        run = put_targets(experiment, flat, {**experiment.design_values, **(designs or {})})
        values = {site.name: run.value(site.name) for site in experiment.targets}
    else:
        values = {
            site.name: _constrain(site, piece)
            for site, piece in zip(experiment.targets, _split(experiment, flat), strict=True)
        }
    return {name: value.reshape(*batch, *value.shape[1:]) for name, value in values.items()}


def put_targets(
    experiment: Experiment,
    theta: Float[Tensor, "num_rows theta_dim"],
    designs: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor] | None = None,
) -> ProgramRun:
    """Run the model with packed targets (and, where given, outcome values `(num_rows, *shape)`) put in."""
    pieces = list(zip(experiment.targets, _split(experiment, theta), strict=True))
    return run_rows(
        experiment.program,
        theta.shape[0],
        experiment.shapes,
        designs=designs,
        row_coordinates={site.name: piece for site, piece in pieces if site.transform is not None},
        row_values={
            **{site.name: _constrain(site, piece) for site, piece in pieces if site.transform is None},
            **(outcomes or {}),
        },
    )


def _split(experiment: Experiment, theta: Tensor) -> tuple[Tensor, ...]:
    return theta.split([site.packed_dim for site in experiment.targets], -1)


def _constrain(site: Site, coordinates: Tensor) -> Tensor:
    if site.transform is None:
        return coordinates.reshape(-1, *site.shape).to(site.dtype)
    shape = site.transform.inverse_shape(site.shape)
    return site.transform(coordinates.reshape(-1, *shape))


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

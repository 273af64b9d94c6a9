"""Packing: between values of sites, as the model has them, and vectors of unconstrained coordinates.

Densities are those of the packed vectors, so that `log q(theta | y) - log p(theta)` and `log p(y | theta) - log q(y)`
need no further Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import ProgramRun, base_distribution, run_rows
from pyro_voed.experiment.sites import Site
from pyro_voed.experiment.static import moving_mask

_TENSORS = ("theta", "y", "log_det", "outcome_log_det", "log_prior", "log_likelihood", "score", "failed", "controls")
"""Fields of a sample that have a row for each experiment."""


@dataclass(frozen=True)
class JointSample:
    """Simulated experiments. What was not asked for, or the model does not state, is None; densities are in nats.

    Attributes:
        theta: Packed targets in unconstrained coordinates.
        y: Packed outcomes (unconstrained where the support is fixed, raw elsewhere; entries that are never measured are
            left out, those that are missing at times are filled and flagged).
        log_det: Log of `|d target values / d theta|`, for densities stated in the targets' own coordinates.
        outcome_log_det: Log of `|d outcome values / d y|`.
        log_prior: Log density of `theta` under the prior.
        log_likelihood: Log density of `y` given the latents.
        score: Log density of draws that carry no gradient themselves.
        failed: Where runs may fail: 1 for a run that did; where those are left out, how many were before each that is
            here.
        controls: Quantities of expectation zero that go along with the draws, for variance reduction.
        log_joint: Scores other targets at these outcomes: from packed targets `(num_samples, num_inner, theta_dim)` to
            their log prior and log likelihood, `(num_samples, num_inner)` each.
        pairs: Scores all pairs: log p(y_i given the latents that made y_j), `(num_samples, num_samples)`.
        designs: What densities see of the designs, one a member of the batch.
        redraw: Gives the same experiments with their outcomes drawn anew, the model not run again.
        values: Values of the target and outcome sites as the model has them, `(num_samples, *design_batch, *shape)`.
    """

    theta: Float[Tensor, "num_samples *design_batch theta_dim"]
    y: Float[Tensor, "num_samples *design_batch y_dim"]
    log_det: Float[Tensor, "num_samples *design_batch"]
    outcome_log_det: Float[Tensor, "num_samples *design_batch"]
    log_prior: Float[Tensor, "num_samples *design_batch"] | None = None
    log_likelihood: Float[Tensor, "num_samples *design_batch"] | None = None
    score: Float[Tensor, "num_samples *design_batch"] | None = None
    failed: Float[Tensor, "num_samples *design_batch"] | None = None
    controls: Float[Tensor, "num_samples *design_batch num_controls"] | None = None
    log_joint: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    pairs: Callable[[], Tensor] | None = None
    designs: Float[Tensor, "*design_batch design_dim"] | None = None
    redraw: Callable[[], JointSample] | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_samples(self) -> int:
        """Experiments simulated at each design."""
        return self.theta.shape[0]

    def context(self) -> Tensor:
        """Return what a density is conditioned on: the outcome, then the packed design of its batch member."""
        return self.y if self.designs is None else torch.cat([self.y, self.design_context()], dim=-1)

    def design_context(self) -> Tensor:
        """Return the packed design of each experiment's batch member; of no columns where there is one design."""
        if self.designs is None:
            return self.y[..., :0]
        return self.designs.expand(*self.y.shape[:-1], -1)

    def __getitem__(self, rows: Any) -> JointSample:
        """Select experiments along the first axis."""
        return combine([self], lambda tensors: tensors[0][rows], self.designs)


def combine(parts: list[JointSample], join: Callable[[list[Tensor]], Tensor], designs: Tensor | None) -> JointSample:
    """Combine the tensors of samples field by field; what is None in one is None in all."""
    names = [name for name in _TENSORS if getattr(parts[0], name) is not None]
    redraws = [part.redraw for part in parts if part.redraw is not None]
    joined: dict[str, Any] = {name: join([getattr(part, name) for part in parts]) for name in names}
    return JointSample(
        **joined,
        designs=designs,
        redraw=(lambda: combine([draw() for draw in redraws], join, designs)) if len(redraws) == len(parts) else None,
        values={name: join([part.values[name] for part in parts]) for name in parts[0].values},
    )


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
    log_prior: Tensor | None = None,
) -> JointSample:
    """Pack the rows of a run into a joint sample of leading shape `leading`.

    `log_prior` is the targets' log density in their own coordinates where the run does not state it.
    """
    theta, log_det = _pack_targets(experiment, run)
    y, outcome_log_det = pack_outcomes(experiment, run, leading[1:].numel())
    own_prior = _log_prior(experiment, run, log_det) if log_prior is None else log_prior + log_det
    observed = [site.name for site in experiment.observations]
    log_likelihood = _sum_log_prob(run, observed, outcome_log_det) if likelihood else None
    own_score = _sum_log_prob(run, score, torch.zeros_like(log_det)) if score else None

    again: Callable[[], JointSample] | None = None
    if redraw:
        again = lambda: pack_run(  # noqa: E731
            experiment,
            run.redrawn(observed),
            leading,
            likelihood,
            designs=designs,
            controls=controls,
            log_prior=log_prior,
        )
    shaped = lambda rows: rows.reshape(*leading, *rows.shape[1:])  # noqa: E731
    return JointSample(
        theta=shaped(theta.to(experiment.dtype)),
        y=shaped(y.to(experiment.dtype)),
        log_det=shaped(log_det),
        outcome_log_det=shaped(outcome_log_det),
        log_prior=None if own_prior is None else shaped(own_prior),
        log_likelihood=None if log_likelihood is None else shaped(log_likelihood),
        score=None if own_score is None else shaped(own_score),
        failed=None if experiment.failures == "error" else shaped(_failed(experiment, run)),
        controls=shaped(run_controls(experiment, run)) if controls else None,
        designs=designs,
        redraw=again,
        values={site.name: shaped(run.value(site.name)) for site in (*experiment.targets, *experiment.observations)},
    )


def run_controls(experiment: Experiment, run: ProgramRun) -> Tensor:
    """Return controls, of expectation zero, of continuous sites that state an entropy, `(num_rows, num_controls)`.

    Log densities of discrete sites are left out: where a rare value is not among the draws they hardly vary, and what a
    regression then makes of them is off by whatever the rare value would have brought.
    """
    sites = experiment.targets
    if experiment.failures == "error":
        sites = (*sites, *experiment.observations, *experiment.nuisance)
    names = [site.name for site in sites if site.has_density and not site.is_discrete]
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
        # E[log q(theta)] + H[theta], the density of q taken in the targets' own coordinates.
        return None if experiment.prior_entropy is None else log_det - experiment.prior_entropy
    # Auxiliary sites of a replaced prior carry the density of the draws that its Delta sites hand on.
    auxiliary = [site.name for site in experiment.others if site.role == "auxiliary" and site.has_density]
    return _sum_log_prob(run, [*experiment.target_labels, *auxiliary], log_det)


def pack_outcomes(experiment: Experiment, run: ProgramRun, num_designs: int = 1) -> tuple[Tensor, Tensor]:
    """Return packed outcomes `(num_rows, y_dim)` and the log `|d outcome / d packed|` of each row.

    Rows are at `num_designs` designs in turn.
    """
    check_measured(experiment, run, num_designs)
    packed, log_det = [], torch.zeros((), dtype=experiment.dtype, device=experiment.device)
    for site in experiment.observations:
        if site.transform is not None:
            coordinates, own = run.unconstrained(site.name)
            log_det = log_det + own
        else:
            coordinates = _raw(run, site)
        packed.append(coordinates.to(experiment.dtype))
    y = torch.cat(packed, dim=-1)
    return y, log_det.expand(y.shape[0])


def _raw(run: ProgramRun, site: Site) -> Tensor:
    if site.fill is not None:
        measured = run.measured(site.name)
        return filled(site, run.value(site.name), measured)
    flat = run.flat_value(site.name)
    return flat if site.measured is None else flat[:, site.measured.flatten()]


def filled(site: Site, values: Tensor, measured: Tensor | None) -> Tensor:
    """Return values `(num_rows, *shape)` with what is missing filled, then a flag for each, `(num_rows, 2 size)`."""
    assert site.fill is not None  # the site's elements may be missing
    present = torch.isfinite(values) if measured is None else torch.isfinite(values) & measured
    flat = torch.where(present, values, site.fill).reshape(len(values), -1)
    return torch.cat([flat, present.reshape(flat.shape).to(flat)], -1)


def check_measured(experiment: Experiment, run: ProgramRun, num_designs: int = 1) -> None:
    """Raise where what is measured is not the same in all runs at a design; rows are at `num_designs` in turn."""
    for site in experiment.observations:
        measured = run.measured(site.name)
        if measured is None and site.measured is None:
            continue
        if measured is None:
            measured = torch.ones(1, *site.shape, dtype=torch.bool, device=experiment.device)
        if site.fill is not None:
            rows = measured.reshape(-1, num_designs, *site.shape)
            same = rows == rows[:1]
        else:
            same = measured == (torch.ones_like(measured) if site.measured is None else site.measured)
        if not bool(same.all()):
            raise ValueError(moving_mask(site.name))


def _failed(experiment: Experiment, run: ProgramRun) -> Tensor:
    """Return 1 for each run in which a measured value of the outcome is not finite, `(num_rows,)`."""
    failed = torch.zeros((), dtype=torch.bool, device=experiment.device)
    for site in experiment.observations:
        bad, measured = ~torch.isfinite(run.value(site.name)), run.measured(site.name)
        bad = bad if measured is None else bad & measured
        failed = failed | bad.reshape(len(bad), -1).any(-1)
    return failed.to(experiment.dtype)


def unpack_targets(
    experiment: Experiment, theta: Float[Tensor, "*batch theta_dim"], designs: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the target sites' values at packed coordinates, `(*batch, *shape)` each.

    Where supports depend on other targets the model is run, which rebuilds them parents first.
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

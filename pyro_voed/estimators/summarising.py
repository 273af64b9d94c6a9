r"""Which summary an outcome gets: the caller's, or one picked from the outcome's shape, plates and symmetry.

Rows of an outcome are *exchangeable* where permuting them (with everything else the model draws in their plate) leaves
the joint density as it is. Then their order tells nothing, and a set network need not learn that. A plate alone does
not make them so: seven measurements at seven designs stand in a plate too. So the density itself is asked, at a
number of simulated experiments, at designs away from special values, with random permutations:

.. math:: \log p(y_{\pi}, \eta_{\pi} \mid \theta, \xi) = \log p(y, \eta \mid \theta, \xi)

The rule, where the caller names no summary:

* at least `FEWEST_ROWS` exchangeable rows: a `DeepSetSummary`, with correlations of columns where the targets outnumber
  the columns' own moments;
* other sites of more than `LONG` entries: a `ConvolutionalSummary` along the longest axis, a `FeedForwardSummary` where
  no axis is long;
* everything else goes to the density as it is.

A summary is about twice as wide as the targets have coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import ProgramRun, run_rows, sample_nodes
from pyro_voed.experiment.sites import Site
from pyro_voed.summaries import ComposedSummary, ConvolutionalSummary, DeepSetSummary, FeedForwardSummary

FEWEST_ROWS = 5
EXPERIMENTS_TOGETHER, EXPERIMENTS_ALONE = 64, 8
"""Experiments that permutations are tried at: in one of them all readings of a coarse scale may be equal."""

LONG = 64
SUMMARY_DIMS = (8, 256)
"""Least and greatest width of a summary that is picked."""

HIDDEN_DIMS = (64, 32)
"""Width of a picked set network, and that for more than `LONG` rows, whose cost goes with rows and width alike."""

Summary = nn.Module | Mapping[Any, nn.Module] | None


@dataclass(frozen=True)
class Rows:
    """Entries of the packed outcome in exchangeable rows."""

    names: tuple[str, ...]
    entries: Int[Tensor, "num_rows row_dim"]


def outcome_summary(experiment: Experiment, given: Any) -> nn.Module | None:
    """Return the summary of packed outcomes: the caller's module, one put together by site, or one picked.

    The keys of a mapping are outcome sites, or tuples of them whose rows are put side by side.
    """
    if isinstance(given, nn.Module):
        return given
    if given is None:
        return _picked(experiment)
    if not isinstance(given, Mapping) or not all(isinstance(part, nn.Module) for part in given.values()):
        raise TypeError(
            "summary: expected a torch module, or a mapping from outcome sites (or tuples of sites) to modules, got "
            f"{given!r}."
        )
    return _composed(experiment, given)


def entries_of(experiment: Experiment) -> dict[str, Int[Tensor, " packed_dim"]]:
    """Return where each outcome site stands in the packed outcome."""
    sizes = [site.packed_dim for site in experiment.observations]
    return dict(zip(experiment.observation_labels, torch.arange(experiment.y_dim).split(sizes), strict=True))


def _composed(experiment: Experiment, given: Mapping[Any, nn.Module]) -> ComposedSummary:
    where = entries_of(experiment)
    named = {key: (key,) if isinstance(key, str) else tuple(key) for key in given}
    labels = [name for names in named.values() for name in names]
    unknown, twice = sorted(set(labels) - set(where)), sorted({name for name in labels if labels.count(name) > 1})
    if unknown or twice:
        raise ValueError(
            f"summary: expected each outcome site at most once, of {list(where)}, got unknown {unknown} and repeated "
            f"{twice}."
        )
    own = {site.name: site for site in experiment.observations}
    entries = []
    for key, part in given.items():
        members = [own[name] for name in named[key]]
        row_dim = getattr(part, "row_dim", None)
        if row_dim is None and len(members) == 1:
            entries.append(where[members[0].name])
        else:
            size = None if row_dim is None else row_dim + int(getattr(part, "masked", False))
            entries.append(_side_by_side(members, where, size).flatten())
    words = ", ".join(f"{type(part).__name__} of {' and '.join(named[key])}" for key, part in given.items())
    return ComposedSummary(list(given.values()), entries, experiment.y_dim, words)


def _side_by_side(
    members: Sequence[Site], where: Mapping[str, Tensor], row_size: int | None
) -> Int[Tensor, "num_rows row_dim"]:
    """Return the entries of sites whose rows are put side by side; rows run along the first axis that fits all."""
    total = sum(len(where[site.name]) for site in members)
    num_rows = members[0].shape[0] if row_size is None and members[0].shape else total // (row_size or total)
    columns = []
    for site in members:
        axis = next((axis for axis, size in enumerate(site.shape) if size == num_rows), None)
        if axis is None or len(where[site.name]) != site.shape.numel():
            raise ValueError(
                f"summary: expected {num_rows} rows along an axis of each of {[site.name for site in members]}, got "
                f"shape {tuple(site.shape)} at '{site.name}'. Give row_dim as the sites have it."
            )
        columns.append(_rows_of(site, axis, where))
    return torch.cat(columns, -1)


def _rows_of(site: Site, axis: int, where: Mapping[str, Tensor]) -> Int[Tensor, "num_rows row_dim"]:
    return where[site.name].reshape(site.shape).movedim(axis, 0).reshape(site.shape[axis], -1)


def _picked(experiment: Experiment) -> ComposedSummary | None:
    width = min(max(2 * experiment.theta_dim, SUMMARY_DIMS[0]), SUMMARY_DIMS[1])
    where = entries_of(experiment)
    parts: list[nn.Module] = []
    entries, words, left = [], [], {site.name: site for site in experiment.observations}
    for rows in exchangeable_rows(experiment):
        num_rows, row_dim = rows.entries.shape
        cross = row_dim > 1 and (row_dim <= 5 or experiment.theta_dim > 2 * row_dim)
        parts.append(DeepSetSummary(row_dim, width, hidden_dim=HIDDEN_DIMS[num_rows > LONG], cross=cross))
        entries.append(rows.entries.flatten())
        words.append(f"deep set of {num_rows} exchangeable rows of {' and '.join(rows.names)}")
        left = {name: site for name, site in left.items() if name not in rows.names}
    for name, site in left.items():
        if len(where[name]) <= LONG:
            continue
        # Where packed coordinates are not the elements there is no axis to go along.
        longest = max(site.shape) if len(where[name]) == site.shape.numel() else 0
        if longest > LONG:
            entries.append(_rows_of(site, site.shape.index(longest), where).flatten())
            parts.append(ConvolutionalSummary(longest, len(where[name]) // longest, width))
            words.append(f"convolutions along {longest} steps of {name}")
        else:
            entries.append(where[name])
            parts.append(FeedForwardSummary(len(where[name]), width))
            words.append(f"feed-forward network of {len(where[name])} entries of {name}")
    if not parts:
        return None
    return ComposedSummary(parts, entries, experiment.y_dim, ", ".join(words)).to(experiment.dtype)


def exchangeable_rows(experiment: Experiment) -> list[Rows]:
    """Return the sets of exchangeable rows, at most one a site, along the longest such axis, by simulations."""
    candidates = [
        (site, axis)
        for site in experiment.observations
        for axis, size in enumerate(site.shape)
        if size >= FEWEST_ROWS and _permutable(site)
    ]
    designs = _general_designs(experiment)
    if (
        not candidates
        or designs is None
        or not experiment.is_explicit
        or any(s.is_deterministic for s in experiment.observations)
    ):
        return []
    with torch.no_grad():
        count = EXPERIMENTS_TOGETHER if experiment.runs_together else EXPERIMENTS_ALONE
        run = run_rows(experiment.program, count, experiment.shapes, designs=designs)
        found: dict[str, tuple[int, list[tuple[Site, int]]]] = {}
        for site, axis in candidates:
            members = _moving_along(experiment, run, site, axis)
            if _invariant(experiment, run, designs, members) and site.shape[axis] > found.get(site.name, (0, []))[0]:
                found[site.name] = (site.shape[axis], members)
    where, rows, taken = entries_of(experiment), [], set()
    for name, (_, members) in found.items():
        outcomes = [(site, axis) for site, axis in members if site.role == "observation"]
        if name in taken or not all(_permutable(site) for site, _ in outcomes):
            continue
        taken |= {site.name for site, _ in outcomes}
        entries = torch.cat([_rows_of(site, axis, where) for site, axis in outcomes], -1)
        rows.append(Rows(tuple(site.name for site, _ in outcomes), entries))
    return rows


def _permutable(site: Site) -> bool:
    return site.has_density and not site.is_deterministic and site.packed_dim == site.shape.numel()


def _general_designs(experiment: Experiment) -> dict[str, Tensor] | None:
    """Return designs away from special values, such as seven equal ones; None where that cannot be done."""
    designs = {}
    for site in experiment.designs:
        try:
            coordinates = site.transform.inv(site.value)
            moved = site.transform(coordinates + torch.randn_like(coordinates))
        except (NotImplementedError, ValueError, RuntimeError):
            return None
        if not site.constraint.check(moved).all():
            return None
        designs[site.name] = moved.to(site.value)
    return designs


def _moving_along(experiment: Experiment, run: ProgramRun, site: Site, axis: int) -> list[tuple[Site, int]]:
    """Return the random sites that are no targets and stand in the plate of this axis, each with its own axis."""
    nodes = sample_nodes(run.traces[0])
    frame = _frame_at(nodes[site.name], site, axis)
    if frame is None:
        return [(site, axis)]
    members = []
    for other in (*experiment.observations, *experiment.nuisance):
        if other.is_deterministic:
            continue
        for own_axis in range(len(other.shape)):
            if _frame_at(nodes[other.name], other, own_axis) == frame:
                members.append((other, own_axis))
    return members


def _frame_at(node: Mapping[str, Any], site: Site, axis: int) -> str | None:
    """Return the name of the model's own plate that runs along an axis of a site, None where there is none."""
    event_dim = node["fn"].event_dim
    dim = axis - (len(site.shape) - event_dim)  # as plates count, from the right of the batch dimensions
    return next((f.name for f in node["cond_indep_stack"] if f.vectorized and f.dim == dim), None) if dim < 0 else None


def _invariant(
    experiment: Experiment, run: ProgramRun, designs: Mapping[str, Tensor], members: Sequence[tuple[Site, int]]
) -> bool:
    """Whether permuting the members' rows leaves the density of everything but the targets as it is."""
    random = [
        s for s in (*experiment.targets, *experiment.observations, *experiment.nuisance) if not s.is_deterministic
    ]
    scored = [s.name for s in random if s.role != "target"]
    if not all(s.has_density for s in random if s.role != "target"):
        return False
    values = {s.name: run.value(s.name) for s in random}
    size, count = members[0][0].shape[members[0][1]], len(run.traces) * run.rows_per_trace
    before = _total(run, scored)
    moves = False
    for _ in range(2):
        order = torch.randperm(size, device=experiment.device)
        moved = {s.name: values[s.name].index_select(axis + 1, order) for s, axis in members}
        moves = moves or any(not torch.equal(moved[name], values[name]) for name in moved)
        again = run_rows(experiment.program, count, experiment.shapes, designs=designs, row_values={**values, **moved})
        # Sums of single-precision terms in another order differ by rounding alone, as their size goes.
        if not torch.allclose(before, _total(again, scored), rtol=1e-5, atol=1e-5 * math.sqrt(experiment.y_dim)):
            return False
    # Where no permutation moved a value, nothing was seen of what it would change.
    return moves


def _total(run: ProgramRun, names: Sequence[str]) -> Tensor:
    return torch.stack([run.log_prob(name).double() for name in names]).sum(0)

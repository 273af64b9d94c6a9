"""Does the model mean the same for many experiments at once as for one, also with one design an experiment?

Shapes alone do not tell: `theta / theta.sum()` or a softmax over the first dimension keep every shape and mix
experiments. So a small vectorised run is replayed row by row through the single-run model, and what is stated of every
site must agree. Two odd sizes tell row dimensions from dimensions of the model that happen to have the same size.

Designs that differ between rows need singleton dimensions between row and value, as many as the plate dimensions that
the design does not use itself. How many is found by trial, each trial a replay: first as many for every design, then
design by design with the others held at one value, at most `(k + 2) (m + 1) + 1` trials for k designs and m plate
dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.experiment.parameters import SiteParameterError, naming_sites
from pyro_voed.experiment.programs import Program, ProgramRun, is_deterministic, run_rows, sample_nodes
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.experiment.statements import first_difference, same, statement

PROBE_SIZES = (3, 5)
"""Odd, distinct and small: a model dimension can equal one of them, not both."""

_ADVICE = "Write the model batch-friendly (index dimensions from the right), or pass vectorize=False."


def check_vectorised(program: Program, shapes: Mapping[str, torch.Size]) -> tuple[str, ...]:
    """Check that single runs agree with vectorised ones; return the sites that could not be checked."""
    unchecked: tuple[str, ...] = ()
    for size in PROBE_SIZES:
        try:
            run = naming_sites(partial(_vectorised_run, program, size, shapes), may_fail=program.may_fail)
        except SiteParameterError as error:
            raise ValueError(
                f"{error} It came up in {size} experiments run at once: where it cannot in a single one, the model "
                f"mixes experiments. {_ADVICE}"
            ) from error
        unchecked = _replay(program, run, size, shapes)
    return unchecked


def _vectorised_run(
    program: Program,
    size: int,
    shapes: Mapping[str, torch.Size],
    designs: Mapping[str, Tensor] | None = None,
    row_designs: Mapping[str, Tensor] | None = None,
) -> ProgramRun:
    try:
        run = run_rows(program, size, shapes, designs=designs, row_designs=row_designs)
    except SiteParameterError:
        raise
    except Exception as error:  # whatever a model may raise on batched input
        raise ValueError(
            f"vectorisation failed: run for {size} experiments at once the model raised {type(error).__name__}: "
            f"{error}. {_ADVICE}"
        ) from error
    nodes = sample_nodes(run.traces[0])
    if set(nodes) != set(shapes):
        raise ValueError(f"vectorisation failed: sites {sorted(set(nodes) ^ set(shapes))} come and go. {_ADVICE}")
    for name in shapes:
        try:
            run.value(name)
        except ValueError as error:
            raise ValueError(f"vectorisation failed: {error} {_ADVICE}") from error
    return run


def _replay(
    program: Program,
    run: ProgramRun,
    size: int,
    shapes: Mapping[str, torch.Size],
    designs: Mapping[str, Tensor] | None = None,
    row_designs: Mapping[str, Tensor] | None = None,
) -> tuple[str, ...]:
    """Replay each row of a vectorised run through the single-run model and compare what it says of every site."""
    nodes = sample_nodes(run.traces[0])
    random = {name: run.value(name) for name, node in nodes.items() if not is_deterministic(node)}
    alone = replace(program, vectorised=False)
    single = run_rows(alone, size, shapes, designs=designs, row_designs=row_designs, row_values=random)
    unchecked = []
    for name, node in nodes.items():
        many, one = statement(run, name), statement(single, name)
        if many is None or one is None:
            unchecked.append(name)
        elif not same(many, one).all():
            what = "value" if is_deterministic(node) else "log density"
            values = "{:.6g} together, {:.6g} alone".format(*first_difference(many, one))
            raise ValueError(
                f"vectorisation is wrong at site '{name}': replayed one experiment at a time its {what} differs "
                f"({values}). Somewhere before it the model mixes experiments, for example by a sum or a softmax over "
                "the first dimension; index dimensions from the right, or pass vectorize=False."
            )
    return tuple(unchecked)


def lay_out_designs(
    program: Program,
    shapes: Mapping[str, torch.Size],
    designs: tuple[DesignSite, ...],
    candidates: Mapping[str, Tensor],
) -> Program:
    """Return the program with the fewest singletons between row and design value that pass the replay check.

    Where none does it comes back as it is, with a warning. `candidates`, `(*design_batch, *shape)`, are the values of
    those designs that will be varied.
    """
    if not program.vectorised:
        return replace(program, design_singletons=dict.fromkeys((site.name for site in designs), 0))
    rows = {
        site.name: _spread(candidates.get(site.name, site.value).reshape(-1, *site.value.shape), PROBE_SIZES[0])
        for site in designs
    }
    trials = _Trials(program, shapes, rows)
    alike = (dict.fromkeys(rows, count) for count in range(program.max_plate_nesting + 1))
    found = trials.first(alike) or trials.one_by_one()
    if found is None:
        warn(
            "the model does not take one design an experiment, so candidate designs are simulated one after the "
            "other. Use the designs by broadcasting from the right to have them simulated together."
        )
        return program
    return replace(program, design_singletons=found)


class _Trials:
    def __init__(self, program: Program, shapes: Mapping[str, torch.Size], rows: Mapping[str, Tensor]):
        self.program, self.shapes, self.rows = program, shapes, rows

    def passes(self, layout: Mapping[str, int]) -> bool:
        """Whether single runs agree with one whose rows have designs laid out so, those left out held at one value."""
        trial = replace(self.program, design_singletons=dict(layout))
        held = {name: values[0] for name, values in self.rows.items() if name not in layout}
        varied = {name: self.rows[name] for name in layout}
        size = PROBE_SIZES[0]
        # Where a program stops early Pyro warns of designs that it did not come to.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run = _vectorised_run(trial, size, self.shapes, held, varied)
                _replay(trial, run, size, self.shapes, held, varied)
            except ValueError:
                return False
        return True

    def first(self, layouts: Iterable[dict[str, int]]) -> dict[str, int] | None:
        """Return the first layout that passes."""
        return next((layout for layout in layouts if self.passes(layout)), None)

    def one_by_one(self) -> dict[str, int] | None:
        """Return a layout put together from those of single designs, if it passes as a whole."""
        counts = range(self.program.max_plate_nesting + 1)
        found: dict[str, int] = {}
        for name in self.rows:
            found |= self.first({name: count} for count in counts) or {}
        # Designs that are stacked with others cannot vary alone; they have one shape, so one layout serves them.
        left = [name for name in self.rows if name not in found]
        return self.first({**found, **dict.fromkeys(left, count)} for count in (counts if left else counts[:1]))


def _spread(values: Tensor, size: int) -> Tensor:
    return values[torch.linspace(0, values.shape[0] - 1, size).round().long()]

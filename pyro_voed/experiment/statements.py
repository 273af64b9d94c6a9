"""What a run says of a site given its parents, and whether two runs say the same.

A random site states a log density at its value, a deterministic one its value. Probes hold the values of all random
sites and compare statements: where they differ, something else reaches the site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_voed.experiment.programs import ProgramRun, is_deterministic


def statement(run: ProgramRun, name: str) -> Tensor | None:
    """Return a site's values `(num_rows, size)` or log densities `(num_rows,)`, None where it states neither."""
    if is_deterministic(run.traces[0].nodes[name]):
        return run.flat_value(name)
    try:
        return run.log_prob(name)
    except NotImplementedError:
        return None


def same(first: Tensor, second: Tensor) -> Tensor:
    """Return element by element whether two statements agree, to half the digits of their type."""
    if not first.dtype.is_floating_point:
        return first == second
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return torch.isclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)


def changed(first: ProgramRun, second: ProgramRun, name: str) -> bool:
    """Whether both runs state something of the site and it differs."""
    before, after = statement(first, name), statement(second, name)
    return before is not None and after is not None and not bool(same(before, after).all())


def first_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the first pair of elements that disagree."""
    index = tuple((~same(first, second)).nonzero()[0].tolist())
    return first[index].item(), second[index].item()

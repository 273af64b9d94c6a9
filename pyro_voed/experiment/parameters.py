"""Parameters of distributions outside their range, reported with the name of the site.

torch refuses them where the distribution is made, before Pyro knows for which site. So a run that fails is made once
more on the same random numbers, with torch's validation off and every site looked at before it is drawn. Parameters
that are not a number are looked for in any case, since validation may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyro
import torch
from pyro import distributions as dist
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_voed.experiment.caller_state import common_stream

T = TypeVar("T")


class SiteParameterError(ValueError):
    """A parameter outside its range; the message names the site."""


def naming_sites(run: Callable[[], T], *, may_fail: bool = False) -> T:
    """Return `run()`; where a distribution's parameters stop it, say at which site (`SiteParameterError`).

    Of a simulator that `may_fail` parameters may be NaN.
    """
    seed = int(torch.randint(2**31 - 1, ()).item())
    try:
        if may_fail:
            with common_stream(seed), pyro.validation_enabled(False), _LookAtParameters(ranges=True, may_fail=True):
                return run()
        with common_stream(seed), _LookAtParameters(ranges=False):
            return run()
    except SiteParameterError:
        raise
    except (ValueError, RuntimeError) as error:
        try:
            look = _LookAtParameters(ranges=True, may_fail=may_fail)
            with common_stream(seed), pyro.validation_enabled(False), look:
                run()
        except SiteParameterError as named:
            raise named from error
        except Exception:  # the first error is the one to show
            pass
        raise


def checked_draws(run: Callable[[], T], *, may_fail: bool) -> T:
    """Return `run()`, on the random numbers that it has anyway; where parameters stop it, say at which site."""
    if may_fail:
        # torch's validation would stop at NaN.
        return naming_sites(run, may_fail=True)
    try:
        return run()
    except (ValueError, RuntimeError):
        naming_sites(run)
        raise


class _LookAtParameters(Messenger):
    """Raise at the first site that has a parameter which is not a number, with `ranges` also one outside its range.

    Of a simulator that `may_fail` parameters may be NaN.
    """

    def __init__(self, *, ranges: bool, may_fail: bool = False):
        super().__init__()
        self.ranges, self.may_fail = ranges, may_fail

    def _pyro_sample(self, msg: Any) -> None:
        if msg["mask"] is not None and not self.ranges:
            return  # What a mask leaves out may be anything, so long as torch takes it.
        for fn in _parts(msg["fn"]):
            for parameter, value, constraint in _parameters(fn):
                fine = constraint.check(value) if self.ranges and constraint is not None else value == value
                if self.may_fail:
                    failed = torch.isnan(value)
                    # Constraints of vectors and matrices give one answer for several elements.
                    for _ in range(value.dim() - fine.dim()):
                        failed = failed.any(-1)
                    fine = fine | failed
                if not bool(fine.all()):
                    raise SiteParameterError(_complaint(msg["name"], fn, parameter, value, fine, constraint))


def _parts(fn: Any) -> Iterator[Any]:
    """Yield a distribution and those it is made of, but not what a mask covers."""
    yield fn
    for inner in ("base_dist", "component_distribution", "mixture_distribution"):
        if not isinstance(fn, dist.torch_distribution.MaskedDistribution) and hasattr(fn, inner):
            yield from _parts(getattr(fn, inner))


def _parameters(fn: Any) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Yield name, value and constraint of what torch's own validation looks at; None for a constraint that depends."""
    try:
        declared = fn.arg_constraints.items()
    except (NotImplementedError, AttributeError):
        return
    for name, constraint in declared:
        lazy = isinstance(getattr(type(fn), name, None), lazy_property) and name not in vars(fn)
        value = None if lazy else getattr(fn, name, None)
        if isinstance(value, torch.Tensor):
            yield name, value, None if constraints.is_dependent(constraint) else constraint


def _complaint(site: str, fn: Any, parameter: str, value: torch.Tensor, fine: torch.Tensor, constraint: Any) -> str:
    expected = "a number" if constraint is None else f"in {constraint}"
    got = f"{value[~fine][0].item():.6g}" if fine.shape == value.shape else f"{value.tolist()}"
    count = f" ({int((~fine).sum())} of {fine.numel()} elements)" if fine.numel() > 1 else ""
    return (
        f"site '{site}': expected parameter {parameter} of {type(fn).__name__} to be {expected}, got {got}{count}. "
        "Look at what the model computes it from."
    )

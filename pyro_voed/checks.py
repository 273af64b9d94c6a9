"""Input checks in one voice: what was expected, what came, what to do.

Public functions check their arguments once, at the door, with these helpers; everything behind the door trusts its
input. What is doubtful rather than wrong is said by `warn`.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

Labels = str | Sequence[str] | None
"""Site names as a user may give them: one name, several, or None for the default."""

_PACKAGE = os.path.dirname(__file__) + os.sep
_WRAPPERS = frozenset({"beartype", "contextlib", "jaxtyping", "pyro", "torch"})


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing to the first line outside the package that led here, the user's own.

    Counted stack levels point elsewhere with every context manager, decorator or shape check in between, so frames are
    walked.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_between(frame):
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__"), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


def _is_between(frame: FrameType) -> bool:
    """Whether a frame is the package's, or of what stands between its functions and the user's line."""
    filename, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
    # Beartype compiles a wrapper for each function, whose file is named after what it wraps.
    return filename.startswith((_PACKAGE, "<@beartype")) or module.partition(".")[0] in _WRAPPERS


def as_labels(labels: Labels, argument: str) -> tuple[str, ...] | None:
    """Return labels as a tuple of distinct names, or None where the default is wanted."""
    if labels is None:
        return None
    names = (labels,) if isinstance(labels, str) else tuple(labels)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected site names (strings), got {name!r} of type {type(name).__name__}.")
    if not names:
        raise ValueError(f"{argument} is empty: name at least one site, or leave it out for the default.")
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} names a site twice: {list(names)}. Name each site once.")
    return names


def check_known(names: Iterable[str], known: Iterable[str], argument: str, what: str) -> None:
    """Raise ValueError where `names` holds one that is not in `known`."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument}: the model has no {what} called {unknown}. It has {known}.")


def check_count(value: int, argument: str, minimum: int = 1) -> int:
    """Return `value` where it is an integer of at least `minimum`, else raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an integer, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{argument}: expected at least {minimum}, got {value}.")
    return value


def check_positive(value: float, argument: str) -> float:
    """Return `value` where it is a finite number above zero, else raise ValueError."""
    if not (value > 0 and value < float("inf")):
        raise ValueError(f"{argument}: expected a finite number above 0, got {value!r}.")
    return value


def check_share(value: float, argument: str) -> float:
    """Return `value` where it is a number strictly between 0 and 1, else raise ValueError."""
    if not 0 < value < 1:
        raise ValueError(f"{argument}: expected a number in (0, 1), got {value!r}.")
    return value


def check_shape(values: Tensor, shape: tuple[int | None, ...], argument: str) -> None:
    """Raise ValueError unless the shape is the one wanted, None standing for any size."""
    if values.ndim != len(shape) or any(w not in (None, size) for w, size in zip(shape, values.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{argument}: expected shape ({wanted}), got {tuple(values.shape)}.")


def check_finite(values: Tensor, argument: str, error: type[Exception] = ValueError) -> None:
    """Raise where a value is NaN or infinite."""
    if bad := int((~torch.isfinite(values)).sum()):
        raise error(f"{argument}: {bad} of {values.numel()} values are not finite. Find out why; none is left out.")


def check_callable(model: Any, argument: str = "model") -> None:
    """Raise TypeError where the model (or guide) cannot be called."""
    if not callable(model):
        raise TypeError(
            f"{argument}: expected a Pyro program (a callable of one experiment), got {type(model).__name__}. "
            "Pass the function itself, not its result."
        )


def check_picklable(value: Any, argument: str) -> None:
    """Raise PicklingError where what the user gave for `argument` cannot be pickled."""
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise pickle.PicklingError(
            f"{argument}: expected what can be pickled, such as a function at the top level of a module, got "
            f"{value!r} ({error}). Define it at the top level, or use pyro_voed.save and pyro_voed.load, which need no "
            "pickled code."
        ) from error


def as_site_values(values: Tensor | Mapping[str, Any], names: Sequence[str], argument: str) -> dict[str, Tensor]:
    """Return site values as a dict of tensors; a bare tensor is taken where there is one site."""
    if not isinstance(values, Mapping):
        if len(names) != 1:
            raise ValueError(f"{argument}: expected a dict with the sites {list(names)}, got one bare value.")
        values = {names[0]: values}
    if set(values) != set(names):
        raise ValueError(f"{argument}: expected values for the sites {list(names)}, got {sorted(values)}.")
    return {name: torch.as_tensor(values[name]) for name in names}

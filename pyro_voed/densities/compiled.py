"""A density whose log-density is compiled for training, and that falls back to plain execution where that fails.

`torch.compile` fuses the many small operations of a flow; the first call costs the better part of a minute and needs a
C++ compiler. What cannot be compiled on a machine, or for a density, runs as it is, with a warning: an option to go
faster must not be one to fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_voed.caller_state import modes_kept


class CompiledDensity:
    """Stand in for a density in an objective, with a compiled `log_prob` and everything else its own.

    Args:
        density: The density; its weights stay where they are, so that an optimiser of them trains it.

    Example:
        >>> from pyro_voed.densities import AffineCouplingFlow
        >>> flow = AffineCouplingFlow(2, 3)
        >>> CompiledDensity(flow).theta_dim
        2
    """

    def __init__(self, density: Any) -> None:
        self._density = density
        self._compiled: Callable[[Tensor, Tensor], Tensor] | None = None
        try:
            # The first compiler of a process turns off the validation of all its distributions.
            with modes_kept():
                self._compiled = torch.compile(density.log_prob)
        # The compiler raises whatever its many parts raise.
        except Exception as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._density, name)

    def log_prob(self, theta: Tensor, context: Tensor) -> Tensor:
        """Return the density's log-density, nats, by whichever way works."""
        if self._compiled is not None:
            try:
                return self._compiled(theta, context)
            except Exception as error:
                self._give_up(error)
        return self._density.log_prob(theta, context)

    def _give_up(self, error: Exception) -> None:
        self._compiled = None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"compile: the density could not be compiled here, so training runs without. {reason[0]}", stacklevel=3
        )

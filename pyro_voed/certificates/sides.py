"""What is asked of a certificate, and what is found at one design."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Request(NamedTuple):
    """What is asked of an interval: its width in nats, the normal quantile of its errors, and its budget."""

    width: float
    quantile: float
    max_simulations: int


@dataclass(frozen=True)
class Plan:
    """Sizes of the two levels; there is no first one without a flow."""

    num_flow: int
    num_outer: int
    num_inner: int


@dataclass(frozen=True)
class Sides:
    """Both bounds at one design, their standard errors, the heavier tail of their terms, what speaks against them."""

    lower: float
    lower_error: float
    upper: float
    upper_error: float
    tail: float
    plan: Plan
    disagreement: str = ""

    def width(self, quantile: float) -> float:
        """Return the width of the interval made of them."""
        return self.upper - self.lower + quantile * (self.lower_error + self.upper_error)

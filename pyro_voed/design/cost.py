r"""What a design costs, beside what it tells: information less cost, or information per cost.

A search given `cost=c` looks for the largest :math:`\mathrm{EIG}(\xi) - c(\xi)`, one given `cost=per_cost(c)` for the
largest :math:`\mathrm{EIG}(\xi) / c(\xi)`. In the difference the cost is in nats: multiply money by a price, in nats
per unit of it. A larger price buys less, and no design that is best at some price is beaten at its own cost.

By gradient the ratio is climbed along :math:`\nabla \mathrm{EIG} - r\, \nabla c` with the present ratio r, which is c
times the gradient of the ratio: the price under which the present design would just pay (Dinkelbach 1967, "On nonlinear
fractional programming", Management Science 13).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CostFunction = Callable[[dict[str, Tensor]], Any]
"""From one design, a dict as in the model, to its cost, a number."""


@dataclass(frozen=True)
class Cost:
    """A cost of designs, and whether information is divided by it."""

    function: CostFunction
    divides: bool = False

    def at(self, designs: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Return the cost of one design, checked."""
        cost = self.function(dict(designs))
        try:
            cost = torch.as_tensor(cost, dtype=next(iter(designs.values())).dtype).reshape(())
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "cost: expected a function from one design (a dict from labels to tensors, as in the model) to a "
                f"number, got {cost!r}."
            ) from error
        if not bool(torch.isfinite(cost)) or (self.divides and not bool(cost > 0)):
            raise ValueError(
                f"cost: expected a finite number{' above 0, to divide by' if self.divides else ''}, got {cost.item()} "
                f"at { ({name: value.tolist() for name, value in designs.items()}) }."
            )
        return cost

    def at_rows(self, designs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], num: int) -> Tensor:
        """Return the costs of `num` designs, `(num,)`; designs of the shape of one are the same in all rows."""
        rows = [
            {name: value[row] if value.shape != shapes[name] else value for name, value in designs.items()}
            for row in range(num)
        ]
        return torch.stack([self.at(row) for row in rows])

    def worth(self, eig: Tensor, cost: Tensor) -> Tensor:
        """Return what a search maximises."""
        return eig / cost if self.divides else eig - cost

    def charged(self, terms: Tensor, cost: Tensor) -> Tensor:
        """Return terms whose mean is the worth, with the gradient described above; `cost` is `(*batch)`."""
        price = (terms.mean(0) / cost).detach() if self.divides else torch.ones_like(cost)
        value = self.worth(terms, cost).detach()
        climbed = terms - price * cost
        return climbed + (value - climbed).detach()


def per_cost(function: CostFunction) -> Cost:
    """Make the `cost` of a search that maximises information per cost.

    Args:
        function: From one design, a dict as in the model, to its cost, a number above 0.

    Example:
        >>> import torch
        >>> per_cost(lambda designs: 2.0 + designs["xi"].sum()).at({"xi": torch.tensor([1.0, 3.0])})
        tensor(6.)
    """
    return Cost(_checked(function), divides=True)


def as_cost(cost: Any) -> Cost | None:
    """Return the cost a user gave; a bare function is subtracted."""
    if cost is None or isinstance(cost, Cost):
        return cost
    return Cost(_checked(cost))


def _checked(function: Any) -> CostFunction:
    if not callable(function):
        raise TypeError(f"cost: expected a function from a dict of designs to a number, got {function!r}.")
    return function

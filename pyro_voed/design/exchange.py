r"""Design search by exchange: entries from a menu, whole numbers, and allocations of subjects to arms.

Where designs are discrete, a design's neighbours are those that differ in one exchange: one entry replaced by another
option of the menu, or some subjects moved from one arm to another. The search goes to the best neighbour for as long as
one is better (Fedorov's exchange algorithm), so every design on the way can be carried out as it is. For m entries and
n options a round compares :math:`m (n - 1)` designs, of the :math:`n^m` that there are.

*Noise.* The best of many noisy estimates is one that erred upwards, so the three best neighbours are compared with the
present design again on fresh random numbers, the same for all four, and only the winner there is moved to.
*Allocations* begin by moving many subjects at once and halve the number where no such move is better, down to one.

References:
    Fedorov (1972), "Theory of optimal experiments"; Cook and Nachtsheim (1980), "A comparison of algorithms for
    constructing exact D-optimal designs", Technometrics 22.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_callable, check_count, check_known
from pyro_voed.design.evaluator import Estimator, Evaluator, run_search
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.results import DesignResult, EIGResult, FitHistory, StopReason

FINALISTS = 3
TRIES = 1_000
"""Random designs drawn in the hope of one that is allowed."""

Design = dict[str, Tensor]


@dataclass(frozen=True)
class Menu:
    """Entries that are each one of some options, `(num_options, *shape of an entry)`."""

    options: Tensor

    def begin(self, value: Tensor) -> Tensor:
        """Return the design of options nearest to a value."""
        return self.options[self._indices(value)].reshape(value.shape)

    def drawn(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a design."""
        count = value.numel() // self.options[0].numel()
        return self.options[torch.randint(len(self.options), (count,), generator=generator)].reshape(value.shape)

    def neighbours(self, value: Tensor, size: int) -> list[Tensor]:
        """Return the designs with one entry exchanged."""
        indices, found = self._indices(value), []
        for entry, own in enumerate(indices.tolist()):
            for option in range(len(self.options)):
                if option != own:
                    changed = indices.clone()
                    changed[entry] = option
                    found.append(self.options[changed].reshape(value.shape))
        return found

    def sizes(self, value: Tensor) -> list[int]:
        """Return the sizes of exchanges, largest first."""
        return [1]

    def fits(self, site: DesignSite) -> None:
        """Raise ValueError where the options are none of the design's."""
        entry = self.options.shape[1:]
        if tuple(site.value.shape[len(site.value.shape) - len(entry) :]) != tuple(entry):
            raise ValueError(
                f"choices['{site.name}']: expected options (num_options, *shape of an entry) for a design of shape "
                f"{tuple(site.value.shape)}, got {tuple(self.options.shape)}."
            )
        outside = [option.tolist() for option in self.options if not bool(site.constraint.check(option).all())]
        if outside:
            raise ValueError(
                f"choices['{site.name}']: options {outside[:5]} violate the design's constraint {site.constraint}. "
                "Leave them out, or widen it in the model."
            )

    def _indices(self, value: Tensor) -> Tensor:
        flat = self.options.flatten(1) if self.options.dim() > 1 else self.options.unsqueeze(1)
        return torch.cdist(value.reshape(-1, flat.shape[1]).double(), flat.double()).argmin(-1)


@dataclass(frozen=True)
class Allocation:
    """Whole numbers of at least zero that add up to a total."""

    total: int

    def begin(self, value: Tensor) -> Tensor:
        """Return the allocation with the shares of a value, the largest remainders rounded up."""
        shares = value.double().clamp_min(0.0).flatten()
        shares = torch.ones_like(shares) if shares.sum() == 0 else shares
        wanted = self.total * shares / shares.sum()
        counts = wanted.floor()
        short = self.total - int(counts.sum())
        counts[(wanted - counts).argsort(descending=True, stable=True)[:short]] += 1
        return counts.reshape(value.shape).to(value)

    def drawn(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """Draw an allocation, shares uniform on the simplex."""
        shares = -torch.rand(value.shape, generator=generator, dtype=torch.double).clamp_min(1e-12).log()
        return self.begin(shares).to(value)

    def neighbours(self, value: Tensor, size: int) -> list[Tensor]:
        """Return the allocations with `size` subjects moved from one arm to another."""
        found, flat = [], value.flatten()
        for giver in range(len(flat)):
            for taker in range(len(flat)):
                if giver != taker and flat[giver] >= size:
                    changed = flat.clone()
                    changed[giver] -= size
                    changed[taker] += size
                    found.append(changed.reshape(value.shape))
        return found

    def sizes(self, value: Tensor) -> list[int]:
        """Return the sizes of moves, largest first."""
        sizes = [max(1, self.total // (2 * value.numel()))]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        return sizes

    def fits(self, site: DesignSite) -> None:
        """Raise ValueError where the design is not one of several arms that can hold all subjects."""
        if site.value.numel() < 2:
            raise ValueError(f"choices['{site.name}']: an allocation needs two entries at least, got one.")
        whole = self.begin(site.value)
        if not bool(site.constraint.check(whole).all()):
            raise ValueError(
                f"choices['{site.name}']: the allocation {whole.tolist()} violates the design's constraint "
                f"{site.constraint}. Counts start at 0 and end at {self.total}: constraints.nonnegative allows them."
            )


def allocation(total: int) -> Allocation:
    """Make the choice of whole numbers, at least zero, that add up to a total, for `search_exchange`.

    Args:
        total: The number of subjects, say, that the entries of the design share.

    Example:
        >>> import torch
        >>> allocation(10).begin(torch.tensor([0.5, 0.25, 0.25]))
        tensor([5., 3., 2.])
    """
    return Allocation(check_count(total, "total"))


def search_exchange(
    estimator: Estimator,
    choices: Mapping[str, Any],
    *,
    allowed: Callable[[Design], Any] | None = None,
    cost: Any = None,
    starts: int = 1,
    max_rounds: int = 100,
    together: bool = True,
    seed: int | None = None,
) -> DesignResult:
    """Find the best design whose entries are options of a menu or counts of an allocation, by exchanges.

    Afterwards the best design is in the parameter store under its own name; nothing else of the caller's has changed.

    Args:
        estimator: From designs to an `EIGResult`; the contract is in `evaluator`.
        choices: For each design searched over, its options, `(num_options, *shape of an entry)`, of which every entry
            is one: numbers for a vector of times, rows for a matrix, ``torch.arange(11)`` for whole numbers. Or
            `allocation(total)`.
        allowed: From one design (a dict as in the model) to whether it may be carried out; other designs are passed
            over.
        cost: As in `search_grid`.
        starts: Number of starts, one after the other. The first is the design of options nearest to the stored value,
            else the model's initial one; further ones, and the first where it is not allowed, are drawn at random.
        max_rounds: Most rounds of a start.
        together: As in `search_grid`; False shares random numbers between neighbours where the estimator does not
            do so itself.

    Returns:
        The best design with a fresh estimate there; `path` has the designs gone through by the winning start,
        `history.bound` their estimates, `history.stop_reason` is "converged" where no neighbour was better.

    Raises:
        TypeError, ArithmeticError: As in `search_grid`.
        ValueError: As there; if choices do not fit the designs; if no allowed design was found to start from.

    Example:
        >>> import torch
        >>> from pyro_voed.estimators import eig_lbkld
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> estimator = lambda designs: eig_lbkld(implicit_toy(), "y", "theta", designs=designs, num_samples=1000)
        >>> search_exchange(estimator, {"xi": torch.linspace(0.2, 1.8, 5)}, seed=0).designs["xi"]
        tensor(1.8000)
    """
    if not isinstance(choices, Mapping) or not choices:
        raise TypeError(f"choices: expected a dict from design labels to options or an allocation, got {choices!r}.")
    if allowed is not None:
        check_callable(allowed, "allowed")
    check_count(max_rounds, "max_rounds")
    given = {name: _choice(name, value) for name, value in choices.items()}
    search = _Exchange(given, allowed, check_count(starts, "starts"), max_rounds, together)
    return run_search(search, estimator, seed, cost)


@dataclass
class _Way:
    """Where one start has been, and what was estimated there."""

    path: list[Design]
    values: list[Tensor] = field(default_factory=list)
    reason: StopReason = "budget"


@dataclass
class _Exchange:
    """One search: its settings, and the ways of its starts."""

    choices: Mapping[str, Menu | Allocation]
    allowed: Callable[[Design], Any] | None
    num_starts: int
    max_rounds: int
    together: bool
    initial: EIGResult | None = None
    ways: list[_Way] = field(default_factory=list)
    selection: Tensor | None = None
    seconds: float = 0.0

    def find(self, evaluator: Evaluator) -> Design:
        started = time.perf_counter()
        self.initial = evaluator.begin()
        own = {site.name: site for site in evaluator.sites}
        check_known(self.choices, own, "choices", "design")
        self.stored = {name: own[name].value.detach() for name in own}
        self.choices = {name: _of_type(choice, self.stored[name]) for name, choice in self.choices.items()}
        for name, choice in self.choices.items():
            choice.fits(own[name])
        for number in range(self.num_starts):
            self.ways.append(_Way([self._start(number, evaluator.generator)]))
            self._improve(self.ways[-1], evaluator)
            self.seconds = time.perf_counter() - started
        ends = [way.path[-1] for way in self.ways]
        if len(ends) > 1:
            self.selection = evaluator.compare(_rows(ends), self.together, [])
        return ends[self._best()]

    def record(self, final: EIGResult) -> dict[str, Any]:
        if not self.ways:
            return {"initial": self.initial}
        way = self.ways[self._best()]
        values = torch.stack(way.values) if way.values else torch.zeros(0)
        done = self.selection is not None or len(self.ways) == self.num_starts == 1
        reason: StopReason = way.reason if done and way.values else "interrupted"
        return {
            "path": _rows(way.path),
            "path_steps": torch.arange(len(way.path)),
            "history": FitHistory(values, torch.ones_like(values), reason, self.seconds),
            "start_eigs": self.selection,
            "initial": self.initial,
        }

    def _best(self) -> int:
        if self.selection is not None:
            return int(self.selection.argmax())
        reached = [way.values[-1].item() if way.values else -float("inf") for way in self.ways]
        return max(range(len(reached)), key=reached.__getitem__)

    def _start(self, number: int, generator: torch.Generator) -> Design:
        for attempt in range(TRIES):
            if number == attempt == 0:
                start = {name: choice.begin(self.stored[name]) for name, choice in self.choices.items()}
            else:
                start = {name: choice.drawn(self.stored[name], generator) for name, choice in self.choices.items()}
            if self._allows(start):
                return start
        raise ValueError(
            f"allowed: it refuses the stored design and {TRIES - 1} others drawn from the choices. Store a design that "
            "is allowed, or leave options out of the choices."
        )

    def _allows(self, design: Mapping[str, Tensor]) -> bool:
        return self.allowed is None or bool(self.allowed({**self.stored, **design}))

    def _improve(self, way: _Way, evaluator: Evaluator) -> None:
        """Go to better neighbours until there is none."""
        sizes = [size for name, choice in self.choices.items() for size in choice.sizes(self.stored[name])]
        ladder = sorted(set(sizes), reverse=True)
        for _ in range(self.max_rounds):
            better = self._better(way, ladder[0], evaluator)
            if better is not None:
                way.path.append(better)
            elif len(ladder) > 1:
                ladder = ladder[1:]
            else:
                way.reason = "converged"
                return

    def _better(self, way: _Way, size: int, evaluator: Evaluator) -> Design | None:
        """Return the best neighbour where it holds its own on fresh random numbers, else None."""
        present = way.path[-1]
        around = [design for design in self._neighbours(present, size) if self._allows(design)]
        worth = evaluator.compare(_rows([present, *around]), self.together, [])
        way.values.append(worth[0])
        leading = [int(index) for index in worth.argsort(descending=True)[:FINALISTS] if worth[index] > worth[0]]
        if not leading:
            return None
        finalists = [present, *(around[index - 1] for index in leading)]
        winner = int(evaluator.compare(_rows(finalists), self.together, []).argmax())
        return finalists[winner] if winner else None

    def _neighbours(self, design: Design, size: int) -> list[Design]:
        return [
            {**design, name: changed}
            for name, choice in self.choices.items()
            for changed in choice.neighbours(design[name], size)
        ]


def _choice(name: str, given: Any) -> Menu | Allocation:
    if isinstance(given, Allocation):
        return given
    try:
        options = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"choices['{name}']: expected options as numbers, or an allocation, got {given!r}.") from error
    if options.dim() == 0 or len(options) < 1:
        raise ValueError(f"choices['{name}']: expected options (num_options, *shape of an entry), got {given!r}.")
    return Menu(options.unique(dim=0))


def _of_type(choice: Menu | Allocation, value: Tensor) -> Menu | Allocation:
    return Menu(choice.options.to(value)) if isinstance(choice, Menu) else choice


def _rows(designs: list[Design]) -> dict[str, Float[Tensor, "num *shape"]]:
    return {name: torch.stack([design[name] for design in designs]) for name in designs[0]}

r"""Design search by comparison: candidates on a grid, or drawn at random.

.. math:: \xi^* = \arg\max_{\xi \in \{\xi_1, \dots, \xi_n\}} \widehat{\mathrm{EIG}}(\xi)

asks of the information only that it can be estimated, by any estimator. In one or two dimensions a grid shows
the whole surface; in more, random candidates at least cost no more with the dimension (Bergstra and Bengio), and
`spsa` climbs. The largest of n noisy estimates is biased upwards: of n candidates that are equally good, each with
standard error s, it exceeds the truth by up to :math:`s \sqrt{2 \log n}` on average. So the number reported is a fresh
estimate at the winner, and the table keeps the standard errors with which the candidates were compared.

The contract of an estimator is that of `evaluator`.

References:
    Bergstra and Bengio (2012), "Random search for hyper-parameter optimization", JMLR 13. Dong et al. (2025), section
    4.4 (grids over one and two observation times).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_voed.checks import check_callable, check_count
from pyro_voed.design.coordinates import from_coordinates, scattered, to_coordinates
from pyro_voed.design.evaluator import ALONE, Estimator, Evaluator, run_search
from pyro_voed.design.projection import Constraints, Projection
from pyro_voed.design.starts import equally_many, rows_of_designs
from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.results import DesignResult, EIGResult


def search_grid(
    estimator: Estimator,
    values: Mapping[str, Any],
    *,
    product: bool = True,
    allowed: Callable[[dict[str, Tensor]], Any] | None = None,
    cost: Any = None,
    together: bool = True,
    seed: int | None = None,
) -> DesignResult:
    """Find the best of all combinations of given design values, or of a given list.

    Afterwards the best design is in the parameter store under its own name; nothing else of the caller's has changed.

    Args:
        estimator: From designs to an `EIGResult`; the contract is in `evaluator`.
        values: Values of each design, `(num_values, *shape)`. For all combinations of the elements of one design,
            `torch.cartesian_prod` makes them: ``{"xi": torch.cartesian_prod(times, times)}``.
        product: Combine every value of each label with every value of the others; False takes the rows of all
            labels, which are then equally many, as the candidates.
        allowed: From one candidate (a dict as in the model) to whether it may be chosen; the others are not estimated.
        cost: A cost in nats, from one design to a number, to be subtracted from the information, or `per_cost(...)` to
            divide it; the result's `cost` and `worth` stand beside its information.
        together: Estimate all candidates in one call. False makes one call each, all with the same random numbers:
            their errors then go together and cancel from the comparison as far as the simulator allows.

    Returns:
        The best candidate with a fresh estimate there; `candidates` is the table of all. Ctrl-C gives the best of the
        complete estimates (`interrupted`), or is raised before there is one.

    Raises:
        TypeError: If the estimator returns no `EIGResult`, or values are no dict of numbers.
        ValueError: If values are missing, misshapen or outside their constraints, or the estimator uses other designs
            than it is given, or the same random numbers in each call.
        ArithmeticError: If an estimate is not finite.

    Example:
        >>> import pyro, torch
        >>> from pyro_voed.estimators import eig_lbkld
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> estimator = lambda designs: eig_lbkld(implicit_toy(), "y", "theta", designs=designs, num_samples=1000)
        >>> best = search_grid(estimator, {"xi": torch.linspace(0.2, 1.8, 5)}, seed=0)
        >>> best.designs["xi"], best.candidates.eig.shape, pyro.param("xi")
        (tensor(1.8000), torch.Size([5]), tensor(1.8000, grad_fn=<AddBackward0>))
    """
    rows = rows_of_designs(values, "values")
    if product:
        rows = _all_combinations(rows)
    num = equally_many(rows, "values")
    if allowed is not None:
        check_callable(allowed, "allowed")
        kept = [row for row in range(num) if bool(allowed({name: value[row] for name, value in rows.items()}))]
        if not kept:
            raise ValueError(f"allowed: it refuses all of the {num} candidates. Give others, or allow one of these.")
        rows = {name: value[kept] for name, value in rows.items()}
    return run_search(_Comparison(lambda evaluator: rows, together), estimator, seed, cost)


def search_random(
    estimator: Estimator,
    num_candidates: int = 100,
    *,
    proposal: Callable[[int], Mapping[str, Tensor]] | None = None,
    constraints: Constraints | None = None,
    cost: Any = None,
    together: bool = True,
    seed: int | None = None,
) -> DesignResult:
    """Find the best of randomly drawn designs; all else, results and errors too, is as in `search_grid`.

    Args:
        num_candidates: Designs to compare.
        proposal: From a number to so many values of each design, `(num_candidates, *shape)`. Default: the stored value,
            else the model's initial one, and for all others uniform draws for designs in an interval, N(0, 1) about the
            stored value in unconstrained coordinates for others.
        constraints: What couples entries, such as `min_gap("xi", 0.1)` (see `design.constraints`): candidates are moved
            to the nearest designs that satisfy it.

    Example:
        >>> from pyro_voed.estimators import eig_lbkld
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> estimator = lambda designs: eig_lbkld(implicit_toy(), "y", "theta", designs=designs, num_samples=1000)
        >>> bool(search_random(estimator, 8, seed=0).designs["xi"] > 1.0)
        True
    """
    check_count(num_candidates, "num_candidates")
    if proposal is not None:
        check_callable(proposal, "proposal")

    def draw(evaluator: Evaluator) -> dict[str, Tensor]:
        start = evaluator.begin() if proposal is None or constraints is not None else None
        projection = Projection.of(constraints, evaluator.sites)
        if proposal is None:
            assert start is not None
            centre = to_coordinates(evaluator.sites, start.designs)
            drawn = scattered(evaluator.sites, centre, num_candidates - 1, evaluator.generator)
            rows = from_coordinates(evaluator.sites, torch.cat([centre.unsqueeze(0), drawn]))
        else:
            with common_stream(evaluator.draw_seed()):
                rows = rows_of_designs(proposal(num_candidates), "proposal")
            if equally_many(rows, "proposal") != num_candidates:
                raise ValueError(f"proposal: expected {num_candidates} values of each design, as it was asked for.")
        return rows if projection is None else projection.of_rows(rows)

    return run_search(_Comparison(draw, together), estimator, seed, cost)


@dataclass
class _Comparison:
    """Compare candidates: all in one call, or each in a call on the same random numbers."""

    draw: Callable[[Evaluator], dict[str, Tensor]]
    together: bool
    labels: frozenset[str] = frozenset()
    found: list[EIGResult] = field(default_factory=list)
    worth: Tensor | None = None

    def find(self, evaluator: Evaluator) -> dict[str, Tensor]:
        candidates = self.draw(evaluator)
        self.labels = frozenset(candidates)
        worth = evaluator.compare(candidates, self.together, self.found)
        self.worth = None if evaluator.cost is None else worth
        chosen = int(worth.argmax())
        return {name: value[chosen] for name, value in candidates.items()}

    def record(self, final: EIGResult) -> dict[str, Any]:
        if not self.found or self.together:
            return {"candidates": self.found[0] if self.found else None, "candidate_worth": self.worth}
        return {"candidates": _table(self.found, self.labels), "candidate_worth": self.worth}


def _table(results: list[EIGResult], labels: frozenset[str]) -> EIGResult:
    """Join estimates at single designs; what was learned differs from one to the next and is left out."""
    designs = {
        name: torch.stack([result.designs[name] for result in results]) if name in labels else value
        for name, value in results[0].designs.items()
    }
    return replace(
        results[0],
        eig=torch.stack([result.eig for result in results]),
        standard_error=torch.stack([result.standard_error for result in results]),
        num_simulations=sum(result.num_simulations for result in results),
        seconds=sum(result.seconds for result in results),
        designs=designs,
        **ALONE,
    )


def _all_combinations(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    indices = torch.meshgrid(*(torch.arange(len(value)) for value in values.values()), indexing="ij")
    return {name: value[index.flatten()] for (name, value), index in zip(values.items(), indices, strict=True)}

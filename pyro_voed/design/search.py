r"""Design search by comparison: candidates on a grid, or drawn at random.

.. math:: \xi^* = \arg\max_{\xi \in \{\xi_1, \dots, \xi_n\}} \widehat{\mathrm{EIG}}(\xi)

asks of the information only that it can be estimated, by any estimator whatever. In one or two dimensions a grid shows
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

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_voed.checks import check_callable, check_count
from pyro_voed.design.evaluator import (
    Estimator,
    Evaluator,
    at_best,
    draw_seed,
    from_coordinates,
    own_generator,
    scattered,
    store_best,
    to_coordinates,
)
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.results import Bound, EIGResult


@dataclass(frozen=True)
class SearchResult:
    """The best of a list of candidate designs.

    It has no path and no training record, as a `DesignResult` does, but a table of candidates.

    Attributes:
        designs: Best design, one entry a design label, as in the parameter store.
        eig: Estimate in nats at the best design, on draws that took no part in the choice.
        standard_error: Its Monte Carlo standard error in nats.
        bound: Which way the estimate errs.
        final: The full estimate behind `eig`.
        candidates: The estimates the choice was made by, one entry a candidate, with their standard errors and designs;
            `plot_eig_surface` and its relatives draw it. The largest of them errs upwards.
        chosen: Index of the best among them.
        num_simulations: Experiments simulated in all.
        seconds: Wall time.
    """

    designs: Mapping[str, Tensor]
    eig: Tensor
    standard_error: Tensor
    bound: Bound
    final: EIGResult = field(repr=False)
    candidates: EIGResult = field(repr=False)
    chosen: int
    num_simulations: int
    seconds: float

    @property
    def experiment(self) -> Any:
        """What was resolved from the model."""
        return self.final.experiment

    def __str__(self) -> str:
        lines = [str(self.final).splitlines()[0]]
        lines += [
            f"  {name} = {[round(x, 4) for x in value.flatten().tolist()]}" for name, value in self.designs.items()
        ]
        among = self.candidates
        lines.append(
            f"best of {len(among.eig)} candidates, where it had {among.eig[self.chosen].item():.4f} +- "
            f"{among.standard_error[self.chosen].item():.4f}"
        )
        lines.append(f"{self.num_simulations:,} simulated experiments, {self.seconds:.1f} s")
        return "\n".join(lines)


def search_grid(
    estimator: Estimator,
    values: Mapping[str, Any],
    *,
    product: bool = True,
    together: bool = True,
    seed: int | None = None,
) -> SearchResult:
    """Find the best of all combinations of given design values, or of a given list.

    Afterwards the best design is in the parameter store under its own name; nothing else of the caller's has changed.

    Args:
        estimator: From designs to an `EIGResult`; the contract is in `evaluator`.
        values: Values of each design, `(num_values, *shape)`. For all combinations of the elements of one design,
            `torch.cartesian_prod` makes them: ``{"xi": torch.cartesian_prod(times, times)}``.
        product: Combine every value of each label with every value of the others; False takes the rows of all
            labels, which are then equally many, as the candidates.
        together: Estimate all candidates in one call. False makes one call each, all with the same random numbers:
            their errors then go together and cancel from the comparison as far as the simulator allows, at the price
            of resolving the model anew each time.
        seed: Seed; None draws one from the global generator.

    Returns:
        The best candidate, a fresh estimate there, and the table of all.

    Raises:
        TypeError: If the estimator returns no `EIGResult`.
        ValueError: If values are missing, misshapen or outside their constraints, or the estimator uses other designs
            than it is given, or the same random numbers in each call.
        ArithmeticError: If an estimate is not finite.

    Example:
        >>> import pyro, torch
        >>> from pyro_voed.estimators import eig_lbkld
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> def estimator(designs):
        ...     return eig_lbkld(implicit_toy(), "y", "theta", designs=designs, num_samples=1000)
        >>> best = search_grid(estimator, {"xi": torch.linspace(0.2, 1.8, 5)}, seed=0)
        >>> best.designs["xi"], best.candidates.eig.shape, pyro.param("xi")
        (tensor(1.8000), torch.Size([5]), tensor(1.8000, grad_fn=<AddBackward0>))
    """
    check_callable(estimator, "estimator")
    given = _given_values(values)
    candidates = _all_combinations(given) if product else given
    _equally_many(candidates, "values")
    with isolated(seed) as used:
        started = time.perf_counter()
        result = _best_of(Evaluator(estimator), candidates, together, own_generator(used), started)
    store_best(result)
    return result


def search_random(
    estimator: Estimator,
    num_candidates: int = 100,
    *,
    proposal: Callable[[int], Mapping[str, Tensor]] | None = None,
    together: bool = True,
    seed: int | None = None,
) -> SearchResult:
    """Find the best of randomly drawn designs.

    Afterwards the best design is in the parameter store under its own name; nothing else of the caller's has changed.

    Args:
        estimator: From designs to an `EIGResult`; the contract is in `evaluator`.
        num_candidates: Designs to draw.
        proposal: From a number to so many values of each design, `(num_candidates, *shape)`. Default: uniform for
            designs in an interval, N(0, 1) about the stored (else initial) value in unconstrained coordinates for
            others.
        together: Estimate all candidates in one call; False as in `search_grid`.
        seed: Seed; None draws one from the global generator.

    Returns:
        The best candidate, a fresh estimate there, and the table of all.

    Raises:
        TypeError: If the estimator returns no `EIGResult`.
        ValueError: If the proposal's designs are missing, misshapen or outside their constraints, or the estimator uses
            other designs than it is given, or the same random numbers in each call.
        ArithmeticError: If an estimate is not finite.

    References:
        Bergstra and Bengio (2012).

    Example:
        >>> from pyro_voed.estimators import eig_lbkld
        >>> from pyro_voed.problems.implicit_toy import implicit_toy
        >>> def estimator(designs):
        ...     return eig_lbkld(implicit_toy(), "y", "theta", designs=designs, num_samples=1000)
        >>> best = search_random(estimator, 8, seed=0)
        >>> bool(best.designs["xi"] > 1.0)
        True
    """
    check_callable(estimator, "estimator")
    check_count(num_candidates, "num_candidates")
    if proposal is not None:
        check_callable(proposal, "proposal")
    with isolated(seed) as used:
        started = time.perf_counter()
        generator = own_generator(used)
        evaluator = Evaluator(estimator)
        if proposal is None:
            start = evaluator.begin(draw_seed(generator))
            centre = to_coordinates(evaluator.experiment, start.designs)
            drawn = scattered(evaluator.experiment, centre, num_candidates, generator)
            candidates = from_coordinates(evaluator.experiment, drawn)
        else:
            pyro.set_rng_seed(draw_seed(generator))
            candidates = _given_values(proposal(num_candidates))
            if _equally_many(candidates, "proposal") != num_candidates:
                raise ValueError(f"proposal: expected {num_candidates} values of each design, as it was asked for.")
        result = _best_of(evaluator, candidates, together, generator, started)
    store_best(result)
    return result


def _best_of(
    evaluator: Evaluator, candidates: dict[str, Tensor], together: bool, generator: torch.Generator, started: float
) -> SearchResult:
    seed = draw_seed(generator)
    num = len(next(iter(candidates.values())))
    if together:
        table = evaluator(candidates, seed)
        if table.eig.shape != (num,):
            raise ValueError(
                f"estimator: expected {num} estimates for {num} candidates, got shape {tuple(table.eig.shape)}. "
                "Where it takes one design at a time, search with together=False."
            )
    else:
        # A row at a time and the same seed for each: common random numbers.
        rows = [{name: value[row] for name, value in candidates.items()} for row in range(num)]
        table = _table([evaluator(row, seed) for row in rows], candidates)
    chosen = int(table.eig.argmax())
    # As the estimator had them: in the designs' own type, those not searched over at their value.
    designs = {
        name: value[chosen].detach().clone() if name in candidates else value.detach().clone()
        for name, value in table.designs.items()
    }
    final = at_best(evaluator({name: designs[name] for name in candidates}, draw_seed(generator)), designs)
    return SearchResult(
        designs=designs,
        eig=final.eig,
        standard_error=final.standard_error,
        bound=final.bound,
        final=final,
        candidates=table,
        chosen=chosen,
        num_simulations=evaluator.num_simulations,
        seconds=time.perf_counter() - started,
    )


def _table(results: list[EIGResult], candidates: Mapping[str, Tensor]) -> EIGResult:
    """Join estimates at single designs; what is learnt differs from one to the next and is left out."""
    first = results[0]
    return EIGResult(
        eig=torch.stack([result.eig for result in results]),
        standard_error=torch.stack([result.standard_error for result in results]),
        bound=first.bound,
        estimator=first.estimator,
        num_simulations=sum(result.num_simulations for result in results),
        num_samples=first.num_samples,
        seconds=sum(result.seconds for result in results),
        designs={
            name: torch.stack([result.designs[name] for result in results]) if name in candidates else value
            for name, value in first.designs.items()
        },
        target_labels=first.target_labels,
        observation_labels=first.observation_labels,
        nuisance_labels=first.nuisance_labels,
        experiment=first.experiment,
    )


def _given_values(values: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"values: expected a dict from design labels to values, got {values!r}.")
    given = {name: torch.as_tensor(value).detach() for name, value in values.items()}
    for name, value in given.items():
        if value.dim() == 0 or len(value) == 0:
            raise ValueError(f"values['{name}']: expected shape (num_values, *shape of the design), got {value.shape}.")
    return given


def _equally_many(candidates: Mapping[str, Tensor], argument: str) -> int:
    counts = {name: len(value) for name, value in candidates.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{argument}: expected equally many for each design, got {counts}.")
    return next(iter(counts.values()))


def _all_combinations(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    indices = torch.meshgrid(*(torch.arange(len(value)) for value in values.values()), indexing="ij")
    return {name: value[index.flatten()] for (name, value), index in zip(values.items(), indices, strict=True)}

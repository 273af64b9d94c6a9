r"""What searches without gradients share: the estimator as they see it, and how they begin and end.

*The contract of an estimator*: a function from designs to an `EIGResult`, such as ::

    lambda designs: eig_lbkld(model, "y", "theta", designs=designs)

It gets a dict of designs, `(*design_batch, *shape)` for each label, or `{}` for the designs as they stand. It leaves
`seed` to the search, which gives each call random streams of its own: estimators draw anew in each, or, where
common random numbers are wanted, the same again. Names, constraints and places of the designs are those of the result's
`experiment`; the designs of a result without one are taken to be on the real line, and none is stored.

*Ctrl-C* ends a search. An estimate whose training it ended is not used: the best of the complete estimates is given,
marked as interrupted. It is the largest of several, which errs upwards. Where none is complete, `KeyboardInterrupt` is
raised.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from pyro_voed.checks import check_callable, check_known, warn
from pyro_voed.design.cost import Cost, as_cost
from pyro_voed.design.starts import store_designs
from pyro_voed.doubts import at_edge
from pyro_voed.experiment.caller_state import common_stream, isolated
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.results import DesignResult, EIGResult

Estimator = Callable[[dict[str, Tensor]], EIGResult]
"""From designs, `(*design_batch, *shape)` for each label, to an estimate at each of them."""

ALONE: dict[str, Any] = {
    "learned": None,
    "weights": None,
    "certificate": None,
    "references": (),
    "doubts": (),
    "difference_error": None,
}
"""Fields of a result that say nothing of one design where they are of many, or of many where they are of one."""


@dataclass
class Evaluator:
    """A user's estimator: its results checked, their cost added up, the best one at one design kept.

    The generator is the source of the search's own draws; the global streams are the estimator's. `sites`, the designs,
    are known after the first call.
    """

    estimator: Estimator
    generator: torch.Generator
    cost: Cost | None = None
    sites: tuple[DesignSite, ...] = field(default=(), init=False)
    num_simulations: int = field(default=0, init=False)
    best: EIGResult | None = field(default=None, init=False)

    def draw_seed(self) -> int:
        """Draw a seed for calls of the estimator."""
        return int(torch.randint(2**31 - 1, (), generator=self.generator).item())

    def begin(self) -> EIGResult:
        """Estimate at the designs as they stand."""
        result = self({}, self.draw_seed())
        if result.eig.dim() != 0:
            raise ValueError(
                "estimator: called with {} it is to estimate at the designs as they stand, but it gave "
                f"{tuple(result.eig.shape)} estimates. Pass the designs on: designs=designs."
            )
        return result

    def __call__(self, designs: Mapping[str, Tensor], seed: int) -> EIGResult:
        """Estimate at the designs given, on the random numbers of the seed."""
        with common_stream(seed):
            before = torch.get_rng_state()
            result = self._estimate(designs)
            drew = not torch.equal(before, torch.get_rng_state())
            # Only where torch's generator was left alone is a second call needed to tell.
            if not self.sites and not drew:
                again = self._estimate(designs)
                if torch.equal(again.eig, result.eig) and bool((result.standard_error > 0).any()):
                    raise ValueError(
                        "estimator: it uses the same random numbers in each call, so no estimate would be independent "
                        "of the search. Leave its seed out; the search takes care of seeds (its own argument seed=)."
                    )
        self.sites = self.sites or _design_sites(result)
        self._keep_best(result, designs)
        return result

    def in_one_call(self, designs: Mapping[str, Tensor], count: int, seed: int, alone: str) -> EIGResult:
        """Estimate at `count` designs, `(count, *shape)` for each label; `alone` says how to have one design a call."""
        result = self(designs, seed)
        if result.eig.shape != (count,):
            raise ValueError(
                f"estimator: expected {count} estimates for {count} designs, got shape {tuple(result.eig.shape)}. "
                f"Where it takes one design at a time, search with {alone}."
            )
        return result

    def worth(self, result: EIGResult) -> Tensor:
        """Return what the search maximises, at each design of an estimate: its information, or that beside its cost."""
        if self.cost is None:
            return result.eig
        if result.eig.dim() == 0:
            return self.cost.worth(result.eig, self.cost.at(result.designs))
        shapes = {site.name: site.value.shape for site in self.sites}
        return self.cost.worth(result.eig, self.cost.at_rows(result.designs, shapes, len(result.eig)).to(result.eig))

    def compare(self, designs: Mapping[str, Tensor], together: bool, found: list[EIGResult]) -> Float[Tensor, " num"]:
        """Return the worth of `(num, *shape)` designs, and add the estimates of it to those `found`.

        All are estimated in one call, or each in a call of its own from the same seed.
        """
        num, seed, before = len(next(iter(designs.values()))), self.draw_seed(), len(found)
        if together:
            found.append(self.in_one_call(designs, num, seed, "together=False"))
        else:
            for row in range(num):
                found.append(self({name: value[row] for name, value in designs.items()}, seed))
        return torch.cat([self.worth(result).reshape(-1) for result in found[before:]])

    def _estimate(self, designs: Mapping[str, Tensor]) -> EIGResult:
        with warnings.catch_warnings():
            # Steps of a search are compared, each with the next: that two are alike is no news.
            warnings.filterwarnings("ignore", message=".*designs are indistinguishable")
            result = self.estimator(dict(designs))
        if not isinstance(result, EIGResult):
            raise TypeError(
                f"estimator: expected a function from designs to an EIGResult, got {type(result).__name__} from it. "
                "For example: lambda designs: eig_lbkld(model, designs=designs)."
            )
        self.num_simulations += result.num_simulations
        records = [one.history for one in (result, *result.references)]
        if any(record is not None and record.stop_reason == "interrupted" for record in records):
            raise KeyboardInterrupt
        _check_used(result, designs)
        return result

    def _keep_best(self, result: EIGResult, designs: Mapping[str, Tensor]) -> None:
        if result.eig.dim() > 1:
            return
        worth = self.worth(result)
        index = int(worth.argmax())
        if result.eig.dim() == 1:
            own = {name: value[index] if name in designs else value for name, value in result.designs.items()}
            eig, standard_error = result.eig[index], result.standard_error[index]
            result = replace(result, eig=eig, standard_error=standard_error, designs=own, **ALONE)
        if self.best is None or worth.max() > self.worth(self.best):
            self.best = result


@runtime_checkable
class Method(Protocol):
    """How a search looks for the best design."""

    def find(self, evaluator: Evaluator) -> dict[str, Tensor]:
        """Return the best design found."""

    def record(self, final: EIGResult) -> dict[str, Any]:
        """Return what there is to tell of the search, also if it was interrupted, as fields of `DesignResult`."""


def run_search(method: Method, estimator: Estimator, seed: int | None, cost: Any = None) -> DesignResult:
    """Search, estimate anew at the best design, and store it."""
    check_callable(estimator, "estimator")
    cost = as_cost(cost)
    with isolated(seed) as used:
        started = time.perf_counter()
        evaluator = Evaluator(estimator, torch.Generator().manual_seed(used), cost)
        interrupted = False
        try:
            final = evaluator(method.find(evaluator), evaluator.draw_seed())
        except KeyboardInterrupt:
            if evaluator.best is None:
                raise
            final, interrupted = evaluator.best, True
        designs = {name: value.detach().clone() for name, value in final.designs.items()}
        experiment = None if final.experiment is None else final.experiment.at_designs(designs)
        result = DesignResult(
            final=replace(final, designs=designs, experiment=experiment),
            num_simulations=evaluator.num_simulations,
            seconds=time.perf_counter() - started,
            interrupted=interrupted,
            cost=None if cost is None else cost.at(designs),
            worth=None if cost is None else evaluator.worth(final),
            **method.record(final),
        )
        compared = result.candidates
        if compared is not None and result.candidate_worth is not None:
            compared = replace(compared, eig=result.candidate_worth)
        if compared is not None and (doubt := at_edge(compared)):
            warn(f"{doubt}.")
            result = replace(result, doubts=(doubt,))
    if experiment is not None:
        store_designs(experiment, designs)
    return result


def _check_used(result: EIGResult, designs: Mapping[str, Tensor]) -> None:
    check_known(designs, result.designs, "designs", "design")
    if not result.designs:
        raise ValueError("the model has no design: mark what the experimenter sets with pyro.param.")
    for name, value in designs.items():
        used = result.designs[name]
        if used.shape != value.shape or not torch.equal(used, value.to(used)):
            raise ValueError(
                f"estimator: its result is for other values of design '{name}' than it was given. Pass them on "
                "(designs=designs), or search with together=False where it takes one design at a time."
            )
    if not bool(torch.isfinite(result.eig).all()):
        where = {name: value.tolist() for name, value in designs.items() if value.numel() <= 12}
        raise ArithmeticError(f"{result.estimator}: estimates are not finite at the designs {where or 'given'}.")


def _design_sites(result: EIGResult) -> tuple[DesignSite, ...]:
    if result.experiment is not None:
        return tuple(result.experiment.designs)
    return tuple(
        DesignSite(name, value.detach(), constraints.real, leaf=None, in_store=False)
        for name, value in result.designs.items()
    )

r"""An estimator as a search without gradients sees it, and the coordinates that such a search moves in.

*The contract of an estimator*, shared by `search` and `spsa`: a function from designs to an `EIGResult`, such as ::

    lambda designs: eig_lbkld(model, "y", "theta", designs=designs)

It gets a dict of designs, `(*design_batch, *shape)` for each label, or `{}` for the designs as they stand. It leaves
`seed` to the search, which seeds the global generators before each call: estimators draw anew in each, or, where
common random numbers are wanted, the same again. Names, constraints and places of the designs are read off the
result's `sites`; an estimator of one's own that states none is taken to have designs on the real line, and then nothing
is stored for them.

*Coordinates* of a design are its place in its interval, from 0 to 1, or the unconstrained coordinates of its constraint
where that is no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import constraints

from pyro_voed.checks import check_known
from pyro_voed.design.optimise import store_designs
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.results import EIGResult

Estimator = Callable[[dict[str, Tensor]], EIGResult]
"""From designs, `(*design_batch, *shape)` for each label, to an estimate at each of them."""


@dataclass
class Evaluator:
    """A user's estimator, its results checked and their cost added up.

    Attributes:
        estimator: From designs to an `EIGResult`.
        experiment: The designs, known after the first call.
        num_simulations: Experiments simulated so far.
    """

    estimator: Estimator
    experiment: tuple[DesignSite, ...] = ()
    num_simulations: int = 0

    def begin(self, seed: int) -> EIGResult:
        """Estimate at the designs as they stand."""
        result = self({}, seed)
        if result.eig.dim() != 0:
            raise ValueError(
                "estimator: called with {} it is to estimate at the designs as they stand, but it gave "
                f"{tuple(result.eig.shape)} estimates. Pass the designs on: designs=designs."
            )
        for site in self.experiment:
            if site.constraint.is_discrete:
                raise ValueError(
                    f"design '{site.name}' is discrete ({site.constraint}): list its values for search_grid instead."
                )
        return result

    def __call__(self, designs: Mapping[str, Tensor], seed: int) -> EIGResult:
        """Estimate at the designs given, on the random numbers of the seed."""
        pyro.set_rng_seed(seed)
        before = torch.get_rng_state()
        result = self.estimator(dict(designs))
        drew = not torch.equal(before, torch.get_rng_state())
        if not isinstance(result, EIGResult):
            raise TypeError(
                f"estimator: expected a function from designs to an EIGResult, got {type(result).__name__} from it. "
                "For example: lambda designs: eig_lbkld(model, designs=designs)."
            )
        self.num_simulations += result.num_simulations
        _check_used(result, designs)
        if not self.experiment:
            self.experiment = _design_sites(result)
            if not drew:
                self._check_draws_anew(designs, result)
        return result

    def _check_draws_anew(self, designs: Mapping[str, Tensor], result: EIGResult) -> None:
        # Only where torch's generator was left alone is a second call needed to tell.
        again = self.estimator(dict(designs))
        self.num_simulations += again.num_simulations
        if torch.equal(again.eig, result.eig) and bool((result.standard_error > 0).any()):
            raise ValueError(
                "estimator: it uses the same random numbers in each call, so no estimate would be independent of the "
                "search. Leave its seed out; the search takes care of seeds (its own argument seed=)."
            )


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


def draw_seed(generator: torch.Generator) -> int:
    """Draw a seed for one call of an estimator."""
    return int(torch.randint(2**31 - 1, (), generator=generator).item())


def own_generator(seed: int) -> torch.Generator:
    """Return the source of the search's own draws; the global stream is the estimators'."""
    return torch.Generator().manual_seed(seed)


def store_best(result: Any) -> None:
    """Leave the best design where Pyro users look for it, if a model stands behind the estimates."""
    if result.experiment is not None:
        store_designs(result.experiment, result.designs)


def at_best(final: EIGResult, designs: Mapping[str, Tensor]) -> EIGResult:
    """Return the estimate with the best design as the value of its sites, for what goes on from there."""
    if final.experiment is None:
        return final
    experiment = tuple(replace(site, value=designs[site.name]) for site in final.experiment.designs)
    return replace(final, experiment=replace(final.experiment, designs=experiment))


def to_coordinates(sites: Sequence[DesignSite], designs: Mapping[str, Tensor]) -> Float[Tensor, "*batch dim"]:
    """Return designs side by side: their place in [0, 1] where they lie in an interval, else unconstrained."""
    packed = []
    for site in sites:
        value, ends = designs[site.name].detach().double(), site.interval_ends
        if ends is None:
            coordinates, own = site.transform.inv(value), site.transform.inv(site.value).dim()
        else:
            coordinates, own = (value - ends[0]) / (ends[1] - ends[0]), site.value.dim()
        packed.append(coordinates.reshape(*coordinates.shape[: coordinates.dim() - own], -1))
    return torch.cat(packed, -1)


def from_coordinates(sites: Sequence[DesignSite], x: Float[Tensor, "*batch dim"]) -> dict[str, Tensor]:
    """Return designs `(*batch, *shape)` of their own type from coordinates."""
    shapes = [_coordinate_shape(site) for site in sites]
    designs = {}
    for site, shape, piece in zip(sites, shapes, x.split([shape.numel() for shape in shapes], -1), strict=True):
        piece, ends = piece.reshape(x.shape[:-1] + shape), site.interval_ends
        if ends is None:
            designs[site.name] = site.transform(piece).to(site.value)
        else:
            value = (ends[0] + (ends[1] - ends[0]) * piece).to(site.value)
            # Rounding must not put a value beyond the end it is meant to be at.
            designs[site.name] = torch.minimum(torch.maximum(value, ends[0]), ends[1])
    return designs


def in_interval(sites: Sequence[DesignSite]) -> Bool[Tensor, " dim"]:
    """Return which coordinates are places in [0, 1]."""
    return torch.cat([torch.full((_coordinate_shape(site).numel(),), site.interval_ends is not None) for site in sites])


def scattered(
    sites: Sequence[DesignSite], centre: Float[Tensor, " dim"], num: int, generator: torch.Generator
) -> Float[Tensor, "num dim"]:
    """Draw coordinates: uniform in intervals, N(0, 1) about the centre elsewhere."""
    uniform = torch.rand(num, len(centre), generator=generator, dtype=torch.double)
    normal = torch.randn(num, len(centre), generator=generator, dtype=torch.double)
    return torch.where(in_interval(sites), uniform, centre.cpu() + normal).to(centre)


def _coordinate_shape(site: DesignSite) -> torch.Size:
    return site.value.shape if site.interval_ends is not None else site.transform.inv(site.value).shape

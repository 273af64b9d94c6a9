r"""Expected coverage: do the posterior's regions of credibility :math:`\alpha` hold the truth that often?

Over simulated experiments :math:`(\theta^\star, y)` the expected coverage of a rule
:math:`\Theta_\alpha(y)` that encloses the mass :math:`\alpha` of :math:`q(\theta \mid y)` is

.. math:: c(\alpha) = \mathbb{E}\left[ 1\{\theta^\star \in \Theta_\alpha(y)\} \right] ,

which is :math:`\alpha` for the posterior. Two rules are taken. The region of highest density, of all targets together,
holds the truth where the share of draws with a higher density than the truth's is below :math:`\alpha`. The central
interval of a column holds it where its rank among the draws is neither in the lowest nor in the highest
:math:`(1 - \alpha) / 2`. Among :math:`L` draws a share has :math:`L + 1` possible values; it is put at a random place
within its cell, :math:`u = (r + v) / (L + 1)` with :math:`v` uniform, so that under calibration coverage is exactly
:math:`\alpha` at every level, regardless of :math:`L`.

A coverage below the level is that of a posterior too narrow (overconfident) or in the wrong place, which coverage alone
cannot tell apart (`calibration` can); one above is that of a posterior too wide.

References:
    J. Hermans, A. Delaunoy, F. Rozet, A. Wehenkel, V. Begy and G. Louppe (2022), A crisis in simulation-based
    inference? Beware, your posterior approximations can be unfaithful. TMLR.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.diagnostics.calibration import PASSED, check_simulated, headline
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.diagnostics.uniformity import random_ranks, uniformity_band, uniformity_p_values
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.monte_carlo import mean_and_standard_error

LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class RegionCoverage:
    """Coverage of one rule for regions.

    Attributes:
        name: "joint" for regions of highest density, else the column of the central intervals.
        coverage: Share of experiments whose region holds the truth, at each level.
        standard_error: Binomial, from one success and one failure more than were seen, so that it is never 0.
        p_value: Of coverage equal to the level at all levels, for this rule alone.
        excess: Coverage less level, mean over the levels: below 0 the posterior is too narrow.
        verdict: In words: the direction, where the rule's coverage leaves the band.
    """

    name: str
    coverage: Float[Tensor, " num_levels"]
    standard_error: Float[Tensor, " num_levels"]
    p_value: float
    excess: float
    excess_error: float
    verdict: str


@dataclass(frozen=True)
class CoverageResult:
    """Expected coverage of regions of highest density and of central intervals.

    The band, `p_value` (over all rules) and `confidence` are as in `SBCResult`.

    Attributes:
        levels: Nominal coverage of the regions.
        joint: Regions of highest density of all targets together; None where log densities are unknown or it was not
            asked for.
        columns: Central intervals of each column.
    """

    levels: Float[Tensor, " num_levels"]
    joint: RegionCoverage | None
    columns: tuple[RegionCoverage, ...]
    lower: Float[Tensor, " num_levels"]
    upper: Float[Tensor, " num_levels"]
    p_value: float
    confidence: float
    num_simulations: int
    num_draws: int

    @property
    def regions(self) -> tuple[RegionCoverage, ...]:
        """Every rule that was tested, the joint one first."""
        return self.columns if self.joint is None else (self.joint, *self.columns)

    @property
    def passed(self) -> bool:
        """Whether every rule is inside the band at every level."""
        return self.p_value > 1 - self.confidence

    def __str__(self) -> str:
        lines = [headline("expected coverage", self, f" over {len(self.regions)} kinds of region")]
        width = max(len(region.name) for region in self.regions)
        for region in self.regions:
            lines.append(
                f"{region.name:<{width}s}  p = {region.p_value:.2g}, coverage less level {region.excess:+.3f} +- "
                f"{region.excess_error:.3f}: {region.verdict}"
            )
        return "\n".join(lines)


def expected_coverage(
    simulated: SimulatedPosteriors,
    levels: Sequence[float] = LEVELS,
    *,
    joint: bool | None = None,
    confidence: float = 0.95,
    seed: int | None = None,
) -> CoverageResult:
    """Test whether regions of the posterior hold the truth as often as they say.

    Args:
        simulated: Experiments with posterior draws, at least 20; `simulate_posteriors` makes them.
        levels: Nominal coverages, increasing, in (0, 1).
        joint: Whether to test regions of highest density; None does so where log densities are known, and leaves
            `CoverageResult.joint` None elsewhere.
        confidence: Probability with which a right posterior passes, all rules together, in (0, 1).
        seed: Seed of the places within the cells between draws.

    Example:
        >>> truths = torch.randn(200, 1)
        >>> y = truths + torch.randn(200, 1)
        >>> draws = 0.5 * y.unsqueeze(1) + 0.5**0.5 * torch.randn(200, 50, 1)  # the posterior: N(y / 2, 1 / 2)
        >>> result = expected_coverage(SimulatedPosteriors(truths, draws, ("theta",)), seed=0)
        >>> result.passed, result.joint is None
        (True, True)
    """
    check_simulated(simulated, confidence)
    probabilities = _check_levels(levels)
    if joint is None:
        joint = simulated.log_density is not None and simulated.draw_log_density is not None
    with isolated(seed), torch.no_grad():
        places = (2 * _within_cells(simulated.truths, simulated.draws) - 1).abs()
        if joint:
            places = torch.cat([_density_places(simulated).unsqueeze(1), places], 1)
    names = (["joint"] if joint else []) + list(simulated.columns)
    held = places.cpu() < torch.tensor(probabilities, dtype=torch.float64).view(-1, 1, 1)
    p_values = uniformity_p_values(held.sum(1), simulated.num_simulations, probabilities)
    level = (1 - confidence) / len(names)
    lower, upper = uniformity_band(simulated.num_simulations, probabilities, level)
    regions = [
        _region(name, held[..., index].double().T, p_values[index].item(), probabilities, level)
        for index, name in enumerate(names)
    ]
    return CoverageResult(
        levels=torch.tensor(probabilities, dtype=torch.float64),
        joint=regions[0] if joint else None,
        columns=tuple(regions[1:] if joint else regions),
        lower=lower,
        upper=upper,
        p_value=min(1.0, len(names) * float(p_values.min())),
        confidence=confidence,
        num_simulations=simulated.num_simulations,
        num_draws=simulated.num_draws,
    )


def _check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(level) for level in levels)
    ends = (0.0, *values, 1.0)
    if not values or any(not low < high for low, high in itertools.pairwise(ends)):
        raise ValueError(f"levels: expected increasing probabilities in (0, 1), got {list(values)[:8]}.")
    return values


def _within_cells(
    values: Float[Tensor, " num_simulations *dim"], draws: Float[Tensor, "num_simulations num_draws *dim"]
) -> Float[Tensor, " num_simulations *dim"]:
    """Return `(rank + v) / (num_draws + 1)` with `v` uniform on [0, 1): exactly uniform under calibration."""
    ranks = random_ranks(values, draws)
    return (ranks + torch.rand(ranks.shape, dtype=torch.float64, device=ranks.device)) / (draws.shape[1] + 1)


def _density_places(simulated: SimulatedPosteriors) -> Float[Tensor, " num_simulations"]:
    """Return the mass of the region of highest density with the truth at its edge."""
    log_density, draw_log_density = simulated.log_density, simulated.draw_log_density
    if log_density is None or draw_log_density is None:
        raise ValueError(
            "simulated: regions of highest density need log_density and draw_log_density. simulate_posteriors gives "
            "them; without them leave joint=True out."
        )
    for name, values in (("log_density", log_density), ("draw_log_density", draw_log_density)):
        if bad := int(values.isnan().sum()):
            raise ValueError(f"{name}: {bad} of {values.numel()} values are NaN. Find out why.")
    # Ranks are counted from below, regions are filled from the highest density down.
    return _within_cells(-log_density, -draw_log_density)


def _region(name: str, held: Tensor, p_value: float, probabilities: tuple[float, ...], level: float) -> RegionCoverage:
    """Return the coverage of one rule from what its regions hold, `(num_simulations, num_levels)`."""
    smoothed = (held.sum(0) + 1) / (len(held) + 2)
    surplus = held.mean(1) - sum(probabilities) / len(probabilities)
    excess, excess_error, verdict = width_verdict(surplus, failed=p_value <= level)
    return RegionCoverage(
        name=name,
        coverage=held.mean(0),
        standard_error=(smoothed * (1 - smoothed) / len(held)).sqrt(),
        p_value=p_value,
        excess=excess,
        excess_error=excess_error,
        verdict=verdict,
    )


def width_verdict(surplus: Float[Tensor, " num_simulations"], *, failed: bool) -> tuple[float, float, str]:
    """Return the mean surplus of coverage over its level, its standard error, and in words what departs."""
    excess, error = (value.item() for value in mean_and_standard_error(surplus))
    if not failed:
        return excess, error, PASSED
    if abs(excess) < 2 * error:
        return excess, error, "another shape"
    return excess, error, "too narrow" if excess < 0 else "too wide"

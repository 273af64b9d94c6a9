r"""Tests of accuracy with random points: coverage of balls around references chosen without the truth.

For a reference :math:`\theta_r` and posterior draws :math:`\theta_1, \dots, \theta_L` of a simulated experiment with
truth :math:`\theta^\star`, let

.. math:: f = \#\{l : d(\theta_l, \theta_r) < d(\theta^\star, \theta_r)\} .

The ball around :math:`\theta_r` that encloses the posterior mass :math:`\alpha` holds the truth where
:math:`f / L < \alpha`. If that happens with probability :math:`\alpha` for every way to place the references, given
the outcome too, then the posterior is exact. Unlike ranks column by column, this sees how columns depend on each other,
and it needs no densities. References here do not look at the outcome, so the prior in place of the posterior still
passes: see contraction (`recovery`).

Distances are Euclidean, in columns standardised over all truths and draws. A reference is one of the points, truth or
draw, of another experiment. That makes the truth of each experiment and its draws exchangeable, references and
standardisation included, under calibration: which of the :math:`L + 1` points is the truth is then a fair draw, and the
p-value is the rank of the largest departure of the curve,
:math:`\max_\alpha |c(\alpha) - \alpha| / \mathrm{sd}(\alpha)`, among those with the truths chosen anew from the same
points. It is exact for any number of references, which share one truth and are not independent.

With references far from the posterior a wrong width shows as an S-shaped curve and with near ones as a curve to one
side; either way a posterior too narrow has too little coverage at the high levels. A small bias, towards half of the
references and away from the others, hardly shows: look for it with `calibration`.

References:
    P. Lemos, A. Coogan, Y. Hezaveh and L. Perreault-Levasseur (2023), Sampling-based accuracy testing of posterior
    estimators for general inference. ICML.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from pyro_voed.checks import check_count
from pyro_voed.diagnostics.calibration import check_simulated, headline
from pyro_voed.diagnostics.coverage import LEVELS, width_verdict
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.diagnostics.uniformity import rank_p_value
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.monte_carlo import mean_and_standard_error

NUM_RELABELLINGS = 2_000
"""Times that truths are chosen anew: the p-value 0.05 is then known to 0.005."""


Points = Float[Tensor, "num_simulations num_points dim"]
Ranks = Int[Tensor, "num_simulations num_points"]
Held = Float[Tensor, "num_simulations num_points num_levels"]
References = Float[Tensor, "num_simulations dim"]


@dataclass(frozen=True)
class TARPResult:
    """Expected coverage of balls around random references.

    The band and `confidence` are as in `SBCResult`.

    Attributes:
        levels: Nominal coverage.
        coverage: Share of balls that hold the truth, at each level.
        standard_error: Of `coverage`, over experiments; the references of one are counted as one.
        p_value: Of coverage equal to the level at all levels.
        excess: Coverage less level, mean over the levels above one half: below 0 the posterior is too narrow.
        verdict: In words: the direction, where the curve leaves the band.
        num_references: References of each experiment.
    """

    levels: Float[Tensor, " num_levels"]
    coverage: Float[Tensor, " num_levels"]
    standard_error: Float[Tensor, " num_levels"]
    lower: Float[Tensor, " num_levels"]
    upper: Float[Tensor, " num_levels"]
    p_value: float
    excess: float
    excess_error: float
    confidence: float
    verdict: str
    num_simulations: int
    num_draws: int
    num_references: int

    @property
    def passed(self) -> bool:
        """Whether the curve is inside the band at every level."""
        return self.p_value > 1 - self.confidence

    def __str__(self) -> str:
        return (
            f"{headline('random points (TARP)', self)}\ncoverage less level above one half {self.excess:+.3f} +- "
            f"{self.excess_error:.3f}: {self.verdict} ({self.num_references} references an experiment)"
        )


def tarp(
    simulated: SimulatedPosteriors, *, num_references: int = 10, confidence: float = 0.95, seed: int | None = None
) -> TARPResult:
    """Test whether balls around random references hold the truth as often as they say.

    Args:
        simulated: Experiments with posterior draws, at least 20; `simulate_posteriors` makes them.
        num_references: References of each experiment.
        confidence: Probability with which a right posterior passes, in (0, 1).
        seed: Seed of references and of the null.

    Example:
        >>> truths = torch.randn(200, 1)
        >>> y = truths + torch.randn(200, 1)
        >>> draws = 0.5 * y.unsqueeze(1) + 0.5**0.5 * torch.randn(200, 50, 1)  # the posterior: N(y / 2, 1 / 2)
        >>> tarp(SimulatedPosteriors(truths, draws, ("theta",)), seed=0).passed
        True
    """
    check_simulated(simulated, confidence)
    check_count(num_references, "num_references")
    levels = torch.tensor(LEVELS, dtype=torch.float64, device=simulated.draws.device)
    with isolated(seed), torch.no_grad():
        points = _standardised(torch.cat([simulated.truths.unsqueeze(1), simulated.draws], 1))
        held = torch.zeros(*points.shape[:2], len(LEVELS), dtype=torch.float64, device=points.device)
        for _ in range(num_references):
            held += _held(_distance_ranks(points, _references(points)), levels) / num_references
        # The standard deviation of the coverage where each point is as likely to be the truth.
        spread = held.var(1, correction=0).sum(0).sqrt() / len(held)
        null = ((_relabelled(held) - levels) / spread).abs().amax(1)
    terms = held[:, 0]
    coverage, standard_error = mean_and_standard_error(terms)
    statistic = ((coverage - levels) / spread).abs().max()
    p_value = rank_p_value(statistic, null)
    reach = spread * null.sort(descending=True).values[max(0, int((1 - confidence) * (1 + len(null)) + 1e-9) - 1)]
    surplus = (terms - levels)[:, levels > 0.5].mean(1)
    excess, excess_error, verdict = width_verdict(surplus, failed=p_value <= 1 - confidence)
    return TARPResult(
        levels=levels.cpu(),
        coverage=coverage.cpu(),
        standard_error=standard_error.cpu(),
        lower=(levels - reach).cpu(),
        upper=(levels + reach).cpu(),
        p_value=p_value,
        excess=excess,
        excess_error=excess_error,
        confidence=confidence,
        verdict=verdict,
        num_simulations=simulated.num_simulations,
        num_draws=simulated.num_draws,
        num_references=num_references,
    )


def _standardised(points: Tensor) -> Points:
    wide = points.double()
    spread = wide.flatten(0, 1).std(0)
    if constant := (spread == 0).nonzero().flatten().tolist():
        raise ValueError(f"simulated: expected columns with spread, got columns {constant} constant. Leave them out.")
    return (wide - wide.flatten(0, 1).mean(0)) / spread


def _references(points: Points) -> References:
    """Return for each experiment a point of another."""
    num, num_points, _ = points.shape
    others = (torch.arange(num) + torch.randint(1, num, (num,))) % num
    return points[others.to(points.device), torch.randint(num_points, (num,)).to(points.device)]


def _distance_ranks(points: Points, references: References) -> Ranks:
    """Return the rank of each point of an experiment by distance from its reference; equal ones in random order."""
    distances = (points - references.unsqueeze(1)).square().sum(-1)
    shuffled = torch.rand(distances.shape).to(distances.device).argsort(1)
    order = shuffled.gather(1, distances.gather(1, shuffled).argsort(dim=1, stable=True))
    places = torch.arange(points.shape[1], device=points.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _held(ranks: Ranks, levels: Float[Tensor, " num_levels"]) -> Held:
    """Return the chance that `(rank + v) / num_points`, with `v` uniform, is below each level: the level on average."""
    num_points = ranks.shape[1]
    table = (levels * num_points - torch.arange(num_points, device=ranks.device).unsqueeze(1)).clamp(0, 1)
    return table[ranks]


def _relabelled(held: Held) -> Float[Tensor, "num_null num_levels"]:
    """Return the coverage with truths chosen anew among the points of each experiment."""
    num, num_points, _ = held.shape
    rows = torch.arange(num) * num_points + torch.randint(num_points, (NUM_RELABELLINGS, num))
    # The mean of chosen rows, without a copy of them.
    return embedding_bag(rows.to(held.device), held.flatten(0, 1), mode="mean")

r"""Simulation-based calibration: where do the truths rank among their posterior draws?

In a simulated experiment with truth :math:`\theta^\star`, outcome :math:`y` and posterior draws
:math:`\theta_1, \dots, \theta_L \sim q(\theta \mid y)`, the rank

.. math:: r = \#\{l : \theta_l < \theta^\star\} \in \{0, \dots, L\}

is uniform where :math:`q` is the posterior, for every column and any function of the targets. Over :math:`N`
experiments the share of ranks below :math:`k`, the ECDF at :math:`z_k = k / (L + 1)`, is compared with :math:`z_k` in a
band that holds at all :math:`k` together (`uniformity`). What went wrong, in which direction, is read from the normal
scores of the ranks, :math:`s = \Phi^{-1}((r + 1/2) / (L + 1))`, which for a normal posterior are the truths in units of
the posterior: minus their mean is the posterior's bias in its own standard deviations, and their standard deviation,
over that of uniform ranks, is the factor by which the posterior would have to be widened. Truths at the ends of their
draws (U-shaped ranks, of variance above 1/12) mean a posterior "too narrow", truths in the middle one "too wide".

Uniform ranks are necessary, not sufficient: the prior in place of the posterior passes as well. Its
contraction (`recovery`) shows that it has learned nothing. Nor do ranks of single columns see how columns depend on
each other: give functions of the targets as quantities, or see `tarp`.

References:
    S. Talts, M. Betancourt, D. Simpson, A. Vehtari and A. Gelman (2018), Validating Bayesian inference algorithms with
    simulation-based calibration, theorem 1.
    T. Säilynoja, P.-C. Bürkner and A. Vehtari (2022), Graphical test for discrete uniformity.
    S. R. Cook, A. Gelman and D. B. Rubin (2006), Validation of software for Bayesian models using posterior quantiles
    (normal scores).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_voed.checks import check_share
from pyro_voed.diagnostics.simulated import SimulatedPosteriors
from pyro_voed.diagnostics.uniformity import random_ranks, uniformity_band, uniformity_p_values
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.monte_carlo import mean_and_standard_error

MOST_POINTS = 100
"""Points at which the ECDF is compared; with more draws an even selection of them."""

FEWEST_SIMULATIONS = 20
"""Fewer experiments fill no band: at the ends every share from 0 up would be inside."""

PASSED = "indistinguishable from calibrated"


@dataclass(frozen=True)
class SBCResult:
    """Ranks of the truths among their draws, and whether they are uniform; `dim` quantities, named by `columns`.

    Attributes:
        ranks: Of each truth among the draws of its experiment, 0 to `num_draws`.
        num_draws: Posterior draws of each experiment.
        points: Normalised ranks at which the ECDF is compared, in (0, 1).
        ecdf: Share of ranks below each point.
        lower: Lower end of the band, at each point; all columns and points are inside together with probability
            `confidence` where the posterior is right.
        upper: Upper end.
        p_values: Of uniform ranks, for each column alone.
        p_value: For all columns together: the least of them times their number, at most 1 (Bonferroni).
        confidence: Probability with which a right posterior passes.
        bias: Posterior less truth in standard deviations of the posterior (of its normal scores), each column;
            attenuated where it is beyond the reach of `num_draws` ranks.
        needed_scale: Factor by which the posterior would have to be widened: above 1 it is too narrow.
        verdicts: In words, for each column: the largest departure of a column that leaves the band.
    """

    columns: tuple[str, ...]
    ranks: Int[Tensor, "num_simulations dim"]
    num_draws: int
    points: Float[Tensor, " num_points"]
    ecdf: Float[Tensor, "num_points dim"]
    lower: Float[Tensor, " num_points"]
    upper: Float[Tensor, " num_points"]
    p_values: Float[Tensor, " dim"]
    p_value: float
    confidence: float
    bias: Float[Tensor, " dim"]
    bias_error: Float[Tensor, " dim"]
    needed_scale: Float[Tensor, " dim"]
    needed_scale_error: Float[Tensor, " dim"]
    verdicts: tuple[str, ...]

    @property
    def num_simulations(self) -> int:
        """Simulated experiments."""
        return self.ranks.shape[0]

    @property
    def passed(self) -> bool:
        """Whether every column is inside the band at every point."""
        return self.p_value > 1 - self.confidence

    def __str__(self) -> str:
        lines = [headline("simulation-based calibration", self, f" over {len(self.columns)} columns")]
        width = max(len(name) for name in self.columns)
        for index, name in enumerate(self.columns):
            lines.append(
                f"{name:<{width}s}  p = {self.p_values[index]:.2g}, bias {self.bias[index]:+.3f} +- "
                f"{self.bias_error[index]:.3f} posterior sd, needs {self.needed_scale[index]:.3f} +- "
                f"{self.needed_scale_error[index]:.3f} times its width: {self.verdicts[index]}"
            )
        return "\n".join(lines)


def sbc(simulated: SimulatedPosteriors, *, confidence: float = 0.95, seed: int | None = None) -> SBCResult:
    """Test whether truths rank uniformly among their posterior draws, in every column.

    Args:
        simulated: Experiments with posterior draws, at least 20; `simulate_posteriors` makes them.
        confidence: Probability with which a right posterior passes, all columns together, in (0, 1).
        seed: Seed of the places among equal values, which discrete quantities have.

    Example:
        >>> truths = torch.randn(200, 1)
        >>> y = truths + torch.randn(200, 1)
        >>> draws = 0.5 * y.unsqueeze(1) + 0.5**0.5 * torch.randn(200, 50, 1)  # the posterior: N(y / 2, 1 / 2)
        >>> sbc(SimulatedPosteriors(truths, draws, ("theta",)), seed=0).passed
        True
    """
    check_simulated(simulated, confidence)
    num_draws, dim = simulated.num_draws, len(simulated.columns)
    with isolated(seed), torch.no_grad():
        ranks = random_ranks(simulated.truths, simulated.draws)
    places = _points(num_draws)
    probabilities = tuple(place / (num_draws + 1) for place in places.tolist())
    counts = (ranks.cpu() < places.view(-1, 1, 1)).sum(1)
    p_values = uniformity_p_values(counts, simulated.num_simulations, probabilities)
    level = (1 - confidence) / dim
    lower, upper = uniformity_band(simulated.num_simulations, probabilities, level)
    bias, bias_error, scale, scale_error = _direction(ranks.cpu(), num_draws)
    verdicts = [_verdict(*pair, simulated.num_simulations, num_draws) for pair in zip(bias, scale, strict=True)]
    return SBCResult(
        columns=simulated.columns,
        ranks=ranks,
        num_draws=num_draws,
        points=torch.tensor(probabilities, dtype=torch.float64),
        ecdf=counts.double() / simulated.num_simulations,
        lower=lower,
        upper=upper,
        p_values=p_values,
        p_value=min(1.0, dim * float(p_values.min())),
        confidence=confidence,
        bias=bias,
        bias_error=bias_error,
        needed_scale=scale,
        needed_scale_error=scale_error,
        verdicts=tuple(verdict if p <= level else PASSED for verdict, p in zip(verdicts, p_values, strict=True)),
    )


def check_simulated(simulated: SimulatedPosteriors, confidence: float) -> None:
    """Raise where a test of uniformity cannot be made."""
    if simulated.num_simulations < FEWEST_SIMULATIONS:
        raise ValueError(
            f"simulated: expected at least {FEWEST_SIMULATIONS} experiments, got {simulated.num_simulations}. Simulate "
            "some hundreds."
        )
    check_share(confidence, "confidence")


def headline(check: str, result: Any, over: str = "") -> str:
    """Return how a check went, in one line."""
    return (
        f"{check} {'passed' if result.passed else 'FAILED'}: p = {result.p_value:.2g}{over} "
        f"({result.num_simulations:,} experiments, {result.num_draws:,} draws each)"
    )


def _points(num_draws: int) -> Int[Tensor, " num_points"]:
    """Return the ranks below which ranks are counted, 1 to `num_draws`, thinned evenly where they are many."""
    return torch.linspace(1, num_draws, min(num_draws, MOST_POINTS), dtype=torch.float64).round().long()


def _normal_scores(num_draws: int) -> Float[Tensor, " num_ranks"]:
    """Return the normal score of every rank."""
    return torch.special.ndtri((torch.arange(num_draws + 1, dtype=torch.float64) + 0.5) / (num_draws + 1))


def _direction(ranks: Int[Tensor, "num_simulations dim"], num_draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bias and needed scale by the normal scores, each with its standard error, `(dim,)`."""
    scores = _normal_scores(num_draws)
    taken = scores[ranks]
    mean, mean_error = mean_and_standard_error(taken)
    # The variance about the mean, not about 0: a bias must not look like a lack of width.
    squares = (taken - mean).square() * len(taken) / (len(taken) - 1)
    variance, variance_error = mean_and_standard_error(squares)
    ratio = (variance / scores.square().mean()).sqrt()
    # By the delta method; where all ranks are equal the ratio is 0 and has no first-order error to state.
    ratio_error = torch.where(ratio > 0, 0.5 * ratio * variance_error / variance, 0.0)
    return -mean, mean_error, ratio, ratio_error


def _verdict(bias: Tensor, needed_scale: Tensor, num_simulations: int, num_draws: int) -> str:
    """Name the departure that is largest beside what uniform ranks would show by chance."""
    scores = _normal_scores(num_draws)
    second, fourth = scores.square().mean().item(), scores.pow(4).mean().item()
    # Of uniform ranks the errors are known exactly, and are not 0 where every truth has the same rank.
    bias_in_errors = bias * math.sqrt(num_simulations / second)
    scale_in_errors = (needed_scale**2 - 1) / math.sqrt(max(fourth - second**2, 1e-12) / num_simulations) * second
    if max(abs(bias_in_errors), abs(scale_in_errors)) < 2:
        return "another shape"
    if abs(bias_in_errors) > abs(scale_in_errors):
        return "biased up" if bias > 0 else "biased down"
    return "too narrow" if needed_scale > 1 else "too wide"

r"""Do two sets of draws come from one distribution?

The classifier two-sample test (C2ST) trains a classifier to tell the two sets apart and reports its accuracy on draws
it was not trained on. With equal chances of either set, no classifier exceeds the Bayes accuracy

.. math::
    a^\star = \tfrac12 + \tfrac14 \int |p(x) - q(x)| \, dx ,

so 0.5 means indistinguishable and 1 disjoint; for unit normals :math:`d` apart, :math:`a^\star = \Phi(d / 2)`. The
classifier (`classifiers`) is cross-validated over folds and over seeds of its initial weights and folds. What it learns
falls short of :math:`a^\star`, so the test may miss a difference and does not invent one; `agreement` therefore reports
it beside two controls. Two numbers are compared only at an equal number of draws: the classifier learns more from more.

References:
    D. Lopez-Paz and M. Oquab (2017), Revisiting classifier two-sample tests. ICLR, section 3.
    J.-M. Lueckmann et al. (2021), Benchmarking simulation-based inference. AISTATS, section 2.3 (z-scoring, width of
    ten units a dimension, five folds).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_voed.checks import check_count, check_positive
from pyro_voed.diagnostics.classifiers import train_classifiers
from pyro_voed.diagnostics.draws import MIN_DRAWS, Draws, matched_draws
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.posterior_sample import PosteriorSample

UNITS_PER_DIM, MIN_WIDTH = 10, 20

NUM_EPOCHS = 30
"""Measured with 1,000 draws a side: half as many lose 0.01 where a shape is slightly bent, twice as many gain as much
and take twice the time; shifts, correlations and two modes are seen equally well with 15 to 60."""


@dataclass(frozen=True)
class C2STResult:
    """How well a classifier tells two sets of draws apart.

    Attributes:
        accuracy: Share of held-out draws put in the right set, each set counting half; 0.5 where they are
            indistinguishable. Never clamped: chance can put it below 0.5.
        standard_error: Of `accuracy` over fresh draws: binomial, one answer a draw, and `seed_spread`, in quadrature.
            Measured over 80 to 200 repeats, it is 1.0 to 1.2 times the true one where the sets are equal in
            distribution and 0.95 to 1.05 times where they are not.
        seed_spread: Standard deviation of the accuracy over seeds, at the same draws; 0 where there is one seed.
        num_draws: Draws in the first and in the second set.
    """

    accuracy: float
    standard_error: float
    seed_spread: float
    num_draws: tuple[int, int]
    num_folds: int
    num_seeds: int
    seconds: float

    def __str__(self) -> str:
        first, second = self.num_draws
        return f"C2ST {self.accuracy:.3f} +- {self.standard_error:.3f} ({first:,} draws against {second:,})"


@dataclass(frozen=True)
class AgreementResult:
    """How a posterior sample compares with a trusted one; moments are `(dim,)`, in the order of `columns`.

    Attributes:
        c2st: The sample against the reference.
        control: One half of the reference against the other: what perfect agreement looks like.
        power: One half of the reference, shifted by `shift`, against the other: what a small error looks like.
        shift: Shift of the first column in the power check, in standard deviations of the reference.
        mean_difference: Mean of the sample less that of the reference, in standard deviations of the reference.
        scale_ratio: Standard deviation of the sample over that of the reference.
    """

    c2st: C2STResult
    control: C2STResult
    power: C2STResult
    shift: float
    columns: tuple[str, ...]
    mean_difference: Float[Tensor, " dim"]
    mean_difference_error: Float[Tensor, " dim"]
    scale_ratio: Float[Tensor, " dim"]
    scale_ratio_error: Float[Tensor, " dim"]

    def __str__(self) -> str:
        rows = [
            ("sample against reference", self.c2st),
            ("reference against itself (control)", self.control),
            (f"reference shifted by {self.shift:g} sd (power)", self.power),
        ]
        lines = [f"{name:<36s} {result}" for name, result in rows]
        width = max(len(name) for name in self.columns)
        for index, name in enumerate(self.columns):
            lines.append(
                f"{name:<{width}s}  mean {self.mean_difference[index]:+.3f} +- {self.mean_difference_error[index]:.3f} "
                f"reference sd, sd ratio {self.scale_ratio[index]:.3f} +- {self.scale_ratio_error[index]:.3f}"
            )
        return "\n".join(lines)


def c2st(
    first: Tensor, second: Tensor, *, num_folds: int = 5, num_seeds: int = 5, seed: int | None = None
) -> C2STResult:
    """Train classifiers to tell two sets of independent draws apart, and return their held-out accuracy.

    All `num_folds * num_seeds` networks are trained at once: 1,000 two-dimensional draws a side take under a second
    on one core, and ten-dimensional ones four. Sets of unequal size are weighted to equal chances, in training and in
    the accuracy.

    Args:
        first: Draws of one distribution, `(num_first, dim)`, at least 100, finite and with spread.
        second: Draws of the other, in the same form. Where one is a reference, it goes here: inputs are standardised by
            the means and standard deviations of `second`.
        num_folds: Folds of the cross-validation, at least 2; each draw is held out once a seed.
        num_seeds: Repetitions with other folds and initial weights.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> result = c2st(torch.randn(200, 2) + 2.0, torch.randn(200, 2), num_seeds=2, seed=0)
        >>> bool(result.accuracy > 0.8)
        True
    """
    started = time.perf_counter()
    x, y = (draws.matrix for draws in matched_draws(first, second))
    check_count(num_folds, "num_folds", minimum=2)
    check_count(num_seeds, "num_seeds")
    sizes = (len(x), len(y))
    # float64 until the means are gone: a posterior far from 0 beside its width would lose its shape in float32.
    wide = y.double()
    inputs = torch.cat([(part.double() - wide.mean(0)) / wide.std(0) for part in (x, y)]).float()
    is_second = torch.arange(sum(sizes), device=inputs.device) >= sizes[0]
    balance = torch.where(is_second, 0.5 * sum(sizes) / sizes[1], 0.5 * sum(sizes) / sizes[0])
    with isolated(seed), torch.enable_grad():
        held_out = _folds(sizes, num_folds, num_seeds).to(inputs.device)
        logits = train_classifiers(
            inputs,
            is_second.float().expand(held_out.shape),
            balance * ~held_out,
            width=max(UNITS_PER_DIM * inputs.shape[1], MIN_WIDTH),
            num_epochs=NUM_EPOCHS,
        )(inputs)
    right = ((logits > 0) == is_second) & held_out
    # Within a seed each draw is held out once, so the sum over folds is its one answer.
    right = right.double().unflatten(0, (num_seeds, num_folds)).sum(1)
    by_seed = torch.stack([answers.mean(1) for answers in right.split(sizes, dim=1)])  # (2, num_seeds)
    by_set = by_seed.mean(1).tolist()
    binomial = [accuracy * (1 - accuracy) / size for accuracy, size in zip(by_set, sizes, strict=True)]
    seed_spread = by_seed.mean(0).std().item() if num_seeds > 1 else 0.0
    return C2STResult(
        accuracy=0.5 * sum(by_set),
        standard_error=math.sqrt(0.25 * sum(binomial) + seed_spread**2),
        seed_spread=seed_spread,
        num_draws=sizes,
        num_folds=num_folds,
        num_seeds=num_seeds,
        seconds=time.perf_counter() - started,
    )


def agreement(
    sample: PosteriorSample | Tensor,
    reference: PosteriorSample | Tensor,
    *,
    num_draws: int = 1_000,
    shift: float = 0.3,
    num_folds: int = 5,
    num_seeds: int = 5,
    seed: int | None = None,
) -> AgreementResult:
    """Compare a posterior sample with a trusted one, beside what equality and a known small error look like.

    A Markov chain's draws are thinned evenly to as many as the least effective sample size over its columns; of a
    plain matrix `(num_draws, dim)` every row counts as an independent draw. `c2st` then runs three times:

    * `num_draws` of the sample against as many of the reference;
    * the control, the first half of the reference against the second, in the order of the chains, so that chains
      that disagree show; each side has `num_draws` draws, or half of what the reference has where that is fewer;
    * the power check, the control again with the first column of one side shifted by `shift` standard deviations.
      One column is the least error of its kind: the same shift of every column would be easier to see.

    The sample agrees as far as this can tell where its accuracy is within two standard errors or so of the control's
    and the power check's is clearly above. Moments use all draws, with the effective sample sizes in their errors.

    Args:
        sample: Draws to be judged.
        reference: Trusted draws, of the same columns.
        num_draws: Draws a side; both must have so many effective ones (else ValueError).
        shift: Shift of the power check, in standard deviations of the reference.
        num_folds: As in `c2st`.
        num_seeds: As in `c2st`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> result = agreement(torch.randn(400, 1), torch.randn(800, 1), num_draws=200, num_seeds=2, seed=0)
        >>> result.control.num_draws
        (200, 200)
    """
    check_count(num_draws, "num_draws", minimum=MIN_DRAWS)
    check_positive(shift, "shift")
    trusted, judged = matched_draws(reference, sample, ("reference", "sample"))
    for argument, draws in (("sample", judged), ("reference", trusted)):
        fewest, where = draws.effective.min(0)
        if fewest < num_draws:
            raise ValueError(
                f"{argument}: expected at least {num_draws} effective draws, got {int(fewest)} in column "
                f"{draws.columns[int(where)]!r}. Draw more, or pass a smaller num_draws."
            )
    thinned, thinned_reference = judged.thinned(), trusted.thinned()
    half = len(thinned_reference) // 2
    num_control = min(num_draws, half)
    if num_control < MIN_DRAWS:
        raise ValueError(
            f"reference: expected at least {2 * MIN_DRAWS} effective draws, for two halves to compare, got "
            f"{len(thinned_reference)}."
        )
    offset = torch.zeros_like(thinned_reference[0])
    offset[0] = shift * trusted.matrix[:, 0].std()
    with isolated(seed):
        left = _choose(thinned_reference[:half], num_control)
        right = _choose(thinned_reference[half:], num_control)
        pairs = [
            (_choose(thinned, num_draws), _choose(thinned_reference, num_draws)),
            (left, right),
            (left + offset, right),
        ]
        main, control, power = (c2st(*pair, num_folds=num_folds, num_seeds=num_seeds) for pair in pairs)
    return AgreementResult(main, control, power, shift, trusted.columns, *_moments(judged, trusted))


def _folds(sizes: tuple[int, int], num_folds: int, num_seeds: int) -> Bool[Tensor, "num_networks num_draws"]:
    """Return which draws each network leaves out: every draw once a seed, each set spread evenly over folds."""
    folds = [torch.cat([torch.randperm(size) % num_folds for size in sizes]) for _ in range(num_seeds)]
    held_out = torch.stack(folds).unsqueeze(1) == torch.arange(num_folds).unsqueeze(-1)
    return held_out.flatten(0, 1)


def _choose(draws: Float[Tensor, "num_draws dim"], num_chosen: int) -> Float[Tensor, "num_chosen dim"]:
    return draws[torch.randperm(len(draws))[:num_chosen].to(draws.device)]


def _moments(judged: Draws, trusted: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the difference of means in reference standard deviations and the ratio of the latter, with errors."""
    (mean, scale, own_variance), (trusted_mean, unit, unit_variance) = map(_mean_and_scale, (judged, trusted))
    difference, ratio = (mean - trusted_mean) / unit, scale / unit
    # The unit is estimated too, which matters where the means are far apart.
    difference_variance = ratio**2 / judged.effective + 1 / trusted.effective + difference**2 * unit_variance
    return difference, difference_variance.sqrt(), ratio, ratio * (own_variance + unit_variance).sqrt()


def _mean_and_scale(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Return means, standard deviations, and the variance of the latter's logarithm (delta method)."""
    wide = draws.matrix.double()
    mean, scale = wide.mean(0), wide.std(0)
    kurtosis = ((wide - mean) / scale).pow(4).mean(0)
    return mean, scale, (kurtosis - 1) / 4 / draws.effective

r"""Do two sets of draws come from one distribution?

The classifier two-sample test (C2ST) trains a classifier to tell the two sets apart and reports its accuracy on draws
it was not trained on. With equal chances of either set, no classifier exceeds the Bayes accuracy

.. math::
    a^\star = \tfrac12 + \tfrac14 \int |p(x) - q(x)| \, dx ,

so an accuracy of 0.5 says "not told apart" and 1 says "disjoint"; for unit normals :math:`d` apart,
:math:`a^\star = \Phi(d / 2)`. The classifier has two hidden layers of ReLUs and is cross-validated over folds and over
seeds of its initial weights and folds. What is learnt falls short of :math:`a^\star`, so the test may miss a difference
and does not invent one. `agreement` therefore reports it between two controls: the reference against itself, which is
what perfect agreement looks like, and the reference against itself shifted, which is what a known small error looks
like.

Two numbers are compared only at an equal number of draws: the classifier learns more from more draws.

References:
    D. Lopez-Paz and M. Oquab (2017), Revisiting classifier two-sample tests. ICLR, section 3.
    J.-M. Lueckmann et al. (2021), Benchmarking simulation-based inference. AISTATS, section 2.3 (z-scoring, width of
    ten units a dimension, five folds).
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_voed.checks import check_count, check_positive
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.results import PosteriorSample

MIN_DRAWS = 100
"""Fewest draws a side: below, one standard error of the accuracy is 0.035 and little could be told."""

UNITS_PER_DIM, MIN_WIDTH = 10, 20

# Measured with 1,000 draws a side on a shift, a scale, a correlation, two modes and a bent shape in one to ten
# dimensions: 20 epochs stop short of the bent shape (accuracy 0.59 where 40 reach 0.62), 100 gain at most 0.015
# anywhere for 2.5 times the time. The decay costs nothing in two dimensions and gains 0.01 for a small shift in ten.
NUM_EPOCHS = 40
BATCH_SIZE = 256
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1.0


@dataclass(frozen=True)
class C2STResult:
    """How well a classifier tells two sets of draws apart.

    Attributes:
        accuracy: Share of held-out draws put in the right set, each set counting half; 0.5 where they are not told
            apart. Never clamped: chance can put it below 0.5.
        standard_error: Of `accuracy` over fresh draws: binomial, one answer a draw, and `seed_spread`, in quadrature.
            Measured over 80 to 200 repeats, it is 1.0 to 1.2 times the true one where the sets are equal in
            distribution and 0.95 to 1.05 times where they are not.
        seed_spread: Standard deviation of the accuracy over seeds, at the same draws; 0 where there is one seed.
        num_draws: Draws in the first and in the second set.
        num_folds: Folds of the cross-validation.
        num_seeds: Repetitions with other folds and initial weights.
        seconds: Wall time.
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
    """How a posterior sample compares with a trusted one.

    Attributes:
        c2st: The sample against the reference.
        control: One half of the reference against the other: what perfect agreement looks like.
        power: One half of the reference, shifted by `shift`, against the other: what a small error looks like.
        shift: Shift of the first column in the power check, in standard deviations of the reference.
        columns: Names of the columns.
        mean_difference: Mean of the sample less that of the reference, in standard deviations of the reference,
            `(dim,)`.
        mean_difference_error: Its standard error.
        scale_ratio: Standard deviation of the sample over that of the reference, `(dim,)`.
        scale_ratio_error: Its standard error.
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
        moments = zip(
            self.columns,
            self.mean_difference.tolist(),
            self.mean_difference_error.tolist(),
            self.scale_ratio.tolist(),
            self.scale_ratio_error.tolist(),
            strict=True,
        )
        for name, mean, mean_error, ratio, ratio_error in moments:
            lines.append(
                f"{name:<{width}s}  mean {mean:+.3f} +- {mean_error:.3f} reference sd, "
                f"sd ratio {ratio:.3f} +- {ratio_error:.3f}"
            )
        return "\n".join(lines)


def c2st(
    first: Tensor,
    second: Tensor,
    *,
    num_folds: int = 5,
    num_seeds: int = 5,
    seed: int | None = None,
) -> C2STResult:
    """Train classifiers to tell two sets of independent draws apart, and return their held-out accuracy.

    All `num_folds * num_seeds` networks are trained at once: 1,000 two-dimensional draws a side take under a second
    on one core, and ten-dimensional ones four. Sets of unequal size are weighted to equal chances, in training and in
    the accuracy.

    Args:
        first: Draws of one distribution, `(num_first, dim)`, at least 100.
        second: Draws of the other, `(num_second, dim)`, at least 100. Where one is a reference, it goes here: inputs
            are standardised by the means and standard deviations of `second`.
        num_folds: Folds of the cross-validation, at least 2; each draw is held out once a seed.
        num_seeds: Repetitions with other folds and initial weights.
        seed: Seed of folds and weights; None draws one from torch's global generator.

    Returns:
        The accuracy with its standard error.

    Raises:
        ValueError: If a set is no matrix, has fewer than 100 draws, non-finite ones or a constant column, or if the
            dimensions differ.

    References:
        D. Lopez-Paz and M. Oquab (2017), section 3; J.-M. Lueckmann et al. (2021), section 2.3.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> result = c2st(torch.randn(200, 2) + 2.0, torch.randn(200, 2), num_seeds=2, seed=0)
        >>> bool(result.accuracy > 0.8)
        True
    """
    started = time.perf_counter()
    _check_draws(first, "first")
    _check_draws(second, "second")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"second: expected draws of dimension {first.shape[1]}, as in first, got dimension {second.shape[1]}."
        )
    check_count(num_folds, "num_folds", minimum=2)
    check_count(num_seeds, "num_seeds")
    second = second.detach().to(first.device)
    inputs = torch.cat([_standardise(first.detach(), second), _standardise(second, second)])
    sizes = (len(first), len(second))
    with isolated(seed), torch.enable_grad():
        held_out = _folds(sizes, num_folds, num_seeds).to(inputs.device)
        is_second = torch.arange(sum(sizes), device=inputs.device) >= sizes[0]
        logits = _train(inputs, is_second, held_out)
    with torch.no_grad():
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
    plain matrix every row counts as an independent draw. `c2st` then runs three times:

    * `num_draws` of the sample against as many of the reference;
    * the control, the first half of the reference against the second, in the order of the chains, so that chains
      that disagree show; each side has `num_draws` draws, or half of what the reference has where that is fewer;
    * the power check, the control again with the first column of one side shifted by `shift` standard deviations.
      One column is the least error of its kind: the same shift of every column would be easier to see.

    The sample agrees as far as this can tell where its accuracy is within two standard errors or so of the control's
    and the power check's is clearly above. Moments use all draws, with the effective sample sizes in their errors.

    Args:
        sample: Draws to be judged; a plain matrix is `(num_draws, dim)`.
        reference: Trusted draws, of the same columns; a plain matrix is `(num_draws, dim)`.
        num_draws: Draws a side; both must have so many effective ones.
        shift: Shift of the power check, in standard deviations of the reference.
        num_folds: As in `c2st`.
        num_seeds: As in `c2st`.
        seed: Seed of the choice of draws, the folds and the weights; None draws one from torch's global generator.

    Returns:
        The three accuracies and the agreement of means and standard deviations.

    Raises:
        ValueError: If either has fewer than `num_draws` effective draws, if columns differ, or if draws are not
            finite or constant in a column.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> result = agreement(torch.randn(400, 1), torch.randn(800, 1), num_draws=200, num_seeds=2, seed=0)
        >>> result.control.num_draws
        (200, 200)
    """
    check_count(num_draws, "num_draws", minimum=MIN_DRAWS)
    check_positive(shift, "shift")
    draws, effective, columns = _columns(sample, "sample")
    trusted, trusted_effective, trusted_columns = _columns(reference, "reference")
    named = isinstance(sample, PosteriorSample) and isinstance(reference, PosteriorSample)
    order = _column_order(columns, trusted_columns, named)
    draws, effective = draws[:, order], effective[order]
    for argument, available in (("sample", effective), ("reference", trusted_effective)):
        if available.min() < num_draws:
            raise ValueError(
                f"{argument}: expected at least {num_draws} effective draws, got {int(available.min())} in column "
                f"{trusted_columns[int(available.argmin())]!r}. Draw more, or pass a smaller num_draws."
            )
    thinned, thinned_reference = _thin(draws, effective), _thin(trusted, trusted_effective)
    half = len(thinned_reference) // 2
    num_control = min(num_draws, half)
    if num_control < MIN_DRAWS:
        raise ValueError(
            f"reference: expected at least {2 * MIN_DRAWS} effective draws, for two halves to compare, got "
            f"{len(thinned_reference)}."
        )
    offset = torch.zeros_like(trusted[0])
    offset[0] = shift * trusted[:, 0].std()
    with isolated(seed):
        left = _choose(thinned_reference[:half], num_control)
        right = _choose(thinned_reference[half:], num_control)
        pairs = [
            (_choose(thinned, num_draws), _choose(thinned_reference, num_draws)),
            (left, right),
            (left + offset, right),
        ]
        main, control, power = (c2st(*pair, num_folds=num_folds, num_seeds=num_seeds) for pair in pairs)
    mean_difference, mean_error, ratio, ratio_error = _moments(draws, effective, trusted, trusted_effective)
    return AgreementResult(
        c2st=main,
        control=control,
        power=power,
        shift=shift,
        columns=trusted_columns,
        mean_difference=mean_difference,
        mean_difference_error=mean_error,
        scale_ratio=ratio,
        scale_ratio_error=ratio_error,
    )


def _check_draws(draws: Tensor, argument: str) -> None:
    if draws.ndim != 2 or draws.shape[1] == 0:
        raise ValueError(f"{argument}: expected a matrix (num_draws, dim) of draws, got shape {tuple(draws.shape)}.")
    if len(draws) < MIN_DRAWS:
        raise ValueError(f"{argument}: expected at least {MIN_DRAWS} draws, got {len(draws)}.")
    bad = int((~torch.isfinite(draws)).any(1).sum())
    if bad:
        raise ValueError(f"{argument}: {bad} of {len(draws)} draws are not finite. None is left out: find out why.")
    constant = (draws == draws[:1]).all(0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"{argument}: expected draws with spread, got columns {constant} constant. Leave them out.")


def _standardise(draws: Tensor, reference: Tensor) -> Tensor:
    # float64 until the means are gone: a posterior far from 0 beside its width would lose its shape in float32.
    wide = reference.double()
    return ((draws.double() - wide.mean(0)) / wide.std(0)).float()


def _folds(sizes: tuple[int, int], num_folds: int, num_seeds: int) -> Bool[Tensor, "num_networks num_draws"]:
    """Return which draws each network leaves out: every draw once a seed, each set spread evenly over folds."""
    folds = [torch.cat([torch.randperm(size) % num_folds for size in sizes]) for _ in range(num_seeds)]
    held_out = torch.stack(folds).unsqueeze(1) == torch.arange(num_folds).unsqueeze(-1)
    return held_out.flatten(0, 1)


def _train(
    inputs: Float[Tensor, "num_draws dim"],
    is_second: Bool[Tensor, " num_draws"],
    held_out: Bool[Tensor, "num_networks num_draws"],
) -> Float[Tensor, "num_networks num_draws"]:
    """Train one network for each row of `held_out` on the other draws, and return all logits."""
    num_draws, dim = inputs.shape
    width = max(UNITS_PER_DIM * dim, MIN_WIDTH)
    parameters = _initial_parameters(len(held_out), (dim, width, width, 1), inputs.device)
    answers = is_second.float()
    share = answers.mean()
    balance = 0.5 * torch.where(is_second, 1 / share, 1 / (1 - share))
    # All networks share each minibatch and give their held-out draws no weight: a fifth of the work is wasted, which
    # costs less than gathering another minibatch for each network would.
    weights = balance * ~held_out
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for epoch in range(NUM_EPOCHS):
        optimiser.param_groups[0]["lr"] = 0.5 * LEARNING_RATE * (1 + math.cos(math.pi * epoch / NUM_EPOCHS))
        for batch in torch.randperm(num_draws).to(inputs.device).split(BATCH_SIZE):
            loss = binary_cross_entropy_with_logits(
                _logits(parameters, inputs[batch]),
                answers[batch].expand(len(held_out), -1),
                weight=weights[:, batch],
                reduction="sum",
            )
            optimiser.zero_grad()
            (loss / len(batch)).backward()
            optimiser.step()
    with torch.no_grad():
        return _logits(parameters, inputs)


def _initial_parameters(num_networks: int, widths: tuple[int, ...], device: torch.device) -> list[Tensor]:
    parameters = []
    for fan_in, fan_out in itertools.pairwise(widths):
        uniform = torch.rand(num_networks, fan_in, fan_out, dtype=torch.float32).to(device)
        parameters += [(2 * uniform - 1) / math.sqrt(fan_in), uniform.new_zeros(num_networks, 1, fan_out)]
    return [parameter.requires_grad_() for parameter in parameters]


def _logits(
    parameters: list[Tensor], inputs: Float[Tensor, "num_draws dim"]
) -> Float[Tensor, "num_networks num_draws"]:
    first_weight, first_bias, second_weight, second_bias, last_weight, last_bias = parameters
    hidden = torch.relu(inputs @ first_weight + first_bias)  # (num_networks, num_draws, width)
    hidden = torch.relu(torch.baddbmm(second_bias, hidden, second_weight))
    return torch.baddbmm(last_bias, hidden, last_weight).squeeze(-1)


def _columns(
    sample: PosteriorSample | Tensor, argument: str
) -> tuple[Float[Tensor, "num_draws dim"], Float[Tensor, " dim"], tuple[str, ...]]:
    """Return draws as a matrix, the effective number in each column, and the columns' names."""
    if isinstance(sample, PosteriorSample):
        draws, names = sample.matrix().detach(), tuple(sample.columns)
        effective = torch.cat([sample.effective_sample_size[name].flatten() for name in sample.values])
        # Antithetic chains are worth more draws than they have; there are no more rows to take, though.
        effective = effective.to(draws).clamp(max=len(draws))
    else:
        draws = sample.detach()
        names = tuple(f"column {index}" for index in range(draws.shape[-1]))
        effective = draws.new_full((draws.shape[-1],), len(draws))
    _check_draws(draws, argument)
    return draws, effective, names


def _column_order(columns: tuple[str, ...], wanted: tuple[str, ...], named: bool) -> list[int]:
    """Return where each wanted column is: by name where both sides have names, else by position."""
    if len(columns) != len(wanted) or (named and set(columns) != set(wanted)):
        raise ValueError(f"sample: expected the columns {list(wanted)} of the reference, got {list(columns)}.")
    return [columns.index(name) for name in wanted] if named else list(range(len(wanted)))


def _thin(draws: Float[Tensor, "num_draws dim"], effective: Float[Tensor, " dim"]) -> Float[Tensor, "num_kept dim"]:
    num_kept = int(effective.min())
    return draws[torch.arange(num_kept, device=draws.device) * len(draws) // num_kept]


def _choose(draws: Float[Tensor, "num_draws dim"], num_chosen: int) -> Float[Tensor, "num_chosen dim"]:
    return draws[torch.randperm(len(draws))[:num_chosen].to(draws.device)]


def _moments(
    draws: Tensor, effective: Tensor, trusted: Tensor, trusted_effective: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the difference of means in reference standard deviations and the ratio of the latter, with errors."""
    mean, scale, log_scale_variance = _mean_and_scale(draws)
    trusted_mean, trusted_scale, trusted_log_scale_variance = _mean_and_scale(trusted)
    difference, ratio = (mean - trusted_mean) / trusted_scale, scale / trusted_scale
    trusted_error = trusted_log_scale_variance / trusted_effective
    # The unit is estimated too, which matters where the means are far apart.
    difference_variance = ratio**2 / effective + 1 / trusted_effective + difference**2 * trusted_error
    ratio_variance = ratio**2 * (log_scale_variance / effective + trusted_error)
    return difference, difference_variance.sqrt(), ratio, ratio_variance.sqrt()


def _mean_and_scale(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return means, standard deviations, and the variance of the latter's logarithm for one draw (delta method)."""
    wide = draws.double()
    mean, scale = wide.mean(0), wide.std(0)
    kurtosis = ((wide - mean) / scale).pow(4).mean(0)
    return mean, scale, (kurtosis - 1) / 4

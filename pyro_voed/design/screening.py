"""Which of several starts to climb from: all take their first steps side by side, and the highest goes on.

A start decides in which optimum a search ends, and designs settle long before the density has learned them. So the
first steps are taken from many starts, on small batches, stacked; what each has reached is then measured on equal
random numbers, and one goes on with its density. What is reached is the larger of two lower bounds: that of the
density, which is still loose, and prior contrastive estimation where the model states what it needs, which saturates at
the logarithm of its contrasts but owes nothing to training. A start from which no gradient leads anywhere is passed
over on the way. Some starts go through exchanges of their entries first (`swaps`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.design.climb import Climb, Climber
from pyro_voed.design.starts import elsewhere, perturbed
from pyro_voed.design.swaps import can_swap, swapped
from pyro_voed.estimators.nested import checked_sizes, nested_estimate
from pyro_voed.experiment import needs
from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.experiment.pairs import PAIR_MEMORY
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.training.settings import Fresh

NUM_STARTS = 8
NEAR = (0, 2)
"""Which of the starts beyond the stored one are drawn near it."""
NUM_SWAPPED = 3
MOST_STEPS = 300
ROWS = 64
"""Experiments a step for each start: stacked, eight of them cost less than twice a step of one start."""

CONTRASTS = 2_000
NUISANCES = 100
CHECKS = 1_000
"""Draws by which the end of a search is compared with its start."""


def candidates(sites: Sequence[DesignSite]) -> list[dict[str, Tensor]]:
    """Draw all starts but the stored one, some of them near it and most of them anywhere."""
    return [(perturbed if number in NEAR else elsewhere)(sites) for number in range(NUM_STARTS - 1)]


def screened(climber: Climber, starts: Sequence[Mapping[str, Tensor]]) -> tuple[Climb, Float[Tensor, " num_starts"]]:
    """Return the way of the best start, climbed to its end, and what each start had reached when it was chosen."""
    training, experiment = climber.fit.training, climber.fit.experiment
    assert isinstance(training, Fresh)  # a search takes no other
    if can_swap(experiment):
        begun = [starts[0], *starts[1 - NUM_SWAPPED :]]
        ends = [swapped(experiment, start, climber.projection, climber.cost) for start in begun]
        starts = [*starts[:-NUM_SWAPPED], *ends]
    steps = MOST_STEPS if training.max_steps is None else max(1, min(MOST_STEPS, training.max_steps // 8))
    few = replace(training, num_steps=steps, batch_size=min(ROWS, climber.fit.batch_size))
    first = replace(climber, fit=replace(climber.fit, training=few))
    climbs = first.climb(starts, cools=False)
    reached = _reached(climber, climbs)
    best = climbs[int(reached.argmax())]
    if best.history.stop_reason == "interrupted":
        return best, reached
    (rest,) = climber.climb([best.designs], density=best.density)
    return _joined(best, rest), reached


def _reached(climber: Climber, climbs: Sequence[Climb]) -> Float[Tensor, " num_starts"]:
    """Return what the end of each climb is worth, as far as a lower bound shows its information."""
    learned = torch.stack([climber.reached(climb, CONTRASTS) for climb in climbs])
    terms = _contrastive(climber, [climb.designs for climb in climbs], CONTRASTS)
    if terms is None:
        return learned
    worth = [climber.worth(climb.designs, own.mean()) for climb, own in zip(climbs, terms, strict=True)]
    return torch.maximum(learned, torch.stack(worth))


def _contrastive(
    climber: Climber, designs: Sequence[Mapping[str, Tensor]], num_samples: int
) -> Float[Tensor, "num_designs num_samples"] | None:
    """Return terms of a bound that asks for no training, at some designs and on the same random numbers.

    They are None where the model does not state what they need, and for discrete sites: control variates of these go
    far astray where rare values were not drawn.
    """
    experiment, seed = climber.fit.experiment, int(torch.randint(2**31 - 1, ()).item())
    inner = checked_sizes(num_samples, None, NUISANCES, PAIR_MEMORY)
    found = []
    if any(site.is_discrete for site in (*experiment.targets, *experiment.observations)):
        return None
    try:
        needs.likelihood(experiment, "screening")
        needs.inner_draws(experiment, "screening")
        for own in designs:
            with common_stream(seed), torch.no_grad():
                terms = nested_estimate(experiment, own, num_samples, inner, upper=False, estimator="screening")
                found.append(terms.values)
    except (NotImplementedError, ArithmeticError):
        return None
    return torch.stack(found)


def not_below(climber: Climber, start: Mapping[str, Tensor], climb: Climb) -> Climb:
    """Return the climb, or a stay at the start where that is worth more by the bound that asks for no training.

    Both have equal random numbers. The climb is taken at its word where that bound is missing, too expensive as every
    experiment runs by itself, or too loose, since nuisance sites are averaged over by few draws.
    """
    experiment = climber.fit.experiment
    comparable = experiment.runs_together and not experiment.nuisance
    projection = climber.projection
    start = dict(start) if projection is None else {**start, **projection(start)}
    terms = _contrastive(climber, [start, climb.designs], CHECKS) if comparable else None
    if terms is None:
        return climb
    loss, noise = mean_and_standard_error(climber.worth(start, terms[0]) - climber.worth(climb.designs, terms[1]))
    if loss <= 2.0 * noise:
        return climb
    warn(
        "optimise_design: the climb ended at a design that tells less than the one it started from, which is returned. "
        "Take more steps, or a smaller design_learning_rate."
    )
    density, history = climber.stay(start)
    return replace(climb, designs=start, density=density, history=climb.history if history is None else history)


def _joined(first: Climb, then: Climb) -> Climb:
    """Return one climb of two that follow each other."""
    before, after = first.history, then.history
    history = replace(
        after,
        bound=torch.cat([before.bound, after.bound]),
        learning_rate=torch.cat([before.learning_rate, after.learning_rate]),
        seconds=before.seconds + after.seconds,
    )
    # The second begins where the first ends.
    path = {name: torch.cat([first.path[name], values[1:]]) for name, values in then.path.items()}
    steps = torch.cat([first.path_steps, then.path_steps[1:] + before.num_steps])
    return replace(then, history=history, path=path, path_steps=steps)

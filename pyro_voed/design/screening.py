"""Which of several starts to climb from: all take their first steps side by side, and the highest goes on.

A start decides in which optimum a search ends, and designs settle long before the density has learned them. So the
first steps are taken from many starts, on small batches, stacked; what each has reached is then measured on equal
random numbers, and one goes on with its density. What is reached is the larger of two lower bounds: that of the
density, which is still loose, and prior contrastive estimation where the model states what it needs, which saturates at
the logarithm of its contrasts but owes nothing to training. A start from which no gradient leads anywhere is passed
over on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.design.climb import Climb, Climber
from pyro_voed.design.starts import elsewhere, perturbed
from pyro_voed.estimators.pce import eig_pce
from pyro_voed.experiment import needs
from pyro_voed.experiment.sites import DesignSite
from pyro_voed.training.settings import Fresh

NUM_STARTS = 8
MOST_STEPS = 300
ROWS = 64
"""Experiments a step for each start: stacked, eight of them cost less than twice a step of one start."""

CONTRASTS = 2_000


def candidates(sites: Sequence[DesignSite]) -> list[dict[str, Tensor]]:
    """Draw all starts but the stored one, half of them near it and half of them anywhere."""
    return [(elsewhere if number % 2 else perturbed)(sites) for number in range(NUM_STARTS - 1)]


def screened(climber: Climber, starts: Sequence[Mapping[str, Tensor]]) -> tuple[Climb, Float[Tensor, " num_starts"]]:
    """Return the way of the best start, climbed to its end, and what each start had reached when it was chosen."""
    training = climber.fit.training
    assert isinstance(training, Fresh)  # a search takes no other
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
    """Return the information at the end of each climb, as far as a lower bound shows it."""
    learned = torch.stack([climber.evaluate(climb.designs, climb.density, CONTRASTS).terms.mean(0) for climb in climbs])
    experiment = climber.fit.experiment
    try:
        needs.likelihood(experiment, "screening")
        designs = {name: torch.stack([climb.designs[name] for climb in climbs]) for name in climbs[0].designs}
        contrastive = eig_pce(experiment, designs=designs, num_outer_samples=CONTRASTS).eig
    except (NotImplementedError, ArithmeticError):
        return learned
    return torch.maximum(learned, contrastive)


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

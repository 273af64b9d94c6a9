"""Many densities trained at once: one for each candidate design, or one for each learning rate.

The weights are stacked, so that members cost little more than one (`StackedDensity`), and no member's training touches
another's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.densities import StackedDensity, StandardisedDensity
from pyro_voed.estimators.building import build_posterior
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample, combine


@dataclass(frozen=True)
class Ensemble:
    """How joint samples meet the members of a stacked density.

    `batch` is the design batch whose members have densities of their own; `()` where one density takes the design as
    context, or there is one design.
    """

    num_rates: int
    batch: torch.Size

    @property
    def num_members(self) -> int:
        """Densities in all."""
        return self.num_rates * self.batch.numel()

    def build(self, given: Any, pilot: JointSample, experiment: Experiment, summary: Summary) -> StackedDensity:
        """Return the stacked density to train, each member's scales taken from its own part of the pilot."""
        if isinstance(given, StackedDensity):
            if given.num_members != self.batch.numel():
                raise ValueError(
                    f"density: expected an ensemble of {self.batch.numel()} members, one for each design, got "
                    f"{given.num_members}. It was trained for another design batch."
                )
            own = [given.member(index) for index in range(given.num_members)]
        elif not self.batch:
            own = [build_posterior(given, pilot, experiment, summary)]
        else:
            parts = [at_member(pilot, index, self.batch) for index in range(self.batch.numel())]
            own = [build_posterior(given, part, experiment, summary) for part in parts]
        return StackedDensity(own * self.num_rates)

    def log_q(
        self, sample: JointSample, density: StackedDensity
    ) -> Float[Tensor, "num_samples num_rates *design_batch"]:
        """Return log-densities of the sample's targets under every member that is of their design."""
        log_q = density.log_prob(*self.of_members(sample))
        if self.batch:
            return log_q.reshape(sample.num_samples, self.num_rates, *self.batch)
        return log_q.reshape(*sample.theta.shape[:-1], self.num_rates).movedim(-1, 1)

    def of_members(self, sample: JointSample) -> tuple[Tensor, Tensor]:
        """Return targets and contexts `(rows, members, dim)`, each member's own."""
        if self.batch:
            alone = replace(sample, designs=None)
            theta, context = (v.reshape(v.shape[0], -1, v.shape[-1]) for v in (alone.theta, alone.context()))
        else:
            theta, context = (v.reshape(-1, 1, v.shape[-1]) for v in (sample.theta, sample.context()))
        return self._to_members(theta), self._to_members(context)

    def _to_members(self, values: Float[Tensor, "rows designs dim"]) -> Float[Tensor, "rows members dim"]:
        return values.unsqueeze(1).expand(-1, self.num_rates, -1, -1).flatten(1, 2)

    def terms(
        self, sample: JointSample, density: StackedDensity
    ) -> Float[Tensor, "num_samples num_rates *design_batch"]:
        """Return Barber-Agakov terms of every member."""
        assert sample.log_prior is not None  # checked at the door
        return self.log_q(sample, density) - sample.log_prior.unsqueeze(1)

    def single(self, sample: JointSample, density: StackedDensity) -> Float[Tensor, "num_samples *design_batch"]:
        """Return Barber-Agakov terms where there is one rate."""
        return self.terms(sample, density).squeeze(1)

    def best(
        self, density: StackedDensity, scores: Float[Tensor, "num_rates *design_batch"]
    ) -> tuple[StackedDensity | StandardisedDensity, Tensor]:
        """Return what won on validation scores, and the number of the rate that won (at each design)."""
        if not self.batch:
            winner = scores.reshape(self.num_rates, -1).mean(-1).argmax()
            return density.member(int(winner)), winner
        winners = scores.reshape(self.num_rates, -1).argmax(0)
        count = self.batch.numel()
        chosen = [int(rate) * count + index for index, rate in enumerate(winners.tolist())]
        return density.select(chosen), winners.reshape(self.batch)


def at_member(sample: JointSample, index: int, batch: torch.Size) -> JointSample:
    """Return the simulations at one member of a design batch."""
    return combine([sample], lambda rows: rows[0].flatten(1, len(batch))[:, index], None)

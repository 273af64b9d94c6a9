r"""Both sides where the model has nuisance sites :math:`\eta`: three averages, each from the side that errs outwards.

.. math::
    \mathrm{EIG} = \mathbb{E}\big[\log p(y, \theta) - \log p(\theta) - \log p(y)\big].

With q a posterior of the targets and r a density of the nuisance sites given targets and outcome, averages of the
weights

.. math::
    \frac{p(\theta, \eta, y)}{r(\eta \mid \theta, y)}, \quad \eta \sim r(\cdot \mid \theta, y), \qquad
    \frac{p(\theta, \eta, y)}{q(\theta \mid y)\, r(\eta \mid \theta, y)}, \quad
    (\theta, \eta) \sim q(\theta \mid y)\, r(\eta \mid \theta, y),

estimate :math:`p(y, \theta)` and :math:`p(y)`. The logarithm of an average errs downwards; with the draw that made the
outcome counted it errs upwards (Foster et al. 2020, theorem 1). So the upper side counts it in the first and leaves it
out of the second, the lower side the reverse; :math:`p(\theta)` is stated, or an average likewise (`experiment.held`).
Both proposals are mixed with the prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_voed.bounds.barber_agakov import ba_terms
from pyro_voed.certificates.consistency import share_terms
from pyro_voed.certificates.levels import INNER_COST, Levels
from pyro_voed.experiment.designs import pack_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.held import averaged_log_prior
from pyro_voed.experiment.packing import JointSample, pack_outcomes, pack_run, put_targets
from pyro_voed.experiment.pairs import PAIR_MEMORY
from pyro_voed.experiment.programs import ProgramRun, run_rows
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.experiment.scoring import outcome_log_likelihood
from pyro_voed.experiment.weighting import DEFENSIVE_SHARE, design_context
from pyro_voed.experiment.whole import Whole, with_nuisance
from pyro_voed.monte_carlo import log_mean_exp

MOST_TOGETHER = 500
"""Outer draws that share the nuisance draws behind p(theta): no more than the first level has at least."""


class Scores(NamedTuple):
    """Log densities of a run's targets, nuisance sites and outcomes, nats, in packed coordinates."""

    targets: Tensor
    nuisance: Tensor
    likelihood: Tensor

    @property
    def joint(self) -> Tensor:
        """Of all together."""
        return self.targets + self.nuisance + self.likelihood


@dataclass(frozen=True)
class NuisanceLevels(Levels):
    """Both levels at one design of a model with nuisance sites."""

    nuisance: Any = field(kw_only=True)

    inner_cost: ClassVar[float] = 2.0 * INNER_COST

    @cached_property
    def whole(self) -> Whole:
        """All latents as targets."""
        return with_nuisance(self.experiment)

    def latents(self) -> Experiment:
        """Return the experiment whose stated prior is checked."""
        return self.whole.experiment

    def terms(self, num_outer: int, num_inner: int) -> tuple[Tensor, ...]:
        """Return lower, upper and Barber-Agakov terms, and the shares of weights, at the same outer draws."""
        rows = PAIR_MEMORY // (8 * max(1, self.experiment.bytes_per_row) * num_inner)
        rows = max(2, min(rows, MOST_TOGETHER))
        # Chunks of about one size: a small one left over would have few nuisance draws to share.
        chunks = torch.arange(num_outer).tensor_split(math.ceil(num_outer / rows))
        parts = [self._chunk(len(chunk), num_inner) for chunk in chunks]
        found = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
        bad = sum(int((~torch.isfinite(column)).sum()) for column in found)
        if bad:
            raise ArithmeticError(
                f"a certificate with nuisance sites: {bad} of {len(found) * num_outer} terms are not finite. Train for "
                "longer."
            )
        return found

    def _chunk(self, num: int, num_inner: int) -> tuple[Tensor, ...]:
        experiment, designs = self.experiment, self.designs
        run = run_rows(experiment.program, num, experiment.shapes, designs=designs)
        sample = pack_run(self.whole.experiment, run, torch.Size([num]), likelihood=False)
        own = self._scores(run)
        above, below = own.targets, own.targets
        if experiment.averages_prior:
            log_det = pack_run(experiment, run, torch.Size([num]), likelihood=False).log_det
            above = averaged_log_prior(experiment, run, designs) + log_det
            below = averaged_log_prior(experiment, run, designs, below=True) + log_det
        given_own, given = self._given_targets(sample, own, num_inner)
        all_own, every = self._of_outcome(sample, own, num_inner)
        with_own = lambda first, inner: log_mean_exp(torch.cat([first.unsqueeze(-1), inner], -1))  # noqa: E731
        lower = log_mean_exp(given) - with_own(all_own, every) - above
        upper = with_own(given_own, given) - log_mean_exp(every) - below
        theta = sample.theta[:, self.whole.targets]
        log_q = self.density.log_prob(theta, design_context(experiment, designs, self.density, sample.y))
        return lower, upper, ba_terms(log_q, above), share_terms(all_own, every)

    def _given_targets(self, sample: JointSample, own: Scores, num_inner: int) -> tuple[Tensor, Tensor]:
        """Return log weights of the own nuisance draw and of proposed ones, for p(y, theta)."""
        num, whole = sample.num_samples, self.whole
        theta = sample.theta[:, whole.targets]
        context = self._context(sample.y, theta)
        eta = self.nuisance.condition(context).sample((num_inner,)).transpose(0, 1)
        from_prior = torch.rand(num, num_inner, device=eta.device) < DEFENSIVE_SHARE
        count = int(from_prior.sum())
        if count:
            rows = from_prior.nonzero()[:, 0]
            held = {name: sample.values[name][rows] for name in self.experiment.target_labels}
            drawn = run_rows(
                self.experiment.program, count, self.experiment.shapes, designs=self.designs, row_values=held
            )
            again = pack_run(whole.experiment, drawn, torch.Size([count]), likelihood=False).theta[:, whole.nuisance]
            eta = eta.masked_scatter(from_prior.unsqueeze(-1), again)
        scores = self._at(theta.repeat_interleave(num_inner, 0), eta.flatten(0, 1), sample)
        log_r = self.nuisance.log_prob(eta.flatten(0, 1), context.repeat_interleave(num_inner, 0))
        inner = scores.joint - _mixed(log_r, scores.nuisance)
        own_log_r = self.nuisance.log_prob(sample.theta[:, whole.nuisance], context)
        return own.joint - _mixed(own_log_r, own.nuisance), inner.reshape(num, num_inner)

    def _of_outcome(self, sample: JointSample, own: Scores, num_inner: int) -> tuple[Tensor, Tensor]:
        """Return log weights of the own latents and of proposed ones, for p(y)."""
        num, whole = sample.num_samples, self.whole
        context = design_context(self.experiment, self.designs, self.density, sample.y)
        y, repeated = (rows.repeat_interleave(num_inner, 0) for rows in (sample.y, context))
        theta = self.density.condition(repeated).sample()
        eta = self.nuisance.condition(self._context(y, theta)).sample()
        from_prior = torch.rand(num * num_inner, device=eta.device) < DEFENSIVE_SHARE
        count = int(from_prior.sum())
        if count:
            drawn = sample_joint(whole.experiment, count, self.designs).theta
            theta = theta.masked_scatter(from_prior.unsqueeze(-1), drawn[:, whole.targets])
            eta = eta.masked_scatter(from_prior.unsqueeze(-1), drawn[:, whole.nuisance])
        scores = self._at(theta, eta, sample)
        log_q = self.density.log_prob(theta, repeated) + self.nuisance.log_prob(eta, self._context(y, theta))
        inner = scores.joint - _mixed(log_q, scores.targets + scores.nuisance)
        own_theta, own_eta = sample.theta[:, whole.targets], sample.theta[:, whole.nuisance]
        own_log_q = self.density.log_prob(own_theta, context)
        own_log_q = own_log_q + self.nuisance.log_prob(own_eta, self._context(sample.y, own_theta))
        return own.joint - _mixed(own_log_q, own.targets + own.nuisance), inner.reshape(num, num_inner)

    def _context(self, y: Tensor, theta: Tensor) -> Tensor:
        parts = [y, theta]
        if self.nuisance.context_dim > y.shape[-1] + theta.shape[-1]:
            parts.insert(1, pack_designs(self.experiment, self.designs).expand(*y.shape[:-1], -1))
        return torch.cat(parts, -1)

    def _at(self, theta: Tensor, eta: Tensor, sample: JointSample) -> Scores:
        """Score latents put in, the same number for each outcome of the sample."""
        latents = theta.new_zeros(len(theta), theta.shape[-1] + eta.shape[-1])
        latents[:, self.whole.targets], latents[:, self.whole.nuisance] = theta, eta
        times = len(theta) // sample.num_samples
        outcomes = {
            name: sample.values[name].repeat_interleave(times, 0) for name in self.experiment.observation_labels
        }
        return self._scores(put_targets(self.whole.experiment, latents, self.designs, outcomes))

    def _scores(self, run: ProgramRun) -> Scores:
        targets: list[Tensor] = []
        nuisance: list[Tensor] = []
        for site in self.whole.experiment.targets:
            log_prob = run.log_prob(site.name)
            if site.transform is not None:
                log_prob = log_prob + run.unconstrained(site.name)[1]
            (targets if site.name in self.experiment.target_labels else nuisance).append(log_prob)
        likelihood = outcome_log_likelihood(run, self.experiment) + pack_outcomes(self.experiment, run)[1]
        return Scores(torch.stack(targets).sum(0), torch.stack(nuisance).sum(0), likelihood)


def _mixed(log_q: Tensor, log_prior: Tensor) -> Tensor:
    return torch.logaddexp(log_q + math.log1p(-DEFENSIVE_SHARE), log_prior + math.log(DEFENSIVE_SHARE))

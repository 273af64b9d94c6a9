r"""Proposals given an outcome: what importance sampling of an outcome's density draws from.

Any density :math:`q(\theta \mid y)` of the targets gives both sides of the expected information gain (`importance`);
the nearer to the posterior, the fewer draws. Besides a flow that an earlier estimate has trained it can be a Pyro
guide, as it stands or as `eig_ba` has fitted it, or *Laplace's Gaussian*, which needs no training: for each outcome

.. math::
    q(\theta \mid y) = N\big(\hat\theta(y), \Lambda(y)^{-1}\big), \qquad
    \hat\theta(y) = \arg\max_\theta \log p(\theta, y), \quad
    \Lambda(y) = -\nabla^2_\theta \log p(\theta, y) \big|_{\hat\theta(y)},

in packed unconstrained coordinates. `eig_laplace` takes that Gaussian for the posterior and is biased by what is wrong
with it; importance sampling corrects for it, so that only the number of inner draws is left in the bias.

The search for the mode starts from the best of a few prior draws, never from the draw that made the outcome: a proposal
that knows that draw would keep the upper side, whose inner draws are then still right given everything else, and lose
the lower one, which counts the draw as one among exchangeable ones.

References:
    Ryan (2003), as in `nmc` (importance sampling of the inner integral); Long et al. (2013), as in `laplace`; Beck,
    Dia, Espath, Long and Tempone (2018), "Fast Bayesian experimental design: Laplace-based importance sampling for the
    expected information gain", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_voed.bounds.laplace import LogDensity, curvature, newton_modes
from pyro_voed.checks import check_count
from pyro_voed.estimators.guide import GuideDensity
from pyro_voed.estimators.laplace import check_curvature, check_differentiable
from pyro_voed.experiment import needs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.needs import Need
from pyro_voed.experiment.packing import JointSample, pack_run, unpack_targets
from pyro_voed.experiment.pairs import log_likelihood_of_pairs
from pyro_voed.experiment.programs import run_rows
from pyro_voed.experiment.scoring import log_joint
from pyro_voed.experiment.weighting import Proposal

SMALLEST_CURVATURE = 1e-6
"""Least curvature that a Gaussian is given, as a share of its largest."""


def as_proposal(given: Any, experiment: Experiment, designs: Mapping[str, Tensor]) -> Any:
    """Return a proposal or conditional density from what a user may give for one."""
    if isinstance(given, GuideDensity):
        return GuideProposal(given)
    if isinstance(given, Proposal) or (hasattr(given, "condition") and hasattr(given, "context_dim")):
        return given
    if callable(given) and not isinstance(given, type):
        guide = GuideDensity(given, experiment, designs, of_targets=True, trained=False)
        return GuideProposal(guide.eval())
    raise TypeError(
        "proposal: expected laplace_proposal(), the density of an earlier result, or a Pyro guide that is called with "
        f"the outcome, got {given!r}."
    )


def laplace_proposal(num_newton_steps: int = 10, num_starts: int = 64) -> LaplaceProposal:
    """Return a proposal that is, for each outcome, the Gaussian at the posterior's mode.

    To be given to `eig_nmc` as `proposal=`, to `eig_vnmc` and `eig_ace` as `density=`; it is not trained.

    Args:
        num_newton_steps: Most Newton steps to the mode; each costs about two runs of the model and two derivatives.
        num_starts: Prior draws, shared by a batch of outcomes, of which the best starts the search for each.

    Example:
        >>> from pyro_voed.estimators import eig_nmc
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_nmc(linear_gaussian(), "y", proposal=laplace_proposal(), num_inner_samples=10, seed=0)
        >>> result.bound, bool(1.1 < result.eig < 1.3)  # exact: 1.199
        ('upper', True)
    """
    return LaplaceProposal(check_count(num_newton_steps, "num_newton_steps"), check_count(num_starts, "num_starts"))


@dataclass(frozen=True)
class LaplaceProposal:
    """The Gaussian at each posterior's mode; made by `laplace_proposal`."""

    num_newton_steps: int
    num_starts: int

    needs: ClassVar[tuple[Need, ...]] = (needs.laplace,)

    def at_outcomes(
        self, experiment: Experiment, designs: Mapping[str, Tensor], sample: JointSample
    ) -> MultivariateNormal:
        """Return the Gaussians at one design and the outcomes of a sample made there."""
        needs.laplace(experiment, "laplace_proposal")
        check_differentiable(experiment, sample[:2], designs, "laplace_proposal")

        def log_density(theta: Tensor) -> Tensor:
            log_prior, log_likelihood = log_joint(experiment, theta, sample.values, designs)
            return log_prior + log_likelihood

        start = _best_prior_draws(experiment, designs, sample.values, self.num_starts)
        return gaussian_at_mode(log_density, newton_modes(log_density, start, self.num_newton_steps))


def gaussian_at_mode(log_density: LogDensity, mode: Float[Tensor, "num_rows dim"]) -> MultivariateNormal:
    """Return for each row the Gaussian with the curvature of its log density.

    Curvatures that are negative (no mode was reached) count by their size, so that a Gaussian always exists.
    """
    value, gradient, precision = curvature(log_density, mode)
    check_curvature(value, gradient, precision, "laplace_proposal")
    curvatures, axes = torch.linalg.eigh(precision)
    sizes = curvatures.abs()
    sizes = torch.maximum(sizes, SMALLEST_CURVATURE * sizes.amax(-1, keepdim=True))
    sizes = sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    # A factor from the axes rather than an inverse: it exists however far apart the curvatures lie.
    _, upper = torch.linalg.qr(sizes.rsqrt().unsqueeze(-1) * axes.mT)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return MultivariateNormal(mode, scale_tril=(signs.unsqueeze(-1) * upper).mT, validate_args=False)


def _best_prior_draws(
    experiment: Experiment, designs: Mapping[str, Tensor], outcomes: Mapping[str, Tensor], num_starts: int
) -> Float[Tensor, "num_rows theta_dim"]:
    """Return for each outcome the prior draw with the largest joint density."""
    with torch.no_grad():
        run = run_rows(experiment.program, num_starts, experiment.shapes, designs=designs)
        drawn = pack_run(experiment, run, torch.Size([num_starts]), likelihood=False)
        own = {site.name: outcomes[site.name] for site in experiment.observations}
        pairs = log_likelihood_of_pairs(experiment, designs, own, run, num_starts)
    assert drawn.log_prior is not None  # checked at the door
    return drawn.theta[(pairs + drawn.log_prior).argmax(-1)]


@dataclass(frozen=True)
class GuideProposal:
    """A Pyro guide of the targets, called with outcomes, as a proposal."""

    guide: GuideDensity

    def at_outcomes(
        self, experiment: Experiment, designs: Mapping[str, Tensor], sample: JointSample
    ) -> GuideAtOutcomes:
        """Return the guide at one design and the outcomes of a sample made there."""
        if not self.guide.of_targets or {site.name for site in self.guide.scored} != set(experiment.target_labels):
            raise ValueError(
                f"proposal: expected a guide of the targets {list(experiment.target_labels)}, got one of "
                f"{[site.name for site in self.guide.scored]}."
            )
        dependent = [site.name for site in experiment.targets if site.dependent_support]
        if dependent:
            raise NotImplementedError(
                f"proposal: the support of the targets {dependent} depends on other sites, and a guide's draws cannot "
                "be weighed there. Use a flow, or laplace_proposal()."
            )
        outcomes = {site.name: sample.values[site.name] for site in experiment.observations}
        own = {name: designs[name] for name in self.guide.designs}
        return GuideAtOutcomes(self.guide, experiment, own, outcomes)


@dataclass(frozen=True)
class GuideAtOutcomes:
    """A guide at given outcomes, `(num_samples, *shape)` each: draws and log densities of packed targets."""

    guide: GuideDensity
    experiment: Experiment
    designs: Mapping[str, Tensor]
    outcomes: Mapping[str, Tensor]

    def sample(self, sample_shape: torch.Size | Sequence[int]) -> Float[Tensor, "*batch num_samples theta_dim"]:
        """Return packed targets."""
        count = torch.Size(sample_shape).numel()
        values = self.guide.draw(self._repeated(count), self.designs)
        packed = []
        for site in self.experiment.targets:
            value = values[site.name]
            coordinates = value if site.transform is None else site.transform.inv(value)
            packed.append(coordinates.reshape(len(value), -1).to(self.experiment.dtype))
        theta = torch.cat(packed, -1)
        outside = int((~torch.isfinite(theta).all(-1)).sum())
        if outside:
            raise ArithmeticError(
                f"proposal: {outside} of {len(theta)} draws of the guide lie outside the support of the model's prior. "
                "Change the guide's family to one on that support."
            )
        return theta.reshape(*sample_shape, -1, theta.shape[-1])

    def log_prob(self, value: Float[Tensor, "*batch num_samples theta_dim"]) -> Float[Tensor, "*batch num_samples"]:
        """Return log densities, nats, in packed coordinates."""
        theta = value.reshape(-1, value.shape[-1])
        targets = unpack_targets(self.experiment, theta)
        rows = {**self._repeated(value.shape[:-2].numel()), **targets}
        log_prob = self.guide.score(rows, self.designs)
        for site, piece in zip(
            self.experiment.targets, theta.split([site.packed_dim for site in self.experiment.targets], -1), strict=True
        ):
            if site.transform is not None:
                own = targets[site.name]
                coordinates = piece.reshape(-1, *site.transform.inverse_shape(site.shape))
                log_det = site.transform.log_abs_det_jacobian(coordinates, own)
                log_prob = log_prob + log_det.reshape(len(theta), -1).sum(-1)
        return log_prob.reshape(value.shape[:-1])

    def _repeated(self, count: int) -> dict[str, Tensor]:
        return {name: rows.repeat(count, *(1,) * (rows.dim() - 1)) for name, rows in self.outcomes.items()}

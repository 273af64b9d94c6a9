r"""The Laplace approximation: expected information gain from curvatures alone, nothing learnt, no inner draws.

The information is the entropy of the prior less the mean entropy of the posterior. The first is a plain Monte Carlo
mean, and only the second is approximated, by that of the Gaussian with the posterior's mode and curvature:

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}_{p(\theta, y \mid \xi)}\big[-\log p(\theta) - H[\theta \mid y]\big]
    \approx \frac1N \sum_i \Big[-\log p(\theta_i) - \tfrac{d}{2} \log (2 \pi e)
    + \tfrac12 \log\det \Lambda_i\Big],
    \qquad \Lambda_i = -\nabla^2_\theta \log p(\theta, y_i) \big|_{\hat\theta_i} .

All in the packed unconstrained coordinates of all targets together, which has two consequences: correlations between
sites count (a Hessian for each site apart would drop them), and no Gaussian reaches beyond a site's support.

*Error.* Exact where posteriors are Gaussian. With n independent repeats of a measurement the log posterior around its
mode, in units of its width, is :math:`-z^2/2 + c_3 z^3 + c_4 z^4`, with :math:`c_3 = O(n^{-1/2})` and
:math:`c_4 = O(1/n)`; to second order its entropy is the Gaussian's plus :math:`15 c_3^2 + 6 c_4`, so the error is
O(1/n), of either sign. As a check the log posterior is compared with its parabola at one draw from each Gaussian; modes
that lie apart are not seen.

Long et al. take the divergence KL(N(mode, inverse curvature) || prior) with the log prior expanded to second order
around the mode (their trace term): the same in expectation where prior and posteriors are Gaussian. Elsewhere both
errors are of the same order and neither is always the smaller. The form here expands no prior, and stays exact for
Gaussian posteriors when the mode is replaced by the generating draw.

*The point* :math:`\hat\theta_i` is the mode nearest to the generating draw, found by damped Newton steps; with no steps
it is the generating draw itself, for which the mode is replaced at small noise.

References:
    Long, Scavino, Tempone and Wang (2013), "Fast estimation of expected information gains for Bayesian experimental
    designs based on Laplace approximations".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_voed.bounds.laplace import LogDensity, ascent_direction, curvature, laplace_terms, newton_modes
from pyro_voed.checks import Labels, check_count, warn
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.experiment import needs
from pyro_voed.experiment.designs import at_each_design, design_batch_shape
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.experiment.scoring import log_joint
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.results import EIGResult

CHUNK = 8_192
NOT_AT_MODE_DECREMENT = 1e-2
DEVIATION_NATS, DEVIATION_SHARE = 1.0, 0.1


@needs.needing(needs.laplace)
def eig_laplace(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    num_newton_steps: int = 20,
    num_samples: int | None = None,
    seed: int | None = None,
) -> EIGResult:
    """Estimate the expected information gain by Gaussian approximations of the posteriors.

    Args:
        model: A Pyro program of one experiment, differentiable in its targets, whose outcome sites have densities;
            targets must be all its latents and continuous.
        num_newton_steps: Most Newton steps from the generating draw to the mode; 0 expands around the draw itself.
        num_samples: Experiments behind the number; default 5,000 at each design, 200 where experiments are run one by
            one.
        observation_labels, target_labels, designs, seed: As in `eig_flow`.

    Returns:
        An estimate in nats that may err to either side, with its Monte Carlo standard error, which knows nothing of
        the approximation. Warns where the approximation is doubtful: posteriors far from Gaussian, no mode reached,
        curvatures not positive definite (whose terms are left out, with their count).

    Raises:
        NotImplementedError: If the outcome has no density, there are nuisance sites, a target is discrete or has no
            stated density, or the outcome's density is not differentiable in the targets.
        ArithmeticError: If more than half of the curvatures are not positive definite, or one is not finite.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_laplace(linear_gaussian(), "y", "theta", num_samples=2_000, seed=0)
        >>> result.bound, bool(1.1 < result.eig < 1.3)  # exact: 1.199
        ('neither', True)
    """
    check_count(num_newton_steps, "num_newton_steps", 0)
    if num_samples is not None:
        check_count(num_samples, "num_samples", 4)

    def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        size = num_samples or (5_000 if experiment.runs_together else 200)
        # Terms without a Gaussian are left out, so designs may have different numbers of them.
        found = at_each_design(
            experiment,
            candidates,
            lambda own: mean_and_standard_error(_member_terms(experiment, own, size, num_newton_steps)),
        )
        batch = design_batch_shape(experiment, candidates)
        value, error = (torch.stack(part).reshape(batch) for part in zip(*found, strict=True))
        return Terms(value.unsqueeze(0), standard_error=error, num_samples=size)

    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_laplace", bound="neither", needs=[needs.laplace])


def _member_terms(experiment: Experiment, designs: Mapping[str, Tensor], num_samples: int, num_steps: int) -> Tensor:
    """Return the terms at one design, those without a Gaussian left out, after warning of what is doubtful."""
    terms, deviations, decrements = [], [], []
    for start in range(0, num_samples, CHUNK):
        with torch.no_grad():
            sample = sample_joint(experiment, min(CHUNK, num_samples - start), designs)
        check_differentiable(experiment, sample, designs, "eig_laplace")

        def log_density(theta: Tensor, sample: JointSample = sample) -> Tensor:
            log_prior, log_likelihood = log_joint(experiment, theta, sample.values, designs)
            return log_prior + log_likelihood

        theta = newton_modes(log_density, sample.theta, num_steps)
        value, gradient, precision = curvature(log_density, theta)
        check_curvature(value, gradient, precision, "eig_laplace")
        assert sample.log_prior is not None  # checked at the door
        terms.append(laplace_terms(sample.log_prior, precision))
        deviations.append(_deviation(log_density, theta, value, gradient, precision))
        decrements.append(0.5 * (gradient * ascent_direction(gradient, precision)).sum(-1))
    exists = ~torch.isnan(torch.cat(terms))
    _report(exists, torch.cat(deviations)[exists], torch.cat(decrements)[exists], num_steps)
    return torch.cat(terms)[exists]


def check_differentiable(
    experiment: Experiment, sample: JointSample, designs: Mapping[str, Tensor], estimator: str
) -> None:
    """Raise NotImplementedError where no gradient flows from the log joint density to the targets."""
    with torch.enable_grad():
        log_prior, log_likelihood = log_joint(
            experiment, sample.theta.detach().clone().requires_grad_(), sample.values, designs
        )
    if not log_likelihood.requires_grad:
        raise NotImplementedError(
            f"{estimator} needs an outcome density that is differentiable in the targets; this model cuts gradients "
            "off (detach, NumPy or an integer in between). Use eig_flow or eig_nmc."
        )
    assert sample.log_prior is not None  # checked at the door
    if not torch.allclose(log_prior.detach(), sample.log_prior, rtol=1e-2, atol=1e-2):
        raise NotImplementedError(
            f"{estimator} needs a prior whose sites state their densities; this one hands on draws made elsewhere "
            "(Delta sites, as automatic guides have). Use eig_flow, or a prior of plain sample sites."
        )


def check_curvature(value: Tensor, gradient: Tensor, precision: Tensor, estimator: str) -> None:
    """Raise ArithmeticError where a log joint density or its derivatives are not finite."""
    finite = torch.isfinite(torch.cat([value.unsqueeze(-1), gradient, precision.flatten(1)], -1)).all(-1)
    if not finite.all():
        raise ArithmeticError(
            f"{estimator}: {int((~finite).sum())} of {len(finite)} log joint densities, or their derivatives, are not "
            "finite. Look for square roots and logarithms at 0, and for outcomes on the edge of their support."
        )


def _deviation(
    log_density: LogDensity, theta: Tensor, value: Tensor, gradient: Tensor, precision: Tensor
) -> Float[Tensor, " num_rows"]:
    """Return log density less its parabola, nats, at one draw from each row's Gaussian."""
    factor, _ = torch.linalg.cholesky_ex(precision)
    z = torch.randn_like(theta)
    shift = torch.linalg.solve_triangular(factor.mT, z.unsqueeze(-1), upper=True).squeeze(-1)
    shift = torch.nan_to_num(shift, nan=0.0, posinf=0.0, neginf=0.0)
    with torch.no_grad():
        parabola = value + (gradient * shift).sum(-1) - 0.5 * z.square().sum(-1)
        return log_density(theta + shift) - parabola


def _report(exists: Tensor, deviations: Tensor, decrements: Tensor, num_steps: int) -> None:
    missing, total = int((~exists).sum()), len(exists)
    if 2 * missing > total:
        raise ArithmeticError(
            f"eig_laplace: {missing} of {total} curvatures are not positive definite, so most posteriors have no "
            "Gaussian approximation here. Use another estimator, or more num_newton_steps."
        )
    doubts = []
    if missing:
        doubts.append(
            f"{missing} of {total} curvatures are not positive definite; their terms are left out, which biases it"
        )
    far = int((decrements > NOT_AT_MODE_DECREMENT).sum())
    if num_steps and far > 0.01 * total:
        doubts.append(f"{far} of {total} searches did not reach a mode in {num_steps} Newton steps")
    share = (~(deviations.abs() <= DEVIATION_NATS)).double().mean().item()
    if share > DEVIATION_SHARE:
        doubts.append(
            f"{share:.0%} of posteriors differ from their Gaussian by more than {DEVIATION_NATS:g} nat at a draw from "
            "it (skewed, bounded or with several modes)"
        )
    if doubts:
        warn(f"the Laplace approximation is doubtful: {'; '.join(doubts)}.")

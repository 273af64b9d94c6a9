"""Score given values: log densities of targets and outcomes that were put in rather than drawn.

Nested estimators need p(y | theta) where theta and y come from different draws. Two ways: all pairs of outcomes and
inner draws, without running the model again (`pairwise_log_likelihood`, and for normal outcomes `normal_pairs`); or row
by row at packed targets from anywhere, such as a learned posterior (`log_joint`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.programs import ProgramRun, log_prob_on_support
from pyro_voed.experiment.simulate import pack_outcomes, put_targets
from pyro_voed.experiment.sites import Experiment, Site


def log_joint(
    experiment: Experiment,
    theta: Float[Tensor, "num_rows theta_dim"],
    outcomes: Mapping[str, Tensor],
    designs: Mapping[str, Tensor],
) -> tuple[Float[Tensor, " num_rows"], Float[Tensor, " num_rows"]]:
    """Return the log prior of packed targets and the log likelihood of outcomes, nats, in packed coordinates.

    The model is run once a row, with the targets put in; sites that are neither target nor outcome are drawn.

    Args:
        experiment: The explicit experiment.
        theta: Packed targets, one row each.
        outcomes: Outcome values, `(num_rows, *shape)` each.
        designs: The one design.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.experiment.resolve import resolve
        >>> from pyro_voed.experiment.simulate import sample_joint
        >>> experiment = resolve(linear_gaussian(), "y")
        >>> sample = sample_joint(experiment, 5, likelihood=True)
        >>> log_prior, log_likelihood = log_joint(experiment, sample.theta, sample.values, experiment.design_values)
        >>> bool(torch.allclose(log_likelihood, sample.log_likelihood))
        True
    """
    if experiment.has_auxiliary_density:
        raise NotImplementedError(
            "the replaced prior states its density by auxiliary sites, so it cannot score targets that it did not "
            "draw. Use a prior guide that samples the model's sites from their own distributions."
        )
    own = {site.name: outcomes[site.name] for site in experiment.observations}
    run = put_targets(experiment, theta, designs, own)
    log_prior = torch.zeros((), dtype=theta.dtype, device=theta.device)
    for site in experiment.targets:
        log_prior = log_prior + run.log_prob(site.name)
        if site.transform is not None:
            log_prior = log_prior + run.unconstrained(site.name)[1]
    return log_prior, outcome_log_likelihood(run, experiment) + pack_outcomes(experiment, run)[1]


def outcome_log_likelihood(run: ProgramRun, experiment: Experiment) -> Tensor:
    """Return the log density of the run's outcomes, nats, `(num_rows,)`, -inf where one lies outside its support."""
    return torch.stack([run.log_prob(site.name, on_support=True) for site in experiment.observations]).sum(0)


def pairwise_log_likelihood(
    experiment: Experiment, outcomes: Mapping[str, Tensor], inner: ProgramRun
) -> Float[Tensor, "num_outer num_inner"]:
    """Return log p(outcome i given the latents of run j), nats, for all pairs.

    The distributions that the inner run stands at are scored at every outcome, so the model is not run again. Only
    for models whose outcome sites do not depend on each other's values (`Experiment.linked_outcomes` is False).

    Args:
        experiment: The explicit experiment.
        outcomes: Outcome values, `(num_outer, *shape)` each.
        inner: The run whose latents are the inner draws.
    """
    scores = [
        torch.cat([_score_outcomes(trace, site, outcomes[site.name]) for trace in inner.traces], 1)
        for site in experiment.observations
    ]
    return scores[0] if len(scores) == 1 else torch.stack(scores).sum(0)


@dataclass(frozen=True)
class NormalPairs:
    r"""Log densities of all pairs of outcomes and inner draws, where outcomes are normal: one matrix product.

    With means m and scales s of inner draw j,

    .. math::
        \log p(y_i \mid j) = \sum_k \Big(-\frac{y_{ik}^2}{2 s_{jk}^2} + \frac{y_{ik} m_{jk}}{s_{jk}^2}
        - \frac{m_{jk}^2}{2 s_{jk}^2} - \log s_{jk}\Big) - \frac{d}{2} \log 2\pi

    is linear in :math:`(y, y^2)`. Expanding the square loses the digits by which m exceeds s, so outcomes and means are
    centred and everything is double: with 1e6 scales between two means, the result is still good to 1e-3.

    Attributes:
        centre: What is subtracted from outcomes.
        coefficients: Of the centred outcomes and, where scales differ between draws, of their squares below.
        offset: What does not depend on the outcome.
        half_precision: Half the inverse squared scales, where all draws share them, else None.
    """

    centre: Float[Tensor, " num_elements"]
    coefficients: Float[Tensor, "num_features num_inner"]
    offset: Float[Tensor, " num_inner"]
    half_precision: Float[Tensor, " num_elements"] | None

    def features(
        self, flat: Float[Tensor, "num_outer num_elements"]
    ) -> tuple[Float[Tensor, "num_outer num_features"], Float[Tensor, " num_outer"]]:
        """Return what multiplies the coefficients, and what is added to each outcome's row of pairs."""
        y = flat.double() - self.centre
        if self.half_precision is None:
            return torch.cat([y, y.square()], -1), y.new_zeros(y.shape[0])
        return y, -(y.square() * self.half_precision).sum(-1)


def normal_pairs(experiment: Experiment, inner: ProgramRun) -> NormalPairs | None:
    """Return the pairs of an inner run with all outcomes; None unless every outcome is plainly normal.

    Args:
        experiment: The explicit experiment.
        inner: The run whose latents are the inner draws.
    """
    if experiment.linked_outcomes or len(inner.traces) != 1:
        return None
    means, scales = [], []
    for site in experiment.observations:
        node = inner.traces[0].nodes[site.name]
        normal, shape = _as_normal(node["fn"]), node["value"].shape
        if normal is None or node["mask"] is not None or shape == site.shape:
            return None
        means.append(normal.loc.expand(shape).reshape(shape[0], -1).double())
        scales.append(normal.scale.expand(shape).reshape(shape[0], -1).double())
    mean, scale = torch.cat(means, -1), torch.cat(scales, -1)
    centre = mean.mean(0)
    mean = mean - centre
    precision = scale.square().reciprocal()
    offset = -(0.5 * mean.square() * precision + scale.log()).sum(-1) - 0.5 * mean.shape[-1] * math.log(2 * math.pi)
    linear = (mean * precision).mT.contiguous()
    if bool((scale == scale[0]).all()):
        return NormalPairs(centre, linear, offset, 0.5 * precision[0])
    return NormalPairs(centre, torch.cat([linear, -0.5 * precision.mT]), offset, None)


def _as_normal(fn: Any) -> torch.distributions.Normal | None:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    # Not isinstance: a subclass may have a density of its own.
    return fn if type(fn) in (torch.distributions.Normal, pyro.distributions.Normal) else None


def _score_outcomes(trace: Any, site: Site, outcomes: Tensor) -> Tensor:
    node = trace.nodes[site.name]
    # One run alone has no row dimension; the dimension put in front of its layout stands for it.
    own = node["value"].shape
    rows, layout = (1, own) if own == site.shape else (own[0], own[1:])
    log_prob = log_prob_on_support(node["fn"], outcomes.reshape(outcomes.shape[0], 1, *layout))
    if node["mask"] is not None:
        log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, torch.zeros_like(log_prob))
    return log_prob.reshape(outcomes.shape[0], rows, -1).sum(-1)

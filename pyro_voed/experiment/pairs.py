"""All pairs of outcomes and inner draws: log densities and their sums, without running the model again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import ProgramRun, log_prob_on_support, run_rows
from pyro_voed.experiment.scoring import outcome_log_likelihood
from pyro_voed.experiment.sites import Site

PAIR_MEMORY = 2**25
"""Bytes of one chunk of pairs. Temporaries of some megabytes stay in the allocator's reach; at ten times the size the
same pairs took four times as long."""

NORMAL_PAIRS = (128, 1_024)
"""Outcomes and inner draws in one block of normal pairs, 1 MB, which stays in the processor's cache."""


def log_sums(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor],
    inner: ProgramRun,
    max_bytes: int = PAIR_MEMORY,
    *,
    sites: Sequence[Site] | None = None,
    omit_own: bool = False,
) -> Tensor:
    """Return the log of the sum of p(y_i given the latents of inner run j) over j, nats, for each outcome i.

    Outcomes are `(num_outer, *shape)` each; with `omit_own` run i is left out for outcome i, which it made. Other
    `sites` that depend on what no other of them decides can stand for the outcomes.
    """
    num_inner = len(inner.traces) * inner.rows_per_trace
    linked = sites is None and experiment.linked_outcomes
    sites = experiment.observations if sites is None else sites
    normal = None if linked else normal_pairs(sites, inner)
    if normal is not None:
        values = [outcomes[site.name] for site in sites]
        flat = torch.cat([value.reshape(value.shape[0], -1) for value in values], -1)
        return _normal_log_sums(normal, flat, max_bytes, omitted=omit_own).to(experiment.dtype)
    elements = sum(site.shape.numel() for site in sites)
    # A log density makes about six temporaries of the size of its pairs.
    chunk = max(1, max_bytes // (6 * 8 * num_inner * elements))
    total = next(iter(outcomes.values())).shape[0]
    # Written into one tensor: small results kept between large temporaries would pin the heap and let it grow.
    sums = torch.empty(total, dtype=experiment.dtype, device=experiment.device)
    for start in range(0, total, chunk):
        rows = {name: value[start : start + chunk] for name, value in outcomes.items()}
        if linked:
            pairs = log_likelihood_of_pairs(experiment, designs, rows, inner, num_inner)
        else:
            pairs = pairwise_log_density(sites, rows, inner)
        if omit_own:
            index = torch.arange(pairs.shape[0], device=pairs.device)
            pairs[index, start + index] = -torch.inf
        sums[start : start + chunk] = pairs.logsumexp(-1)
    return sums


def _normal_log_sums(normal: NormalPairs, outcomes: Tensor, max_bytes: int, *, omitted: bool) -> Tensor:
    """Sum the densities of each outcome given every inner draw, in blocks; nats, `(num_outer,)`, double."""
    num_inner = normal.offset.shape[0]
    rows, columns = NORMAL_PAIRS
    if outcomes.is_cuda:
        # Few large blocks suit a GPU: a double, a single and the workings of both for each pair.
        rows, columns = max(1, max_bytes // (24 * num_inner)), num_inner
    # Written into one tensor, as in `log_sums`.
    sums = torch.empty(outcomes.shape[0], dtype=torch.double, device=outcomes.device)
    for start in range(0, outcomes.shape[0], rows):
        features, common = normal.features(outcomes[start : start + rows])
        total = torch.full_like(common, -torch.inf)
        for left in range(0, num_inner, columns):
            part = slice(left, left + columns)
            block = torch.addmm(normal.offset[part], features, normal.coefficients[:, part])
            if omitted:
                block.diagonal(start - left).fill_(-torch.inf)
            # A block whose only entry is left out has no finite maximum.
            largest = block.amax(-1, keepdim=True).clamp_min(torch.finfo(block.dtype).min)
            # Differences from the maximum need no more than single precision, whose exponential is much the cheaper.
            shares = block.sub_(largest).float().exp_().sum(-1)
            total = torch.logaddexp(total, shares.double().log() + largest.squeeze(-1))
        sums[start : start + rows] = total + common
    return sums


def log_likelihood_of_pairs(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor],
    inner: ProgramRun,
    num_inner: int,
) -> Tensor:
    """Return log p(y_i given the latents of inner run j), nats, `(num_outer, num_inner)`, of any explicit model."""
    if not experiment.linked_outcomes:
        return pairwise_log_density(experiment.observations, outcomes, inner)
    # An outcome's distribution depends on another's value, so the model is run again at every pair.
    count = next(iter(outcomes.values())).shape[0]
    latents = [site.name for site in (*experiment.targets, *experiment.others) if not site.is_deterministic]
    values = {name: inner.value(name).repeat(count, *(1,) * len(experiment.shapes[name])) for name in latents}
    values |= {name: value.repeat_interleave(num_inner, 0) for name, value in outcomes.items()}
    run = run_rows(experiment.program, count * num_inner, experiment.shapes, designs=designs, row_values=values)
    return outcome_log_likelihood(run, experiment).reshape(count, num_inner)


def pairwise_log_density(
    sites: Sequence[Site], values: Mapping[str, Tensor], inner: ProgramRun
) -> Float[Tensor, "num_outer num_inner"]:
    """Return log p(value i given what run j has before it), nats, for all pairs, without running the model again.

    Only for sites that do not depend on each other's values (for outcomes, `Experiment.linked_outcomes` is False).
    """
    scores = [torch.cat([_score_values(trace, site, values[site.name]) for trace in inner.traces], 1) for site in sites]
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
    The squares have coefficients only where scales differ between draws, else `half_precision`.
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


def normal_pairs(sites: Sequence[Site], inner: ProgramRun) -> NormalPairs | None:
    """Return the pairs of values of sites with an inner run; None unless every site is plainly normal."""
    if len(inner.traces) != 1:
        return None
    means, scales = [], []
    for site in sites:
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


def _score_values(trace: Any, site: Site, values: Tensor) -> Tensor:
    node = trace.nodes[site.name]
    # One run alone has no row dimension; the dimension put in front of its layout stands for it.
    own = node["value"].shape
    rows, layout = (1, own) if own == site.shape else (own[0], own[1:])
    log_prob = log_prob_on_support(node["fn"], values.reshape(values.shape[0], 1, *layout))
    if node["mask"] is not None:
        log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, torch.zeros_like(log_prob))
    return log_prob.reshape(values.shape[0], rows, -1).sum(-1)

r"""The gap between two bounds: how far can the trained density be from the posterior, in nats, on average?

The lower bound that trained the density falls short of the expected information gain by exactly

.. math::
    \mathrm{EIG} - \mathrm{lower}
    = \mathbb{E}_{y}\, \mathrm{KL}\left( p(\theta \mid y) \,\|\, q(\theta \mid y) \right) ,

so with an upper bound of the same quantity :math:`\mathbb{E}\,\mathrm{KL} \le \mathrm{upper} - \mathrm{lower}`. This is
the one check here that bounds the whole error, in every direction and dimension at once; it needs a density of the
outcomes, as upper bounds do, and says nothing of where the error is. A wide gap may be the upper bound's own: certify
for a tight one. By Pinsker's inequality the average total variation distance is at most :math:`\sqrt{\mathrm{gap} /
2}`.

References:
    D. Barber and F. Agakov (2003), The IM algorithm: a variational approach to information maximization.
    A. Foster et al. (2019), Variational Bayesian optimal experimental design, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.results import DesignResult, EIGResult


@dataclass(frozen=True)
class BoundGap:
    """What two bounds leave open of the divergence of a trained density from the posterior; all in nats.

    Attributes:
        gap: Upper less lower bound: at least the expected divergence, up to `standard_error`. Never clamped: by chance
            it may be negative.
        standard_error: Of `gap`, the two taken as independent.
        source: Which upper bound: "certificate", or the name of a reference.
    """

    gap: Float[Tensor, " *design_batch"]
    standard_error: Float[Tensor, " *design_batch"]
    lower: Float[Tensor, " *design_batch"]
    upper: Float[Tensor, " *design_batch"]
    source: str

    def __str__(self) -> str:
        gap, error = self.gap.flatten(), self.standard_error.flatten()
        worst = int(gap.argmax())
        where = "" if gap.numel() == 1 else f" at the worst of {gap.numel()} designs"
        return (
            f"expected KL from posterior to density at most {gap[worst]:.4f} +- {error[worst]:.4f} nats{where} "
            f"(upper bound: {self.source})"
        )


def bound_gap(result: EIGResult | DesignResult) -> BoundGap:
    """Return the gap between the lower bound of a trained density and the tightest upper bound at hand.

    Of several upper bounds the one least in value plus two standard errors is taken, on average over designs.

    Args:
        result: What `eig_flow`, `eig_ba` or `optimise_design` returned, with an upper bound: ask for
            `references=[eig_marginal]` or `certify=True`, or pass it through `certify`.

    Example:
        >>> from pyro_voed.estimators import eig_flow, eig_nmc
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.training import Fresh
        >>> brief = Fresh(num_steps=200)
        >>> bound_gap(eig_flow(linear_gaussian(), "y", "theta", training=brief, references=[eig_nmc], seed=0)).source
        'eig_nmc'
    """
    estimate = result.final if isinstance(result, DesignResult) else result
    if estimate.learned is None or not estimate.learned.attains:
        raise ValueError(
            f"result: expected the Barber-Agakov bound of a density of the targets, got {estimate.estimator}, whose "
            "estimate is not what a density of its own attains. Use eig_flow, whose density the gap then judges."
        )
    uppers = _uppers(estimate)
    if not uppers:
        raise ValueError(
            "result: it holds no upper bound. Call eig_flow with references=[eig_marginal] (or eig_nmc) or "
            "certify=True, or certify the result."
        )
    source = min(uppers, key=lambda name: (uppers[name][0] + 2 * uppers[name][1]).mean().item())
    upper, upper_error = uppers[source]
    return BoundGap(
        gap=upper - estimate.eig,
        standard_error=torch.hypot(upper_error, estimate.standard_error),
        lower=estimate.eig,
        upper=upper,
        source=source,
    )


def _uppers(estimate: EIGResult) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every upper bound of a result with its standard error."""
    uppers = {}
    if estimate.certificate is not None:
        shape = estimate.eig.shape
        certificate = estimate.certificate
        uppers["certificate"] = (certificate.upper.reshape(shape), certificate.upper_standard_error.reshape(shape))
    for other in estimate.references:
        if other.bound == "upper":
            uppers[other.estimator] = (other.eig, other.standard_error)
    return uppers

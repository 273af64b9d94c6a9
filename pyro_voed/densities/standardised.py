r"""A density behind scales, a summary and a linear prediction.

With means :math:`\mu` and standard deviations :math:`\sigma` of simulated targets, :math:`c` the whitened, then
summarised context, and :math:`z = L^{-1} \big( (\theta - \mu) / \sigma - B f - b \big)` the linear residual,

.. math:: q(\theta \mid c) = q_z ( z \mid c ) \, |L|^{-1} \prod_i \sigma_i^{-1} .
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.contract import as_density, evaluating
from pyro_voed.densities.distribution import Context, Density, LogProb, Theta
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.densities.residual import LinearResidual
from pyro_voed.densities.standardise import Standardise, summarise
from pyro_voed.densities.whitening import Whitening, fixed_features_of


@rebuildable
class StandardisedDensity(Density):
    """Standardise theta and context, summarise the context, then apply a density; in raw coordinates outside.

    The context runs through its scaling, then all but its last `num_bypass` entries through the summary, whose output
    and the bypassing entries (design values, say) are what the density sees.

    Args:
        density: Anything `as_density` takes, of standardised theta and summarised context.
        theta_scaling: Scaling of theta.
        context_scaling: Scaling of the raw context.
        summary: A module that maps standardised contexts (num, dim) to features (num, summary_dim), or None.
        num_bypass: How many of the last context entries the summary does not see.
        sees_prediction: The density also sees the linear prediction, which a summary may have dropped.

    Example:
        >>> from pyro_voed.densities import AffineCouplingFlow
        >>> summary = nn.Linear(10, 4)  # of ten outcomes; the eleventh entry is the design
        >>> flow = AffineCouplingFlow(theta_dim=2, context_dim=4 + 1)
        >>> density = StandardisedDensity(flow, Standardise(2), Standardise(11), summary, num_bypass=1)
        >>> density.condition(torch.zeros(5, 11)).sample().shape
        torch.Size([5, 2])
    """

    density: Any

    def __init__(
        self,
        density: Any,
        theta_scaling: Standardise,
        context_scaling: Standardise | Whitening,
        summary: nn.Module | None = None,
        *,
        num_bypass: int = 0,
        sees_prediction: bool = False,
    ) -> None:
        super().__init__()
        self.theta_dim = theta_scaling.dim
        self.context_dim = context_scaling.dim
        self.num_bypass = check_count(num_bypass, "num_bypass", minimum=0)
        if num_bypass > self.context_dim:
            raise ValueError(
                f"num_bypass: expected at most the context's dimension {self.context_dim}, got {num_bypass}."
            )
        self.theta_scaling = theta_scaling
        self.context_scaling = context_scaling
        self.summary = summary
        self.sees_prediction = sees_prediction
        zeros = theta_scaling.mean.new_zeros(2, self.context_dim)
        with torch.no_grad(), evaluating(self):
            num_features = self._features(self.context_scaling(zeros)).shape[-1]
            left_out = (theta_scaling.groups < 0).nonzero().flatten().tolist()
            self.residual = LinearResidual(self.theta_dim, num_features, left_out).to(zeros)
            encoded = self.encode(zeros)
        self.density = as_density(density, self.theta_dim, encoded.shape[-1])
        self.has_rsample: bool = self.density.has_rsample

    def encode(self, context: Float[Tensor, "*batch context_dim"]) -> Float[Tensor, "*batch encoded_dim"]:
        """Return what the density sees of a raw context."""
        return self._seen(context)[0]

    def _features(self, scaled: Tensor) -> Tensor:
        """Return what the linear prediction of theta is made of."""
        outcome, bypassing = scaled.split([self.context_dim - self.num_bypass, self.num_bypass], -1)
        return torch.cat([fixed_features_of(self.summary, outcome), bypassing], -1)

    def _seen(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the density sees of a raw context, and the linear prediction of standardised theta."""
        scaled = self.context_scaling(context)
        prediction = self.residual.prediction(self._features(scaled))
        encoded = summarise(scaled.to(context.dtype), self.summary, num_bypass=self.num_bypass)
        if self.sees_prediction:
            encoded = torch.cat([encoded, prediction.to(context.dtype)], -1)
        return encoded, prediction

    @torch.no_grad()
    def fit_scales_(self, theta: Float[Tensor, "num theta_dim"], context: Float[Tensor, "num context_dim"]) -> None:
        """Take scales, and the linear prediction of theta, from raw draws.

        None of them may be among those that decide when training stops.
        """
        self.theta_scaling.fit_(theta)
        self.context_scaling.fit_(context)
        self.residual.fit_(self.theta_scaling(theta.double()), self._features(self.context_scaling(context)))

    def log_prob(self, theta: Theta, context: Context) -> LogProb:
        """Return the log-density of raw theta given the raw context; the batches broadcast."""
        encoded, prediction = self._seen(context)
        z = self.residual(self.theta_scaling(theta.double()), prediction).to(theta.dtype)
        log_det = self.theta_scaling.log_det() + self.residual.log_det()
        return self.density.log_prob(z, encoded) + log_det.to(theta.dtype)

    def draw(self, context: Context, batch_shape: Sequence[int]) -> Float[Tensor, "... theta_dim"]:
        """Return one draw for each entry of `batch_shape`, to which the context's batch shape broadcasts."""
        encoded, prediction = self._seen(context)
        z = self.density.draw(encoded, batch_shape)
        return self.theta_scaling.inverse(self.residual.inverse(z, prediction)).to(z.dtype)

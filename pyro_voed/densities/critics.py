r"""Critics: functions T(theta, y) that score how well a target and an outcome go together.

A critic is a module that scores *all pairs* of one batch,

.. math:: \text{critic}(\theta, c)[i, j] = T(\theta_j, c_i),

for targets `(num_theta, *batch, theta_dim)` and contexts (outcomes, with the design behind them where there are
several) `(num_context, *batch, context_dim)`; each member of `*batch` is a design of its own, and only pairs of the
same design are scored. Two architectures (Poole et al. 2019, section 3): `SeparableCritic`, an inner product of
features, where all pairs cost one matrix product; `JointCritic`, a network of the two together, run once for every
pair.

References:
    Poole, Ozair, van den Oord, Alemi and Tucker (2019), "On variational bounds of mutual information".
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.contract import evaluating
from pyro_voed.densities.layers import perceptron
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.densities.standardise import Standardise, summarise
from pyro_voed.densities.whitening import Whitening, context_layout

AllTheta = Float[Tensor, "num_theta *batch theta_dim"]
AllContexts = Float[Tensor, "num_context *batch context_dim"]
Scores = Float[Tensor, "num_context num_theta *batch"]


@rebuildable
class SeparableCritic(nn.Module):
    r"""Score pairs by an inner product of features, :math:`f(\theta)^\top g(c) / \sqrt{\text{feature\_dim}}`.

    More features can express more concentrated posteriors.

    Example:
        >>> SeparableCritic(2, 3)(torch.zeros(5, 2), torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """

    def __init__(
        self, theta_dim: int, context_dim: int, *, hidden_dim: int = 128, num_layers: int = 2, feature_dim: int = 32
    ) -> None:
        super().__init__()
        self.theta_dim = check_count(theta_dim, "theta_dim")
        self.context_dim = check_count(context_dim, "context_dim")
        self.feature_dim = check_count(feature_dim, "feature_dim")
        hidden = [hidden_dim] * num_layers
        self.theta_features = perceptron([theta_dim, *hidden, feature_dim])
        self.context_features = perceptron([context_dim, *hidden, feature_dim])

    def forward(self, theta: AllTheta, context: AllContexts) -> Scores:
        """Score all pairs."""
        features = self.context_features(context).movedim(0, -2)  # (*batch, num_context, feature_dim)
        scores = features @ self.theta_features(theta).movedim(0, -2).mT
        return scores.movedim((-2, -1), (0, 1)) / math.sqrt(self.feature_dim)


@rebuildable
class JointCritic(nn.Module):
    """Score pairs by one network of theta and context together.

    The first layer is a sum of a part of theta and a part of the context, so that it is computed once for each of
    them; the others run once for every pair. Without gradients pairs run in chunks of at most `max_pairs`.

    Example:
        >>> JointCritic(2, 3)(torch.zeros(5, 2), torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """

    def __init__(
        self, theta_dim: int, context_dim: int, *, hidden_dim: int = 64, num_layers: int = 2, max_pairs: int = 2**16
    ) -> None:
        super().__init__()
        self.theta_dim = check_count(theta_dim, "theta_dim")
        self.context_dim = check_count(context_dim, "context_dim")
        self.max_pairs = check_count(max_pairs, "max_pairs")
        self.theta_part = nn.Linear(theta_dim, hidden_dim, bias=False)
        self.context_part = nn.Linear(context_dim, hidden_dim)
        self.rest = nn.Sequential(nn.SiLU(), perceptron([hidden_dim] * check_count(num_layers, "num_layers") + [1]))

    def forward(self, theta: AllTheta, context: AllContexts) -> Scores:
        """Score all pairs."""
        theta_part, context_part = self.theta_part(theta), self.context_part(context).unsqueeze(1)
        if torch.is_grad_enabled():
            return self.rest(theta_part + context_part).squeeze(-1)
        rows = max(1, self.max_pairs // math.prod(theta.shape[:-1]))
        return torch.cat([self.rest(theta_part + part).squeeze(-1) for part in context_part.split(rows)])


@rebuildable
class StandardisedCritic(nn.Module):
    """Standardise theta and context, summarise the context, apply a critic; and a baseline log a(context) for TUBA.

    The summary sees standardised contexts without their last `num_bypass` entries (designs).

    Example:
        >>> critic = StandardisedCritic(SeparableCritic(2, 3), Standardise(2), Standardise(3), with_baseline=True)
        >>> critic(torch.zeros(5, 2), torch.zeros(5, 3)).shape, critic.log_baseline(torch.zeros(5, 3)).shape
        (torch.Size([5, 5]), torch.Size([5]))
    """

    def __init__(
        self,
        critic: nn.Module,
        theta_scaling: Standardise,
        context_scaling: Standardise | Whitening,
        summary: nn.Module | None = None,
        *,
        num_bypass: int = 0,
        with_baseline: bool = False,
    ) -> None:
        super().__init__()
        self.theta_dim, self.context_dim = theta_scaling.dim, context_scaling.dim
        self.theta_scaling, self.context_scaling = theta_scaling, context_scaling
        self.critic, self.summary, self.num_bypass = critic, summary, num_bypass
        self.baseline: nn.Sequential | None = None
        if with_baseline:
            with torch.no_grad(), evaluating(self):
                encoded = self.encode(theta_scaling.mean.new_zeros(2, self.context_dim))
            self.baseline = perceptron([encoded.shape[-1], 64, 64, 1])

    def encode(self, context: Float[Tensor, "*batch context_dim"]) -> Float[Tensor, "*batch encoded_dim"]:
        """Return what the critic sees of a raw context."""
        scaled = self.context_scaling(context).to(context.dtype)
        return summarise(scaled, self.summary, num_bypass=self.num_bypass)

    def forward(self, theta: AllTheta, context: AllContexts) -> Scores:
        """Score all pairs of raw theta and raw context."""
        return self.critic(self.theta_scaling(theta), self.encode(context))

    def log_baseline(self, context: Float[Tensor, "*batch context_dim"]) -> Float[Tensor, "*batch"]:
        """Return log a(context), 0 where no baseline is learnt."""
        if self.baseline is None:
            return context.new_zeros(context.shape[:-1])
        return self.baseline(self.encode(context)).squeeze(-1)

    @torch.no_grad()
    def fit_scales_(self, theta: Float[Tensor, "num theta_dim"], context: Float[Tensor, "num context_dim"]) -> None:
        """Take scales from raw draws."""
        self.theta_scaling.fit_(theta)
        self.context_scaling.fit_(context)


def build_critic(
    given: Any,
    theta: Float[Tensor, "num theta_dim"],
    context: Float[Tensor, "num context_dim"],
    *,
    num_designs: int,
    summary: nn.Module | None,
    with_baseline: bool,
) -> StandardisedCritic:
    """Return the critic to train, its scales taken from a pilot.

    Args:
        given: A factory `(theta_dim, context_dim) -> module`, a module that scores all pairs, or a standardised critic,
            which goes on from where it was, as a copy.
        theta: Pilot draws of the targets.
        context: Pilot draws of the contexts.
        num_designs: How many of the last context columns are designs, which bypass the summary.
        summary: A learned statistic of the standardised outcome.
        with_baseline: Whether a baseline is learnt too.

    Raises:
        ValueError: If the critic has other dimensions, no baseline where one is needed, or scores no pairs.
    """
    dims = (theta.shape[-1], context.shape[-1])
    if isinstance(given, StandardisedCritic):
        own = (given.theta_dim, given.context_dim)
        if own != dims:
            raise ValueError(f"critic: expected one of dimensions {dims}, got {own}: it was trained for another model.")
        if with_baseline and given.baseline is None:
            raise ValueError("critic: it has no baseline, which these terms need. Train it with them from the start.")
        return copy.deepcopy(given)
    layout = context_layout(summary, dims[1], num_designs=num_designs)
    scalings = Standardise(dims[0]).to(theta).fit_(theta), Whitening(dims[1], *layout).to(theta).fit_(context)

    def wrap(inner: nn.Module, with_baseline: bool) -> StandardisedCritic:
        return StandardisedCritic(
            inner,
            *scalings,
            copy.deepcopy(summary),
            num_bypass=0 if summary is None else num_designs,
            with_baseline=with_baseline,
        ).to(theta)

    with torch.no_grad():
        inner_dim = wrap(nn.Identity(), False).encode(context[:2]).shape[-1]
        inner = copy.deepcopy(given) if isinstance(given, nn.Module) else given(dims[0], inner_dim)
        critic = wrap(inner, with_baseline)
        # The bare critic: a wrong shape is then named by us, not by a checker of shapes on the way.
        shape = inner(critic.theta_scaling(theta[:3]), critic.encode(context[:2])).shape
    if shape != (2, 3):
        raise ValueError(
            f"critic: of 3 targets and 2 contexts expected scores of all pairs, shape (2, 3), got {tuple(shape)}."
        )
    return critic

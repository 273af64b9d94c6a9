r"""Censored measurements: what lies beyond a limit is seen at the limit.

A sensor that saturates, a survival time cut off when the study ends or a concentration below the limit of detection are
draws of :math:`\min(\max(x, l), h)` with x from a base distribution. The limits carry point masses, so

.. math::
    \log p(y) = \begin{cases} \log F(l) & y \le l \\ \log (1 - F(h)) & y \ge h \\ \log f(y) & \text{else,}\end{cases}

a density with respect to length plus the two points. Far in a tail :math:`\log F` is not the logarithm of a rounded F:
for normal, log-normal, exponential and Weibull bases both tails are good to any depth.

A value that is clamped in the model (`pyro.deterministic`) has the same draws and no density; it serves where
simulations are enough, as in `eig_flow`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class Censored(TorchDistribution):
    """A distribution whose draws are moved to the nearer limit where they lie beyond.

    Draws carry no gradient although their base may: the density jumps where a draw arrives at a limit, which a gradient
    along the draw would not see.

    Args:
        base: Distribution of single numbers, with a `cdf`; make vectors of the result by `to_event`.
        low, high: Limits within its support, broadcast over the batch; None for none on that side.

    Raises:
        ValueError: If there is no limit, one lies outside the support, or the base draws vectors.

    Example:
        >>> import pyro
        >>> from pyro import distributions as dist
        >>> from pyro_voed import eig_nmc
        >>> def model():
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", Censored(dist.Normal(theta, 0.5), low=0.0))
        >>> bool(0.5 < eig_nmc(model, "y", seed=0).eig < 0.7)  # exact: 0.589
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        base: Any,
        low: Tensor | float | None = None,
        high: Tensor | float | None = None,
        *,
        validate_args: bool | None = None,
    ):
        if base.event_shape:
            raise ValueError(
                f"base: expected a distribution of single numbers, got events of {tuple(base.event_shape)}."
            )
        if low is None and high is None:
            raise ValueError("expected a limit, low or high: with neither, nothing is censored.")
        like = base.sample() if not hasattr(base, "mean") else base.mean
        limits = [None if limit is None else torch.as_tensor(limit).to(like) for limit in (low, high)]
        for name, limit in zip(("low", "high"), limits, strict=True):
            if limit is not None and not bool(base.support.check(limit).all()):
                raise ValueError(f"{name}: expected a limit in the support {base.support}, got {limit.tolist()}.")
        shape = torch.broadcast_shapes(base.batch_shape, *(limit.shape for limit in limits if limit is not None))
        self.base = base.expand(shape)
        self.low, self.high = (None if limit is None else limit.expand(shape) for limit in limits)
        super().__init__(shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        """That of the base, which densities map to the real line."""
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Censored:
        """Return the distribution with its batch dimensions expanded."""
        new = self._get_checked_instance(Censored, _instance)
        new.base = self.base.expand(batch_shape)
        new.low, new.high = (None if limit is None else limit.expand(batch_shape) for limit in (self.low, self.high))
        super(Censored, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws of the base, those beyond a limit moved to it."""
        return self.base.sample(torch.Size(sample_shape)).clamp(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density inside the limits, the log probability at them, -inf beyond."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.base.log_prob(value)
        if self.low is not None:
            log_prob = torch.where(value > self.low, log_prob, log_cdf(self.base, self.low))
            log_prob = torch.where(value < self.low, -torch.inf, log_prob)
        if self.high is not None:
            log_prob = torch.where(value < self.high, log_prob, log_cdf(self.base, self.high, above=True))
            log_prob = torch.where(value > self.high, -torch.inf, log_prob)
        return log_prob


def log_cdf(fn: Any, value: Tensor, *, above: bool = False) -> Tensor:
    """Return the log probability of a draw up to a value, or `above` it, nats.

    Example:
        >>> from torch.distributions import Normal
        >>> round(log_cdf(Normal(0.0, 1.0), torch.tensor(-30.0)).item(), 2)
        -454.32
    """
    if isinstance(fn, torch.distributions.Normal):
        place = (value - fn.loc) / fn.scale
        return torch.special.log_ndtr(-place if above else place)
    if isinstance(fn, torch.distributions.Exponential):
        log_above = -fn.rate * value
        return log_above if above else torch.log(-torch.expm1(log_above))
    if isinstance(fn, torch.distributions.TransformedDistribution):
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
            # A falling map turns the line round.
            above ^= bool(torch.as_tensor(transform.sign < 0).all())
        return log_cdf(fn.base_dist, value, above=above)
    share = fn.cdf(value)
    return torch.log1p(-share) if above else share.log()

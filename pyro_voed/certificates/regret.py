"""What choosing a design by its certified interval may cost."""

from __future__ import annotations

from torch import Tensor

from pyro_voed.results import EIGResult


def max_regret(result: EIGResult) -> tuple[Tensor, int]:
    """Return a bound on what choosing the best certified design may cost, and which design that is.

    Args:
        result: A certified result over a one-dimensional batch of candidate designs.

    Returns:
        `max over designs of upper - lower of the chosen`, nats, which holds with the certificate's confidence, and the
        index of the chosen design, the one with the largest lower end.

    Raises:
        ValueError: If the result has no interval.

    Example:
        >>> import torch
        >>> from pyro_voed.certificates import certify
        >>> from pyro_voed.estimators import eig_nmc
        >>> from pyro_voed.problems.finite import finite
        >>> designs = {"xi": torch.tensor([0.1, 1.0])}
        >>> regret, chosen = max_regret(certify(eig_nmc(finite(), "y", designs=designs, seed=0), seed=0))
        >>> chosen, bool(regret < 0.05)
        (1, True)
    """
    if result.interval is None:
        raise ValueError("result: it has no certified interval. Call certify first.")
    lower, upper = result.interval[0].reshape(-1), result.interval[1].reshape(-1)
    chosen = int(lower.argmax())
    return upper.max() - lower[chosen], chosen

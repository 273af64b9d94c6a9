r"""The EIG of regression designs whose rows measure several coefficients at once, beside one that is known exactly.

A search by gradients ends near a signed permutation, not at one: every row keeps small entries beside its large one,
and the closed form of `regression.exact_eig` does not hold. Let X be square and regular, :math:`G = X^\top X`, and
:math:`m = X^{-1} y` the least-squares estimate, which is w seen through Gaussian noise of covariance
:math:`\tau^2 G^{-1}`. Take from it the largest multiple of :math:`\operatorname{diag}(G)^{-1}`,

.. math:: G^{-1} = D + A A^\top, \qquad D = \lambda \operatorname{diag}(G)^{-1}, \qquad
    \lambda = \lambda_{\min}\big( \operatorname{diag}(G)^{1/2}\, G^{-1} \operatorname{diag}(G)^{1/2} \big) .

Given the part :math:`\tau A z` of the noise, :math:`z \sim N(0, I)`, the coordinates are independent again, each a
Laplace plus a Gaussian of known density f,

.. math::
    p(y \mid \sigma)
    = \frac{1}{|\det X|}\; \mathbb{E}_z \prod_j f_{\tau \sqrt{D_j}} \big( m_j - \tau (A z)_j \big) ,

and p(y) is a quadrature of it over :math:`\sigma`. The nearer X is to a signed permutation, the smaller is A and the
less the product varies with z. Its mean over draws enters a logarithm, whose bias is minus half the relative variance
of that mean: it is added back, and designs at which it is large are refused.

The EIG itself is a difference: with :math:`X_0` that keeps the largest entry of every row, and common coefficients and
noise, :math:`\mathrm{EIG}(X) = \mathrm{EIG}(X_0) + \mathbb{E}[\log p_{X_0}(y_0) - \log p_X(y)]`, whose terms vary
little, while :math:`\mathrm{EIG}(X_0)` is known exactly.

References:
    The decomposition is our own; the model is that of Foster et al. (2020) and Dong et al. (2025), see `regression`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.problems.regression import NOISE_FLOOR, exact_eig, log_convolution, log_density, sigma_nodes

LARGEST_BIAS = 0.05
"""Designs are refused at which the logarithm's bias, before it is added back, exceeds this on average, in nats."""

_CHUNK_ENTRIES = 500_000


def coupled_eig(
    design: Float[Tensor, "num_rows num_columns"], *, num_outcomes: int = 256, num_parts: int = 32, seed: int = 0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Estimate the EIG about w and sigma of a square design near a signed permutation, in nats, and its standard error.

    Args:
        design: A regular matrix; ArithmeticError where it is too far from a signed permutation for so few draws.
        num_outcomes: Simulated pairs of outcomes.
        num_parts: Draws of the common part of the noise for each outcome.

    Example:
        >>> eig, standard_error = coupled_eig(torch.eye(3) + 0.02, num_outcomes=64)
        >>> abs(eig - exact_eig(torch.eye(3))[0]).item() < 0.2
        True
    """
    rows = design.detach().cpu().double()
    if rows.ndim != 2 or rows.shape[0] != rows.shape[1] or not torch.linalg.matrix_rank(rows) == len(rows):
        raise ValueError(
            f"coupled_eig: expected a square regular matrix, got shape {tuple(rows.shape)} of rank "
            f"{int(torch.linalg.matrix_rank(rows))}. certify(eig_flow(...)) bounds the EIG of any design."
        )
    single = torch.where(rows.abs() == rows.abs().amax(-1, keepdim=True), rows, 0.0)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_outcomes, 1 + len(rows), dtype=torch.double, generator=generator)
    tau = NOISE_FLOOR - torch.log1p(-uniform[:, 0])
    centred = uniform[:, 1:] - 0.5
    w = -centred.sign() * torch.log1p(-2 * centred.abs())
    noise = tau.unsqueeze(-1) * torch.randn(num_outcomes, len(rows), dtype=torch.double, generator=generator)
    z = torch.randn(num_outcomes, num_parts, len(rows), dtype=torch.double, generator=generator)
    log_marginal, bias = _log_marginal(w @ rows.mT + noise, rows, z)
    if bias.mean() > LARGEST_BIAS:
        raise ArithmeticError(
            f"coupled_eig: the design is too far from a signed permutation: the marginal density's logarithm is biased "
            f"by {bias.mean():.2g} nats with num_parts={num_parts}, more than {LARGEST_BIAS} can be corrected for. "
            "Raise num_parts, or bound the EIG from both sides: certify(eig_flow(...))."
        )
    terms = _log_single(w @ single.mT + noise, single) - log_marginal - bias
    exact, exact_error = exact_eig(single, seed=seed)
    return exact + terms.mean(), torch.hypot(terms.std() / math.sqrt(num_outcomes), exact_error)


def _log_single(outcomes: Tensor, design: Tensor) -> Float[Tensor, "num_outcomes"]:
    """Compute log p(y) where every row measures one coefficient."""
    tau, weights = sigma_nodes(len(design))
    return torch.logsumexp(log_density(outcomes.unsqueeze(1), design, tau) + weights.log(), -1)


def _log_marginal(
    outcomes: Float[Tensor, "num_outcomes num_rows"],
    design: Float[Tensor, "num_rows num_rows"],
    z: Float[Tensor, "num_outcomes num_parts num_rows"],
) -> tuple[Float[Tensor, "num_outcomes"], Float[Tensor, "num_outcomes"]]:
    """Estimate log p(y), and by how much its expectation is too low."""
    gram = design.mT @ design
    inverse, sizes = torch.linalg.inv(gram), gram.diagonal()
    scaled = inverse * torch.outer(sizes, sizes).sqrt()
    own = torch.linalg.eigvalsh(scaled)[0] / sizes
    values, vectors = torch.linalg.eigh(inverse - torch.diag(own))
    mixing = vectors * values.clamp(min=0.0).sqrt()  # rounding makes the smallest, which is zero, negative
    tau, weights = sigma_nodes(len(design))
    t = tau.unsqueeze(-1) * own.sqrt()  # (num_nodes, num_rows)
    estimates = torch.linalg.solve(design, outcomes.mT).mT
    log_weights = weights.log() - torch.linalg.slogdet(design).logabsdet
    size = max(1, _CHUNK_ENTRIES // (z.shape[1] * t.numel()))
    means, biases = [], []
    for m, part in zip(estimates.split(size), (z @ mixing.mT).split(size), strict=True):
        seen = m[:, None, None] - tau[:, None] * part.unsqueeze(2)  # (chunk, num_parts, num_nodes, num_rows)
        log_parts = torch.logsumexp(log_convolution(seen, t).sum(-1) + log_weights, -1)  # (chunk, num_parts)
        log_mean = torch.logsumexp(log_parts, -1) - math.log(z.shape[1])
        means.append(log_mean)
        biases.append(0.5 * (log_parts - log_mean.unsqueeze(-1)).exp().var(-1) / z.shape[1])
    return torch.cat(means), torch.cat(biases)

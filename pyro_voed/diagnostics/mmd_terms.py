r"""The squared maximum mean discrepancy of a Gaussian kernel: estimate, standard error, permutations.

From the kernel values of all pairs of draws :math:`x_1, \dots, x_m` and :math:`y_1, \dots, y_n`,

.. math::
    \widehat{\mathrm{MMD}}^2 = \frac{\sum_{i \ne j} k(x_i, x_j)}{m (m - 1)}
    + \frac{\sum_{i \ne j} k(y_i, y_j)}{n (n - 1)}
    - \frac{2}{m n} \sum_{i, j} k(x_i, y_j)

is the unbiased estimate of what `distances` defines.

References:
    A. Gretton, K. Borgwardt, M. Rasch, B. Schölkopf and A. Smola (2012), A kernel two-sample test. JMLR 13, lemma 6,
    whose variance is Hoeffding's decomposition.
    G. J. Székely and M. L. Rizzo (2014), Partial distance correlation with methods for dissimilarities. Annals of
    Statistics 42, equation 2.6 (centring of pair matrices without bias).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_kernel(squared_distances: Float[Tensor, "*shape"], bandwidths: Sequence[float]) -> Float[Tensor, "*shape"]:
    r"""Return the mean over bandwidths :math:`h` of :math:`\exp(-|x - y|^2 / 2 h^2)`."""
    kernels = [torch.exp(squared_distances * (-0.5 / bandwidth**2)) for bandwidth in bandwidths]
    return torch.stack(kernels).mean(0) if len(kernels) > 1 else kernels[0]


def squared_distances(
    x: Float[Tensor, "*batch num_rows dim"], y: Float[Tensor, "*batch num_columns dim"]
) -> Float[Tensor, "*batch num_rows num_columns"]:
    """Return the squared Euclidean distance of every row of `x` to every row of `y`."""
    # Differences, not products: a product loses the distances of near neighbours to rounding.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def median_distance(draws: Float[Tensor, "num_draws dim"]) -> float:
    """Return the median distance between draws that differ, the usual bandwidth of a Gaussian kernel.

    Pairs of equal draws are left out: of discrete draws they may be most.
    """
    distances = torch.nn.functional.pdist(draws)
    apart = distances[distances > 0]
    if len(apart) == 0:
        raise ValueError("all draws are equal: there is no distance to compare them by.")
    return apart.median().item()


def mmd_squared(gram: Float[Tensor, "num_pooled num_pooled"], num_first: int) -> tuple[float, float]:
    r"""Return the unbiased squared MMD and its standard error from the kernel values of all pairs, the first set first.

    The estimate's variance is that of the witness function :math:`g(z) = \mathrm{E}\, k(z, x) - \mathrm{E}\, k(z, y)`,
    :math:`4 \operatorname{var} g(x) / m + 4 \operatorname{var} g(y) / n`, and that of the kernel with its means over
    rows and columns taken off, :math:`2 v_{xx} / m(m-1) + 2 v_{yy} / n(n-1) + 4 v_{xy} / mn`, which is all there is
    where the distributions are equal. The first part is estimated without bias from the witness as measured, less what
    its own noise adds, and taken as 0 where that is negative. Both sets need at least 4 draws.
    """
    m, n = num_first, len(gram) - num_first
    within_x, mean_x, noise_x = _within(gram[:m, :m])
    within_y, mean_y, noise_y = _within(gram[m:, m:])
    across = gram[:m, m:]
    across_x, across_y, mean = across.mean(1), across.mean(0), across.mean()
    noise = (across - across_x[:, None] - across_y + mean).square().mean() * m * n / ((m - 1) * (n - 1))
    witness_x = (within_x - across_x).var() - noise_x / (m - 1) - noise / n
    witness_y = (across_y - within_y).var() - noise_y / (n - 1) - noise / m
    first_order = 4 * witness_x / m + 4 * witness_y / n
    second_order = 2 * noise_x / (m * (m - 1)) + 2 * noise_y / (n * (n - 1)) + 4 * noise / (m * n)
    value = mean_x + mean_y - 2 * mean
    return value.item(), (first_order.clamp(min=0.0) + second_order).sqrt().item()


def permuted_mmd_squared(
    gram: Float[Tensor, "num_pooled num_pooled"], num_first: int, num_permutations: int
) -> Float[Tensor, " num_permutations"]:
    """Return the unbiased squared MMD with the draws dealt anew to the two sets, once a permutation."""
    m, n = num_first, len(gram) - num_first
    off = gram - torch.diag(gram.diagonal())
    is_first = torch.zeros(num_permutations, m + n).to(gram)
    chosen = torch.rand(num_permutations, m + n).argsort(1)[:, :m].to(gram.device)
    is_first.scatter_(1, chosen, 1.0)
    within_first = (is_first @ off * is_first).sum(1)
    from_first = is_first @ off.sum(1)
    within_second = off.sum() - 2 * from_first + within_first
    return within_first / (m * (m - 1)) + within_second / (n * (n - 1)) - 2 * (from_first - within_first) / (m * n)


def _within(gram: Float[Tensor, "num num"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return each draw's mean kernel with the others, the mean of all, and the variance that row means leave."""
    num = len(gram)
    rows = (gram.sum(1) - gram.diagonal()) / (num - 1)
    mean = rows.mean()
    # Centring with these factors makes the sum of squares below unbiased for its degrees of freedom.
    shares = rows * (num - 1) / (num - 2)
    centred = gram - shares[:, None] - shares + mean * num / (num - 2)
    noise = (centred.square().sum() - centred.diagonal().square().sum()) / (num * (num - 3))
    return rows, mean, noise

"""The LB-KLD bound from nearest-neighbour entropies of outcomes; derived in `estimators.lbkld`."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_BLOCKS = 20
NUM_NEIGHBOURS = 4
MINIMAL_WEIGHT = 0.05


def lbkld_terms(
    outcomes: Float[Tensor, "num y_dim"],
    differences: Float[Tensor, "num y_dim"],
    clusters: Int[Tensor, " num"],
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    num_blocks: int = NUM_BLOCKS,
) -> tuple[Float[Tensor, ""], Float[Tensor, " num_blocks"]]:
    """Return the LB-KLD bound, nats, and its value without each block of experiments, for the jackknife.

    Args:
        outcomes: Outcomes of the first experiments.
        differences: Differences of the second and third experiments at the same targets.
        clusters: The cluster of each first outcome.

    Example:
        >>> y = torch.randn(2000, 1)  # independent of any target
        >>> bound, _ = lbkld_terms(y, torch.randn(2000, 1) - torch.randn(2000, 1), torch.zeros(2000, dtype=torch.long))
        >>> bool(bound.abs() < 0.25)
        True
    """
    num, dim = outcomes.shape
    block = torch.arange(num, device=outcomes.device) * num_blocks // num
    entropies, counts = [], []
    kept = torch.stack([block != index for index in range(-1, num_blocks)], 1).double()
    for cluster in clusters.unique():
        own = clusters == cluster
        entropies.append(_entropies(differences[own], block[own], num_blocks, num_neighbours))
        counts.append(kept[own].sum(0))
    weights = torch.stack(counts) / kept.sum(0)
    conditional = (weights * torch.stack(entropies)).sum(0)
    bounds = _entropies(outcomes, block, num_blocks, num_neighbours) - conditional + dim * math.log(math.sqrt(2.0))
    return bounds[0], bounds[1:]


def nearest_neighbour_entropy(x: Float[Tensor, "num dim"], num_neighbours: int = 1) -> Float[Tensor, ""]:
    """Estimate the differential entropy of a sample without ties, nats, from its nearest neighbours."""
    return _entropies(x, torch.zeros(x.shape[0], dtype=torch.long, device=x.device), 0, num_neighbours)[0]


def _entropies(x: Tensor, block: Tensor, num_blocks: int, num_neighbours: int) -> Tensor:
    """Return the entropy, then that without each block of points, `(1 + num_blocks,)`."""
    z, log_scale = _whiten(x.double())
    volumes = _log_volumes(z, block, num_blocks, num_neighbours)
    if not bool(torch.isfinite(volumes).all()):
        raise ArithmeticError(
            "nearest-neighbour entropy: points coincide with their neighbours, so they have no density. Dequantise "
            "whole numbers, and leave constant columns out."
        )
    kept = torch.stack([block != index for index in range(-1, num_blocks)], 1).to(volumes)
    counts = kept.sum(0)
    k = torch.tensor(float(num_neighbours), dtype=volumes.dtype, device=x.device)
    constant = torch.digamma(counts) - torch.digamma(k) + (x.shape[1] - 1) / k
    return constant + (volumes * kept).sum(0) / counts + log_scale


def _whiten(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return principal components of unit variance and the log volume that was divided out."""
    centred = x - x.mean(0)
    variances, directions = torch.linalg.eigh(centred.mT @ centred / (len(x) - 1))
    if bool(variances[0] <= 1e-12 * variances[-1]):
        raise ArithmeticError(
            "nearest-neighbour entropy: the outcomes lie on a plane (one is constant, or a combination of the others), "
            "so they have no density. Leave redundant outcomes out."
        )
    return centred @ directions / variances.sqrt(), 0.5 * variances.log().sum()


def _log_volumes(z: Tensor, block: Tensor, num_blocks: int, num_neighbours: int) -> Tensor:
    """Return log rectangle volumes, with all points and without each block, `(num, 1 + num_blocks)`."""
    from scipy.spatial import cKDTree  # here, because `import pyro_voed` should not pay for it

    # A block holds each neighbour with probability 1/20, so none can hold all but `num_neighbours` of these.
    num_kept = min(2 * num_neighbours + 8, len(z) - 1)
    points = z.detach().cpu().numpy()
    found = cKDTree(points).query(points, num_kept + 1, p=torch.inf)[1][:, 1:]  # nearest first, itself left out
    neighbours = torch.from_numpy(found).to(z.device)
    sides = 2.0 * (z.unsqueeze(1) - z[neighbours]).abs()  # (num, num_kept, dim)
    volumes = []
    for index in range(-1, num_blocks):
        kept = block[neighbours] != index
        counted = kept & (kept.cumsum(1) <= num_neighbours)
        volumes.append(sides.masked_fill(~counted.unsqueeze(-1), 0.0).amax(1).log().sum(-1))
    return torch.stack(volumes, 1)

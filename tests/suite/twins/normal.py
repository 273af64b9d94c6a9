"""Normal densities and draws, summed over the last axis."""

import numpy as np
from scipy import stats
from scipy.special import ndtri


def log_normal(y, mean, scale):
    """Return the log density of a row of independent normal readings."""
    y, mean, scale = np.broadcast_arrays(y, mean, scale)
    return (-0.5 * ((y - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum(axis=-1)


def log_correlated(y, covariance):
    """Return the log density of y, `(num, 1, dim)`, for each of a stack of covariances with mean zero."""
    lower = np.linalg.cholesky(covariance)
    inverse = np.linalg.inv(lower)
    whitened = np.einsum("kij,nj->nki", inverse, y[:, 0])
    log_det = np.log(np.diagonal(lower, axis1=-2, axis2=-1)).sum(axis=-1)
    return -0.5 * (whitened**2).sum(axis=-1) - log_det - 0.5 * y.shape[-1] * np.log(2 * np.pi)


def noise(uniform, scale=1.0):
    """Return normal draws from uniform ones."""
    return scale * ndtri(uniform)


def vector(size, mean=0.0, scale=1.0):
    """Return the distributions of a vector of normal coefficients."""
    means, scales = np.broadcast_to(mean, size), np.broadcast_to(scale, size)
    return [stats.norm(m, s) for m, s in zip(means, scales, strict=True)]

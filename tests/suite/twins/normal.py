"""Normal densities and draws, summed over the last axis."""

import numpy as np
from scipy import stats
from scipy.special import ndtri


def log_normal(y, mean, scale):
    """Return the log density of a row of independent normal readings."""
    y, mean, scale = np.broadcast_arrays(y, mean, scale)
    return (-0.5 * ((y - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum(axis=-1)


def log_shifted(y, mean, covariance):
    """Return the log density of y, `(num, 1, dim)`, for stacks of means and covariances."""
    lower = np.linalg.cholesky(covariance)
    inverse = np.linalg.inv(lower)
    size, dim = len(inverse), y.shape[-1]
    # One product of matrices whitens every outcome by every covariance.
    whitened = (y[:, 0] @ inverse.reshape(size * dim, dim).T).reshape(len(y), size, dim)
    whitened = whitened - np.einsum("kij,kj->ki", inverse, np.broadcast_to(mean, (size, dim)))
    log_det = np.log(np.diagonal(lower, axis1=-2, axis2=-1)).sum(axis=-1)
    return -0.5 * (whitened**2).sum(axis=-1) - log_det - 0.5 * dim * np.log(2 * np.pi)


def log_correlated(y, covariance):
    """Return the same with mean zero."""
    return log_shifted(y, 0.0, covariance)


def noise(uniform, scale=1.0):
    """Return normal draws from uniform ones."""
    return scale * ndtri(uniform)


def vector(size, mean=0.0, scale=1.0):
    """Return the distributions of a vector of normal coefficients."""
    means, scales = np.broadcast_to(mean, size), np.broadcast_to(scale, size)
    return [stats.norm(m, s) for m, s in zip(means, scales, strict=True)]

"""Exact values of discrete targets."""

import numpy as np
from scipy.special import entr, xlogy

from tests.suite.exact.glm import product
from tests.suite.quadrature import averaged
from tests.suite.twins.discrete import PLACE, SHARES, TABLE, TWINS


def model_discrimination():
    return averaged(TWINS["model_discrimination"], ("saturates",), {"half": 41}, log2_draws=14)


def diagnosis():
    """Entropy of the disease less its mean entropy given the tests, summed, and the marker, on a fine grid."""
    prior, marker = SHARES.pmf(np.arange(4)), np.linspace(-10.0, 10.5, 4101)
    density = np.exp(-0.5 * (marker[:, None] - PLACE) ** 2) / np.sqrt(2 * np.pi)
    left = 0.0
    for tests in product(*[(0, 1)] * 3):
        joint = prior * np.where(tests == 1, TABLE, 1 - TABLE).prod(axis=1) * density
        mass = joint.sum(axis=1)
        # The mass times the entropy of the posterior.
        left += (xlogy(mass, mass) - xlogy(joint, joint).sum(axis=1)).sum() * (marker[1] - marker[0])
    return float(entr(prior).sum() - left), 1e-8


def change_point():
    return averaged(TWINS["change_point"], ("week",), {}, log2_draws=14)


EXACT = {function.__name__: function for function in (model_discrimination, diagnosis, change_point)}

"""Ready models with known answers, one module for each.

Every module makes its model with a function of the module's own name and computes exact values with `exact_eig` (of
`covariance`, `aphids` and `electrocoating` nothing is known exactly; they come with published or reference values):

>>> import torch
>>> from pyro_voed.problems import finite
>>> model = finite.finite()
>>> round(finite.exact_eig(torch.tensor(0.5)).item(), 6)
0.125804
"""

from pyro_voed.problems import (
    aphids,
    covariance,
    electrocoating,
    finite,
    implicit_toy,
    linear_gaussian,
    michaelis_menten,
    nonlinear,
    regression,
    twelve_variances,
)

__all__ = [
    "aphids",
    "covariance",
    "electrocoating",
    "finite",
    "implicit_toy",
    "linear_gaussian",
    "michaelis_menten",
    "nonlinear",
    "regression",
    "twelve_variances",
]

"""Ready models whose expected information gain is known exactly, one module for each.

Every module makes its model with a function of the module's own name and computes exact values with `exact_eig`:

>>> import torch
>>> from pyro_voed.problems import finite
>>> model = finite.finite()
>>> round(finite.exact_eig(torch.tensor(0.5)).item(), 6)
0.125804
"""

from pyro_voed.problems import finite, implicit_toy, linear_gaussian, michaelis_menten, nonlinear, regression

__all__ = ["finite", "implicit_toy", "linear_gaussian", "michaelis_menten", "nonlinear", "regression"]

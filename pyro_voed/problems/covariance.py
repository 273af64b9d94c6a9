r"""Means, scales and correlations of normal variables from a set of rows: ninety parameters from 263 rows of twelve.

.. math::
    \mu_d \sim N(0, 1), \quad s_d \sim \mathrm{Exponential}(1), \quad R \sim \mathrm{LKJ}(1), \qquad
    y_n \sim N\left(\mu, \operatorname{diag}(s)\, R \operatorname{diag}(s)\right), \quad n = 1, \dots, N.

LKJ(1) is the uniform distribution over correlation matrices. The site "correlation" holds its Cholesky factor L,
:math:`R = L L^\top`, a lower triangular matrix with rows of unit length: a matrix near singular still has a good
factor, and the covariance has the factor :math:`\operatorname{diag}(s) L` with no decomposition to compute.
`correlations` says what the sites mean. There is no design, and the information is known neither in closed form nor by
quadrature; the reference for a posterior is NUTS.

The observed data are simulated from a printed table of twelve standard deviations and their correlations, which is no
draw from the prior.

References:
    D. Lewandowski, D. Kurowicka and H. Joe (2009), Generating random correlation matrices based on vines and extended
    onion method. Journal of Multivariate Analysis 100, section 3.2. The table is that of "Difficulty Estimating a
    Multivariate Normal Outcome", a question asked in the forum of BayesFlow's users.
"""

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

NUM_VARIABLES = 12
NUM_ROWS = 263

#: The table that the observed rows are simulated from: standard deviations, and correlations below the diagonal.
TABLE_SCALES = (0.939, 1.017, 0.937, 0.562, 0.760, 0.524, 0.585, 0.609, 0.731, 0.711, 1.124, 1.001)
TABLE_CORRELATIONS = (
    (0.668,),
    (0.635, 0.599),
    (0.263, 0.261, 0.164),
    (0.290, 0.315, 0.247, 0.486),
    (0.207, 0.245, 0.231, 0.251, 0.449),
    (-0.206, -0.182, -0.195, -0.309, -0.266, -0.142),
    (-0.280, -0.241, -0.238, -0.344, -0.305, -0.230, 0.753),
    (-0.258, -0.244, -0.185, -0.255, -0.255, -0.215, 0.554, 0.587),
    (0.080, 0.096, 0.094, -0.017, 0.151, 0.141, -0.074, -0.111, 0.016),
    (0.061, 0.028, -0.035, -0.058, -0.051, -0.003, -0.040, -0.040, -0.018, 0.284),
    (0.113, 0.174, 0.059, 0.063, 0.138, 0.044, -0.119, -0.073, -0.084, 0.563, 0.379),
)


def covariance(num_variables: int = NUM_VARIABLES, num_rows: int = NUM_ROWS) -> Callable[[], Tensor]:
    """Make the model, with sites "mean", "scale" and "correlation" (targets) and "y" (outcome, in the plate "rows").

    Example:
        >>> covariance()().shape
        torch.Size([263, 12])
    """
    if num_variables < 2 or num_rows < 1:
        raise ValueError(f"at least 2 variables and 1 row are needed, got {num_variables} and {num_rows}")

    def model() -> Tensor:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([num_variables]).to_event(1))
        scale = pyro.sample("scale", dist.Exponential(1.0).expand([num_variables]).to_event(1))
        factor = pyro.sample("correlation", lkj_factor(num_variables, 1.0))
        with pyro.plate("rows", num_rows, dim=-1):
            row = dist.MultivariateNormal(mean, scale_tril=scale.unsqueeze(-1) * factor)
            return pyro.sample("y", row)

    return model


def lkj_factor(num_variables: int, concentration: float) -> dist.LKJCholesky:
    r"""Make the LKJ distribution of Cholesky factors of correlation matrices, with draws that follow its density.

    The part of row i (counted from zero) left of the diagonal has a uniform direction and the squared length
    :math:`\sum_{j<i} L_{ij}^2 \sim \mathrm{Beta}(i / 2, \eta + (K - 1 - i) / 2)` (Lewandowski et al. 2009).
    `torch.distributions.LKJCholesky` states the right density but, in torch 2.13, draws from Beta(i - 1/2, ...): of
    three variables and more its correlations are too strong, and simulations are at odds with the density. The
    concentration :math:`\eta` is 1 for a uniform distribution; larger values favour weak correlations.

    Example:
        >>> factor = lkj_factor(5, 1.0).sample((20_000,))
        >>> round((factor @ factor.mT)[:, 2, 1].square().mean().item(), 2)  # 1 / (K + 1)
        0.17
    """
    distribution = dist.LKJCholesky(num_variables, concentration)
    row = torch.arange(num_variables, dtype=torch.get_default_dtype())
    # The first row has no squares to draw; torch sets it aside whatever is drawn.
    distribution._beta = torch.distributions.Beta(
        0.5 * row.clamp(min=1.0), concentration + 0.5 * (num_variables - 1 - row.clamp(min=1.0))
    )
    return distribution


def correlations(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the sites mean: means, scales and, row by row, the correlations below the diagonal.

    Example:
        >>> factor = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> correlations({"mean": torch.zeros(2), "scale": torch.ones(2), "correlation": factor})["correlation"]
        tensor([0.6000])
    """
    matrix = values["correlation"] @ values["correlation"].mT
    rows, columns = torch.tril_indices(matrix.shape[-2], matrix.shape[-1], offset=-1, device=matrix.device)
    return {"mean": values["mean"], "scale": values["scale"], "correlation": matrix[..., rows, columns]}


def table_values() -> dict[str, Tensor]:
    """Return the table as values of the sites, the means zero: the truth behind `observed_rows`.

    Example:
        >>> correlations(table_values())["correlation"][:3]
        tensor([0.6680, 0.6350, 0.5990])
    """
    matrix = torch.eye(NUM_VARIABLES, dtype=torch.double)
    for row, entries in enumerate(TABLE_CORRELATIONS, start=1):
        matrix[row, :row] = matrix[:row, row] = torch.tensor(entries, dtype=torch.double)
    dtype = torch.get_default_dtype()
    return {
        "mean": torch.zeros(NUM_VARIABLES),
        "scale": torch.tensor(TABLE_SCALES),
        "correlation": torch.linalg.cholesky(matrix).to(dtype),
    }


def observed_rows(num_rows: int = NUM_ROWS, *, seed: int = 0) -> Float[Tensor, "num_rows 12"]:
    """Simulate the observed data set from the table, the same for equal seeds.

    Example:
        >>> observed_rows().std(0)[:3]
        tensor([0.9, 1.0, 0.9])
    """
    table = table_values()
    noise = torch.randn(num_rows, NUM_VARIABLES, generator=torch.Generator().manual_seed(seed))
    return table["mean"] + noise @ (table["scale"].unsqueeze(-1) * table["correlation"]).mT

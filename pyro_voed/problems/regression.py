r"""Linear regression with an unknown noise scale: which twenty rows of covariates tell most about all 21 parameters?

.. math::
    w_j \sim \mathrm{Laplace}(0, 1), \quad j = 1, \dots, p, \qquad \sigma \sim \mathrm{Exponential}(1), \qquad
    y_i \sim N(\xi_i \cdot w,\; \tau^2), \quad i = 1, \dots, n, \qquad \tau = \sigma + 10^{-6},

with p = n = 20 in the papers. The design :math:`\xi` is a matrix whose rows have L1 norm one (`unit_rows`).

The **exact EIG** is known for designs whose rows have at most one entry that is not zero (`IDENTITY`, signed
permutations, diagonal matrices, replicated rows). Given :math:`\sigma`, what the rows on :math:`w_j` say of it is their
least-squares estimate :math:`m_j`, which is :math:`w_j` seen through noise of standard deviation
:math:`t_j = \tau / \sqrt{S_j}`, :math:`S_j = \sum_i \xi_{ij}^2`. Its density is that of a Laplace plus a Gaussian,

.. math::
    f_t(m) = \tfrac12 e^{t^2 / 2} \big( e^{-m} \Phi(m / t - t) + e^{m} \Phi(-m / t - t) \big).

The chain rule splits the information so that hardly anything is left to chance:

.. math::
    \mathrm{EIG} = I(w; y \mid \sigma) + I(\sigma; y), \qquad
    I(w; y \mid \sigma) = \sum_j \mathbb{E}\big[ H[f_{t_j}] - H[N(0, t_j^2)] \big],

a double integral for each :math:`S_j`, by the trapezoidal rule in logarithms of m and :math:`\sigma`, which converges
geometrically (Trefethen and Weideman 2014, SIAM Review 56); and :math:`I(\sigma; y) = \mathbb{E}[\log p(y \mid \sigma)
- \log p(y)]`, where p(y) is another such integral over :math:`\sigma` and the outcomes are randomised quasi-Monte Carlo
points (A. B. Owen 1997, Annals of Statistics 25). A term of the latter varies by less than a nat, a pointwise term of
the EIG by 21, because :math:`20 \log \sigma` does.

For other designs the likelihood given :math:`\sigma` is a sum of 2^p orthant probabilities, and `exact_eig`
says so; a flow's certificate (`pyro_voed.certify`) bounds their EIG from both sides.

References:
    A. Foster et al. (2020), A unified stochastic gradient approach to designing Bayesian-optimal experiments, section
    6.2. J. Dong et al. (2025), Variational Bayesian optimal experimental design with normalizing flows, section 4.2.
"""

import math
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

NUM_PARAMETERS = 20
NOISE_FLOOR = 1e-6

#: The design whose rows are the unit vectors: each outcome measures one coefficient.
IDENTITY = torch.eye(NUM_PARAMETERS)

#: EIG of `IDENTITY` about w and sigma in nats and its standard error
#: (`exact_eig` with 8,192 outcomes in each of 32 scramblings).
IDENTITY_EIG, IDENTITY_STANDARD_ERROR = 23.0264, 0.0009

# Nodes in log sigma: below the first there is 2e-9 of the prior's mass, above the last 1e-64 of it. The step is this
# share of the standard deviation that log sigma has when the noise itself is seen, which no posterior falls below.
_LOG_SIGMA = (-20.0, 5.0)
_SIGMA_STEP = 0.6
# Nodes in log m, the outcome of a Laplace plus a Gaussian of scale t, run from the first number (relative to t + 1, so
# that the kink of width t is resolved) to `_REACH` scales of either.
_MESSAGE_STEP = 0.05
_REACH = 45.0
# Entries of the largest temporary tensor, 4 MB of doubles: larger ones leave the processor's cache and are slower.
_CHUNK_ENTRIES = 500_000


def regression(initial_design: Float[Tensor, "num_observations num_parameters"] | None = None) -> Callable[[], Tensor]:
    """Make the model, with sites "xi" (design), "w" and "sigma" (targets) and "y" (outcome).

    Nothing keeps the rows of the design at L1 norm one by itself: give `unit_rows` to `optimise_design` as projection.
    The initial design sets the size of the problem; default `IDENTITY`. The papers start at ``torch.randn(20, 20)``.

    Example:
        >>> start = unit_rows({"xi": torch.randn(3, 2)})["xi"]  # three observations of two coefficients
        >>> regression(start)().shape
        torch.Size([3])
    """
    initial = IDENTITY if initial_design is None else initial_design
    if initial.dim() != 2 or 0 in initial.shape:
        raise ValueError(
            f"initial_design: expected a matrix with at least one row and column, got shape {tuple(initial.shape)}."
        )

    def model() -> Tensor:
        xi = pyro.param("xi", lambda: initial.clone())
        zero, one = xi.new_tensor(0.0), xi.new_tensor(1.0)
        w = pyro.sample("w", dist.Laplace(zero, one).expand([xi.shape[-1]]).to_event(1))
        sigma = pyro.sample("sigma", dist.Exponential(one))
        mean = (w.unsqueeze(-2) @ xi.mT).squeeze(-2)
        # The floor, of the original code, keeps a scale drawn as zero in single precision from ending the run.
        return pyro.sample("y", dist.Normal(mean, (sigma + NOISE_FLOOR).unsqueeze(-1)).to_event(1))

    return model


def unit_rows(designs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide every row of the design "xi", not zero, by its L1 norm; a `projection` for `optimise_design`.

    Example:
        >>> unit_rows({"xi": torch.tensor([[3.0, -1.0], [0.0, 2.0]])})["xi"]
        tensor([[ 0.7500, -0.2500],
                [ 0.0000,  1.0000]])
    """
    return {"xi": designs["xi"] / designs["xi"].abs().sum(-1, keepdim=True)}


def exact_eig(
    design: Float[Tensor, "num_observations num_parameters"],
    *,
    num_outcomes: int = 1024,
    num_repeats: int = 8,
    seed: int = 0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute the EIG about w and sigma of a design whose rows each measure one coefficient, in nats.

    Args:
        design: A matrix of at most one entry that is not zero in each row (else NotImplementedError).
        num_outcomes: Quasi-random outcomes in each repeat, a power of two.
        num_repeats: Independent scramblings of the outcomes, at least 2, over which the standard error is taken.
        seed: Seed of the first scrambling; the global random stream is not used.

    Returns:
        The EIG and its standard error, in double precision on the CPU.

    Example:
        >>> eig, standard_error = exact_eig(IDENTITY, num_outcomes=256, num_repeats=4)
        >>> abs(eig.item() - IDENTITY_EIG) < 0.1
        True
    """
    if num_repeats < 2:
        raise ValueError(f"a standard error needs num_repeats of at least 2, got {num_repeats}")
    rows = design.detach().cpu().double()
    if ((rows != 0).sum(-1) > 1).any():
        raise NotImplementedError(
            "exact_eig: the marginal density has a closed form only where every row has at most one entry that is not "
            "zero. For other designs bound the EIG from both sides: certify(eig_flow(...)) or eig_ace and eig_vnmc."
        )
    tau, weights = sigma_nodes(len(rows))
    of_coefficients = (weights * _information(rows, tau)).sum()
    of_scale = torch.stack([_scale_information(rows, num_outcomes, seed + repeat) for repeat in range(num_repeats)])
    return of_coefficients + of_scale.mean(), of_scale.std() / math.sqrt(num_repeats)


def log_density(
    outcomes: Float[Tensor, "*#batch num_observations"],
    design: Float[Tensor, "num_observations num_parameters"],
    tau: Float[Tensor, "*#batch"],
) -> Float[Tensor, "..."]:
    """Compute log p(y given sigma), nats, the coefficients integrated out, where every row measures one coefficient.

    `tau` is the standard deviation of the noise, sigma + `NOISE_FLOOR`.

    Example:
        >>> y = torch.tensor([0.0]).double()
        >>> log_density(y, torch.ones(1, 1).double(), torch.tensor(1e-9).double()).exp()  # a Laplace at its mode
        tensor(0.5000, dtype=torch.float64)
    """
    estimates, residuals, sizes = _statistics(outcomes, design)
    return _log_density(estimates, residuals, sizes, design.shape[-2], tau)


def _statistics(outcomes: Tensor, design: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return least-squares estimates of the coefficients measured, residual sums of squares, and S of each."""
    sizes = design.square().sum(-2)
    measured = design[:, sizes > 0]
    sizes = sizes[sizes > 0]
    estimates = outcomes @ measured / sizes
    return estimates, (outcomes - estimates @ measured.mT).square().sum(-1), sizes


def _log_density(estimates: Tensor, residuals: Tensor, sizes: Tensor, num_rows: int, tau: Tensor) -> Tensor:
    # The rows' Gaussian density is that of the residuals times that of the estimates, which alone depends on w.
    free = num_rows - len(sizes)
    of_residuals = -free * (tau.log() + 0.5 * math.log(2 * math.pi)) - 0.5 * residuals / tau.square()
    scales = tau.unsqueeze(-1) / sizes.sqrt()
    return of_residuals + (log_convolution(estimates, scales) - 0.5 * sizes.log()).sum(-1)


def log_convolution(m: Float[Tensor, "*#batch"], t: Float[Tensor, "*#batch"]) -> Float[Tensor, "..."]:
    """Compute the log density of a standard Laplace plus N(0, t^2): no term overflows, at any m and t."""
    m = m.abs()
    above = torch.special.log_ndtr(m / t - t) - m
    below = torch.special.log_ndtr(-m / t - t) + m
    return 0.5 * t.square() - math.log(2.0) + torch.logaddexp(above, below)


def sigma_nodes(num_rows: int) -> tuple[Float[Tensor, "num_nodes"], Float[Tensor, "num_nodes"]]:
    """Give tau at the nodes of a trapezoidal rule in log sigma, and the prior's weights there, which sum to one."""
    step = _SIGMA_STEP / math.sqrt(2 * max(num_rows, 10))
    log_sigma = torch.arange(*_LOG_SIGMA, step, dtype=torch.double)
    return log_sigma.exp() + NOISE_FLOOR, torch.softmax(log_sigma - log_sigma.exp(), 0)


def _information(rows: Tensor, tau: Float[Tensor, "num_nodes"]) -> Float[Tensor, "num_nodes"]:
    """Compute I(w; y) of all coefficients measured at given noise, nats."""
    sizes = rows.square().sum(0)
    distinct, counts = sizes[sizes > 0].unique(return_counts=True)
    t = tau.unsqueeze(-1) / distinct.sqrt()  # (num_nodes, num_distinct)
    step = torch.arange(-22.0, 1e-9, _MESSAGE_STEP, dtype=torch.double)
    m = _REACH * (1 + t.unsqueeze(-1)) * step.exp()
    log_f = log_convolution(m, t.unsqueeze(-1))
    # Twice the integral over m > 0, in log m.
    entropy = -2.0 * _MESSAGE_STEP * (m * log_f.exp() * log_f).sum(-1)
    return ((entropy - 0.5 * torch.log(2 * math.pi * math.e * t.square())) * counts).sum(-1)


def _scale_information(rows: Tensor, num_outcomes: int, seed: int) -> Float[Tensor, ""]:
    """Estimate I(sigma; y) from one scrambling, nats."""
    num_rows, num_columns = rows.shape
    engine = torch.quasirandom.SobolEngine(1 + num_columns + num_rows, scramble=True, seed=seed)
    # The engine has 30 bits and may return 0 itself: move every point to the middle of its cell.
    uniform = engine.draw(num_outcomes, dtype=torch.double) + 2.0**-31
    tau = NOISE_FLOOR - uniform[:, 0].log()
    centred = uniform[:, 1 : 1 + num_columns] - 0.5
    w = -centred.sign() * torch.log1p(-2 * centred.abs())
    outcomes = w @ rows.mT + tau.unsqueeze(-1) * torch.special.ndtri(uniform[:, 1 + num_columns :])
    estimates, residuals, sizes = _statistics(outcomes, rows)
    own = _log_density(estimates, residuals, sizes, num_rows, tau)
    nodes, weights = sigma_nodes(num_rows)
    terms = []
    size = max(1, _CHUNK_ENTRIES // (len(nodes) * max(1, len(sizes))))
    for m, rest, given in zip(estimates.split(size), residuals.split(size), own.split(size), strict=True):
        given_nodes = _log_density(m.unsqueeze(1), rest.unsqueeze(1), sizes, num_rows, nodes)  # (chunk, num_nodes)
        terms.append(given - torch.logsumexp(given_nodes + weights.log(), -1))
    return torch.cat(terms).mean()

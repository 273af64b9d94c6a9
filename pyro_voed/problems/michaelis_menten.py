r"""Michaelis-Menten kinetics: at which seven substrate concentrations should an enzyme's reaction rate be measured?

.. math::
    \theta \sim N((0.5, 0.5), 0.1^2 I), \quad t = 180\, \theta + 20, \quad
    m_i(\theta) = \frac{(L \xi_i)^s\, t_1}{(L \xi_i)^s + t_2^s}, \quad y_i \sim N(m_i(\theta), 5^2),

with L = 400 and s = 4. The design :math:`\xi \in (0, 1)^7` holds the concentrations in units of L; :math:`t_1` is the
maximal rate and :math:`t_2` the concentration of half that rate.

The exact EIG is :math:`E[\log p(y \mid \theta)] - E[\log p(y)]`. The first term is known; in the second, p(y) is an
integral over the two-dimensional :math:`\theta`, for which the trapezoidal rule converges geometrically once its step
is below the posterior standard deviation (L. N. Trefethen and J. A. C. Weideman 2014, SIAM Review 56), and the
outcomes are randomised quasi-Monte Carlo points (A. B. Owen 1997, Annals of Statistics 25).

References:
    L. Michaelis and M. L. Menten (1913), Biochemische Zeitschrift 49; the exponent s is that of A. V. Hill (1910).
"""

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor

PRIOR_MEAN = 0.5
PRIOR_SCALE = 0.1
NOISE_SCALE = 5.0
CONCENTRATION_SCALE = 400.0
HILL_EXPONENT = 4

#: Designs around one half, the exact EIG in nats and the standard error of that value
#: (`exact_eig` with 16,384 outcomes in each of eight scramblings).
START_DESIGNS = (0.4745, 0.4456, 0.5147, 0.5618, 0.4844, 0.4880, 0.5162)
START_EIG, START_STANDARD_ERROR = 2.4069, 0.0001

#: Designs that joint stochastic gradient ascent on designs and a variational bound arrived at, and their exact EIG.
TUTORIAL_DESIGNS = (0.2885, 0.2667, 0.7111, 0.7969, 0.3647, 0.6234, 0.7139)
TUTORIAL_EIG, TUTORIAL_STANDARD_ERROR = 3.5940, 0.0001

#: The best designs known, to which gradient ascents on the exact EIG come within 0.01 nats from several starts.
BEST_DESIGNS = (0.27, 0.27, 0.27, 0.27, 0.96, 0.96, 0.96)
BEST_EIG, BEST_STANDARD_ERROR = 3.7066, 0.0001

# The grid over the parameters ends this many prior standard deviations from the prior mean; 3e-7 of the mass is beyond.
_GRID_RADIUS = 5.5
# Entries of the largest temporary matrix, 2 MB of doubles: larger ones leave the processor's cache and are slower.
_CHUNK_ENTRIES = 250_000


def michaelis_menten(
    initial_design: Float[Tensor, "num_measurements"] | Sequence[float] | None = None,
) -> Callable[[], Tensor]:
    """Make the model, with sites "xi" (design, in the unit interval), "theta" (target) and "y" (outcome).

    The parameter "xi" starts at `initial_design`, by default seven concentrations of one half.

    Example:
        >>> michaelis_menten()().shape
        torch.Size([7])
    """
    initial = torch.full((7,), 0.5) if initial_design is None else torch.as_tensor(initial_design)

    def model() -> Tensor:
        xi = pyro.param("xi", lambda: initial.clone(), constraint=constraints.unit_interval)
        prior = dist.Normal(xi.new_tensor(PRIOR_MEAN), xi.new_tensor(PRIOR_SCALE))
        theta = pyro.sample("theta", prior.expand([2]).to_event(1))
        return pyro.sample("y", dist.Normal(mean_rate(theta, xi), NOISE_SCALE).to_event(1))

    return model


def mean_rate(
    theta: Float[Tensor, "*#batch 2"], xi: Float[Tensor, "*#batch num_measurements"]
) -> Float[Tensor, "... num_measurements"]:
    """Compute the mean of the measurements, `xi` in units of `CONCENTRATION_SCALE`; batches broadcast.

    Example:
        >>> mean_rate(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.275, 1.0]))
        tensor([  0.0000,  55.0000, 109.3745])
    """
    maximal_rate, half_rate_concentration = (180 * theta + 20).split(1, dim=-1)
    # Neither power over- or underflows in single precision for concentrations of (0, 1) and any plausible theta.
    saturation = (CONCENTRATION_SCALE * xi) ** HILL_EXPONENT
    return saturation * maximal_rate / (saturation + half_rate_concentration**HILL_EXPONENT)


def exact_eig(
    designs: Float[Tensor, "*batch num_measurements"],
    *,
    grid_size: int = 151,
    num_outcomes: int = 4096,
    num_repeats: int = 4,
    seed: int = 0,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Compute the EIG of designs by quadrature, in nats, and its standard error, double precision on the CPU.

    Args:
        designs: concentrations in [0, 1].
        grid_size: points of the quadrature along each of the two parameters. With the default the step is 0.073
            prior standard deviations, the narrowest posteriors being about 0.16 wide; 251 points change the values of
            the designs above by less than 1e-7.
        num_outcomes: quasi-random outcomes in each repeat, a power of two.
        num_repeats: independent scramblings of the outcomes, at least 2, over which the standard error is taken.
        seed: seed of the first scrambling; the global random stream is not used.

    Example:
        >>> eig, standard_error = exact_eig(torch.tensor(START_DESIGNS), grid_size=101, num_outcomes=512)
        >>> abs(eig.item() - START_EIG) < 4 * math.hypot(standard_error.item(), START_STANDARD_ERROR)
        True
    """
    if num_repeats < 2:
        raise ValueError(f"a standard error needs num_repeats of at least 2, got {num_repeats}")
    flat = designs.detach().cpu().double().reshape(-1, designs.shape[-1])
    repeats = torch.stack(
        [
            torch.stack([_eig_of_one_scrambling(xi, grid_size, num_outcomes, seed + k) for k in range(num_repeats)])
            for xi in flat
        ]
    )  # (num_designs, num_repeats)
    eig, standard_error = repeats.mean(-1), repeats.std(-1) / math.sqrt(num_repeats)
    return eig.reshape(designs.shape[:-1]), standard_error.reshape(designs.shape[:-1])


def _eig_of_one_scrambling(
    xi: Float[Tensor, "num_measurements"], grid_size: int, num_outcomes: int, seed: int
) -> Float[Tensor, ""]:
    normals = _normal_points(num_outcomes, 2 + len(xi), seed)
    theta, noise = PRIOR_MEAN + PRIOR_SCALE * normals[:, :2], normals[:, 2:]
    outcomes = mean_rate(theta, xi) / NOISE_SCALE + noise
    nodes, weights = _prior_grid(grid_size)
    # With both in units of the noise, log p(y) is this plus the constant that E[log p(y | theta)] has too.
    log_marginal = _log_mixture(outcomes, mean_rate(nodes, xi) / NOISE_SCALE, weights)
    return -0.5 * len(xi) - log_marginal.mean()


def _prior_grid(grid_size: int) -> tuple[Float[Tensor, "num_nodes 2"], Float[Tensor, "num_nodes"]]:
    """Lay a tensor grid over the prior and keep the disc of it that carries mass; weights sum to one."""
    axis = torch.linspace(-_GRID_RADIUS, _GRID_RADIUS, grid_size, dtype=torch.double)
    standard = torch.cartesian_prod(axis, axis)
    standard = standard[standard.square().sum(-1) <= _GRID_RADIUS**2]
    return PRIOR_MEAN + PRIOR_SCALE * standard, torch.softmax(-0.5 * standard.square().sum(-1), dim=0)


def _normal_points(num_points: int, dim: int, seed: int) -> Float[Tensor, "num_points dim"]:
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    uniform = engine.draw(num_points, dtype=torch.double)
    # The engine has 30 bits and may return 0 itself: move every point to the middle of its cell.
    return torch.special.ndtri(uniform + 2.0**-31)


def _log_mixture(
    outcomes: Float[Tensor, "num_outcomes num_measurements"],
    means: Float[Tensor, "num_nodes num_measurements"],
    weights: Float[Tensor, "num_nodes"],
) -> Float[Tensor, "num_outcomes"]:
    """Compute log sum_j w_j exp(-|y - m_j|^2 / 2) for every outcome y.

    The exponents are never positive and at the generating parameter they are a few units, so that the sum neither
    over- nor underflows in double precision and needs no maximum taken out: one matrix product, one exponential.
    """
    of_nodes = weights.log() - 0.5 * means.square().sum(-1)
    log_sums = []
    for chunk in outcomes.split(max(1, _CHUNK_ENTRIES // len(means))):
        exponents = torch.addmm(of_nodes, chunk, means.mT)  # (chunk, num_nodes)
        exponents -= 0.5 * chunk.square().sum(-1, keepdim=True)
        log_sums.append(exponents.exp_().sum(-1).log())
    return torch.cat(log_sums)

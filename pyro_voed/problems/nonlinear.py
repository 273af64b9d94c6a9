r"""Nonlinear design in low dimensions: three parameters, one design, posteriors with two modes.

.. math::
    y = \theta_1^3 \xi^2 + \theta_2 e^{-|0.2 - \xi|} + |\theta_3| \sqrt{2 \xi} + e, \qquad
    \theta_1, \theta_2 \sim U(0, 1), \quad \theta_3 \sim N(0, 0.5^2), \quad
    e \sim \tfrac12 N(-0.15, 0.05^2) + \tfrac12 N(0.15, 0.05^2),

with the design :math:`\xi \in [0, 1]`. Only the size of :math:`\theta_3` is seen, so its posteriors have two modes; at
:math:`\xi = 0` nothing is learnt of :math:`\theta_1` and :math:`\theta_3`. Most is learnt at :math:`\xi = 1`, yet a
Gaussian family, whose bound is loosest where posteriors are least Gaussian, puts the optimum at :math:`\xi = 0`.

This is a **stand-in** for case 1 of Dong et al. (2025): equation and constants are ours, chosen because those of the
paper were not at hand; what it keeps is three parameters, one design, a mixture of two Gaussians as noise, posteriors
with two modes, and a Gaussian family that misses the optimum. Its forebear has one parameter and is Huan and Marzouk's:

.. math:: y = \theta^3 \xi^2 + \theta e^{-|0.2 - \xi|} + e, \qquad \theta \sim U(0, 1), \quad e \sim N(0, 0.01^2).

In both the noise is independent of the mean, so :math:`\mathrm{EIG} = H[y] - H[e]`, and y is a sum of independent
parts. Its characteristic function is the product of theirs, each a smooth one-dimensional integral (Gauss-Legendre);
Gaussian noise makes it negligible beyond a frequency, so that one discrete Fourier transform inverts it with the error
of rounding (the trapezoidal rule for an analytic, periodic integrand: Trefethen and Weideman 2014, SIAM Review 56).

References:
    J. Dong et al. (2025), Variational Bayesian optimal experimental design with normalizing flows, section 4.1.
    X. Huan and Y. M. Marzouk (2013), Simulation-based optimal Bayesian experimental design for nonlinear systems.
    Journal of Computational Physics 232, section 4.1.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Complex, Float
from pyro.distributions import constraints
from torch import Tensor

THETA3_SCALE = 0.5
NOISE_OFFSET, NOISE_SCALE = 0.15, 0.05
ONE_NOISE_SCALE = 0.01
DEFAULT_DESIGN = 0.5

#: Designs of the tables below.
DESIGNS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

#: EIG of `nonlinear` at `DESIGNS`, nats, by `exact_eig`.
EIG = (1.0084, 1.1964, 1.3296, 1.3426, 1.3637, 1.3935, 1.4324, 1.4805, 1.5372, 1.6013, 1.6714)

#: EIG of `nonlinear_one` at `DESIGNS`, nats, by `exact_eig_one`: a local optimum near 0.2, the global one at 1.
ONE_EIG = (3.0083, 3.1168, 3.2420, 3.1956, 3.1725, 3.1711, 3.1884, 3.2207, 3.2648, 3.3178, 3.3773)

#: Best lower bound of the Gaussian family with full covariance at `DESIGNS`, theta as it is, nats.
GAUSSIAN_BOUND = (0.465, 0.294, 0.279, 0.198, 0.151, 0.124, 0.110, 0.108, 0.113, 0.125, 0.141)

#: The same with the parameters of uniform prior mapped to a normal one.
MAPPED_GAUSSIAN_BOUND = (0.651, 0.535, 0.536, 0.482, 0.453, 0.440, 0.437, 0.441, 0.450, 0.463, 0.479)

_NUM_OUTCOMES = 4096
# The fastest of the oscillating integrands turns 200 times over its range, and a turn takes a little over pi nodes.
_NUM_NODES = 1024
# A Gaussian's characteristic function at this many inverse standard deviations is 1e-17, and its density at as many
# standard deviations from the mean likewise.
_REACH = 8.8


def nonlinear(initial_design: float | Float[Tensor, ""] = DEFAULT_DESIGN) -> Callable[[], Tensor]:
    """Make the model, with sites "d" (design, in the unit interval), "theta1" to "theta3" (targets) and "y" (outcome).

    The constraint maps to the open interval, where `initial_design` lies too; candidate designs (`designs=`) may be 0
    or 1 themselves.

    Example:
        >>> nonlinear()().shape
        torch.Size([])
    """
    initial = _checked_initial(initial_design)

    def model() -> Tensor:
        d = pyro.param("d", lambda: initial.clone(), constraint=constraints.unit_interval)
        zero, one = d.new_tensor(0.0), d.new_tensor(1.0)
        theta1 = pyro.sample("theta1", dist.Uniform(zero, one))
        theta2 = pyro.sample("theta2", dist.Uniform(zero, one))
        theta3 = pyro.sample("theta3", dist.Normal(zero, THETA3_SCALE * one))
        mean = theta1**3 * d**2 + theta2 * torch.exp(-(0.2 - d).abs()) + theta3.abs() * (2 * d).sqrt()
        components = dist.Normal(mean.unsqueeze(-1) + d.new_tensor([-NOISE_OFFSET, NOISE_OFFSET]), NOISE_SCALE)
        # Logits of the shape of the mean: a mixture takes its batch shape from both.
        weights = dist.Categorical(logits=torch.zeros_like(components.loc))
        return pyro.sample("y", dist.MixtureSameFamily(weights, components))

    return model


def nonlinear_one(initial_design: float | Float[Tensor, ""] = DEFAULT_DESIGN) -> Callable[[], Tensor]:
    """Make the model of one parameter, with sites "d" (design), "theta" (target) and "y" (outcome)."""
    initial = _checked_initial(initial_design)

    def model() -> Tensor:
        d = pyro.param("d", lambda: initial.clone(), constraint=constraints.unit_interval)
        theta = pyro.sample("theta", dist.Uniform(d.new_tensor(0.0), d.new_tensor(1.0)))
        return pyro.sample("y", dist.Normal(theta**3 * d**2 + theta * torch.exp(-(0.2 - d).abs()), ONE_NOISE_SCALE))

    return model


def exact_eig(designs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Compute the EIG of `nonlinear` about all parameters at designs in [0, 1], in nats, double precision on the CPU.

    Example:
        >>> exact_eig(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0084, 1.3935, 1.6714], dtype=torch.float64)
    """
    uniform, uniform_weights = _nodes(0.0, 1.0, _NUM_NODES)
    # |theta3| has the density of a normal folded over; beyond the reach there is no mass that double precision sees.
    folded, widths = _nodes(0.0, _REACH, _NUM_NODES)
    folded_weights = widths * math.sqrt(2 / math.pi) * torch.exp(-0.5 * folded**2)

    def eig(d: Tensor) -> Tensor:
        parts = [
            (d**2 * uniform**3, uniform_weights),
            (torch.exp(-(0.2 - d).abs()) * uniform, uniform_weights),
            ((2 * d).sqrt() * THETA3_SCALE * folded, folded_weights),
        ]
        noise = [(torch.tensor([-NOISE_OFFSET, NOISE_OFFSET]).double(), torch.tensor([0.5, 0.5]).double())]
        return _entropy(parts + noise, NOISE_SCALE) - _entropy(noise, NOISE_SCALE)

    return _each(eig, designs)


def exact_eig_one(designs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Compute the EIG of `nonlinear_one` at designs in [0, 1], in nats, double precision on the CPU.

    Example:
        >>> exact_eig_one(torch.tensor([0.2, 1.0]))
        tensor([3.2420, 3.3773], dtype=torch.float64)
    """
    theta, weights = _nodes(0.0, 1.0, _NUM_NODES)
    entropy_of_noise = 0.5 * math.log(2 * math.pi * math.e * ONE_NOISE_SCALE**2)

    def eig(d: Tensor) -> Tensor:
        mean = theta**3 * d**2 + theta * torch.exp(-(0.2 - d).abs())
        return _entropy([(mean, weights)], ONE_NOISE_SCALE) - entropy_of_noise

    return _each(eig, designs)


def _checked_initial(design: float | Tensor) -> Tensor:
    initial = torch.as_tensor(design)
    initial = initial if initial.is_floating_point() else initial.to(torch.get_default_dtype())
    if initial.shape != () or not 0 < initial.item() < 1:
        raise ValueError(
            f"initial_design: expected a number in (0, 1), got {design!r}. At the ends a parameter of the unit "
            "interval has no gradient; give 0 or 1 as candidate designs instead."
        )
    return initial


def _each(eig: Callable[[Tensor], Tensor], designs: Tensor) -> Tensor:
    wide = designs.double().cpu()
    if not ((wide >= 0) & (wide <= 1)).all():
        raise ValueError(f"designs: expected numbers in [0, 1], got values from {wide.min():g} to {wide.max():g}.")
    values = [eig(d) for d in wide.flatten()]
    return torch.stack(values).reshape(wide.shape) if values else wide.clone()


@lru_cache(maxsize=8)
def _legendre(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(num_nodes)


def _nodes(low: float, high: float, num_nodes: int) -> tuple[Float[Tensor, "num_nodes"], Float[Tensor, "num_nodes"]]:
    """Give the nodes and weights of Gauss-Legendre quadrature on an interval."""
    nodes, weights = (torch.tensor(part, dtype=torch.double) for part in _legendre(num_nodes))
    return low + 0.5 * (high - low) * (nodes + 1), 0.5 * (high - low) * weights


def _characteristic(
    values: Float[Tensor, "num_nodes"], weights: Float[Tensor, "num_nodes"], frequencies: Float[Tensor, "num"]
) -> Complex[Tensor, "num"]:
    phases = frequencies.unsqueeze(-1) * values
    return torch.complex(phases.cos() @ weights, phases.sin() @ weights)


def _entropy(parts: list[tuple[Tensor, Tensor]], scale: float) -> Float[Tensor, ""]:
    """Compute the entropy of Gaussian noise plus independent parts, each given by nodes and weights, in nats."""
    low = torch.stack([values.min() for values, _ in parts]).sum() - _REACH * scale
    length = torch.stack([values.max() for values, _ in parts]).sum() + _REACH * scale - low
    frequencies = torch.arange(0.0, _REACH / scale, 2 * math.pi / length.item(), dtype=torch.double)
    transform = torch.exp(-0.5 * (scale * frequencies) ** 2).to(torch.complex128)
    for values, weights in parts:
        transform = transform * _characteristic(values, weights, frequencies)
    # p(low + k length / n) = (1 / length) sum_m transform(t_m) exp(-i t_m y): a sum over both signs of m, real.
    shifted = (transform * torch.exp(-1j * frequencies * low)).conj()
    density = torch.fft.irfft(shifted, n=_NUM_OUTCOMES, norm="forward") / length
    # In the tails rounding leaves densities of 1e-16 of either sign, whose share of the entropy is as small.
    return torch.special.entr(density.clamp_min(0)).sum() * length / _NUM_OUTCOMES

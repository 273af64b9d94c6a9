r"""Electrocoating: at which current should a coating bath be run to learn when, and how fast, the film grows?

A car body is the cathode of a bath from which a current deposits an insulating film. Laplace's equation for the
potential is coupled to the film's growth, which starts once both the charge and the current density exceed a minimum;
`electrocoating_solver` has the equations. Targets are

.. math::
    C_v \sim N(50, 10^2) \text{ on } [20, 80]\ \mathrm{mm^3/C}, \quad
    j_{\min} \sim N(1.5, 0.4^2) \text{ on } [0.5, 2.5]\ \mathrm{A/m^2}, \quad
    Q_{\min} \sim N(100, 25^2) \text{ on } [40, 160]\ \mathrm{C/m^2},

each a normal cut off at the bounds. The current is measured at regular times up to :math:`T(\xi)`, with relative noise,

.. math:: y_k \sim N(i_k, (0.03\, i_k)^2), \qquad t_k = k\, T(\xi) / K, \qquad T(\xi) = 18\ \mathrm{C} / \xi,

where the design :math:`\xi` is the prescribed current: a lower current lets the film grow more slowly and is followed
for longer. Three currents are candidates.

This is a **stand-in** for case 3 of Dong et al. (2025). Theirs are the equations, the three targets with truncated
normal priors, a choice among three currents, the regular times and the relative noise. Ours are all constants and
extents, the resistivity's dependence on the current density, a minimum charge that is the same at every current, the
rule for T (so that the current can also be searched for continuously), the combination of the two criteria by "and",
the small width of the switch at :math:`j_{\min}`, and the rectifier's voltage limit. Without that limit the measured
current is the prescribed one, whatever the film does, and the experiment says nothing:
`electrocoating(voltage_limit=None)` has an EIG of exactly 0.

References:
    J. Dong et al. (2025), Variational Bayesian optimal experimental design with normalizing flows, sections 4.3 and
    E.1. C. Jacobsen et al. (2024), arXiv 2401.08414.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor

from pyro_voed.problems.electrocoating_solver import Bath, Deposition, Film, deposit, make_bath

#: Candidate currents, mA.
CURRENTS = (30.0, 50.0, 100.0)
#: Range of the design, mA.
CURRENT_RANGE = (10.0, 200.0)
#: Charge that a constant current would pass in one experiment, C; over the current it is the duration.
TOTAL_CHARGE = 18.0

#: EIG of `CURRENTS` with 10 and with 50 measurements, nats: the middle between nested Monte Carlo from below and above
#: with 20,000 re-used draws; and four standard errors plus half of what the two differ by.
EIG = {10: (2.652, 4.054, 3.774), 50: (3.552, 5.730, 5.624)}
EIG_ERROR = {10: 0.05, 50: 0.09}

#: Location, scale, lower and upper bound of the priors.
EFFICIENCY = (50.0, 10.0, 20.0, 80.0)
MINIMUM_CURRENT = (1.5, 0.4, 0.5, 2.5)
MINIMUM_CHARGE = (100.0, 25.0, 40.0, 160.0)
RELATIVE_NOISE = 0.03

#: Distance of the electrodes, height and depth of the bath, m; conductivity, S/m; covered part of the anode's side.
LENGTH, HEIGHT, DEPTH = 0.3, 0.6, 0.03
CONDUCTIVITY = 0.1
ANODE_COVER = 0.25
#: Largest potential of the anode, V.
VOLTAGE_LIMIT = 150.0
#: Resistivity of film deposited at a small current density, ohm m, and current density that halves it, A/m^2.
RESISTIVITY, RESISTIVITY_CURRENT = 4e6, 20.0
#: Width of the switch at the minimum current density, relative to it.
ONSET_WIDTH = 0.05


class TruncatedNormal(dist.TorchDistribution):
    r"""A normal distribution cut off at two bounds, :math:`N(x; \mu, s^2) / (\Phi(\beta) - \Phi(\alpha))` between them.

    Here :math:`\alpha, \beta` are the bounds in scales from the location; draws go through the inverse of :math:`\Phi`
    and have gradients. The mass between the bounds must not be negligible.

    Example:
        >>> TruncatedNormal(*torch.tensor([0.0, 1.0, -1.0, 1.0])).log_prob(torch.tensor([0.0, 2.0]))
        tensor([-0.5372,    -inf])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.dependent(is_discrete=False, event_dim=0),
        "high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    has_rsample = True

    def __init__(
        self,
        loc: Float[Tensor, "..."],
        scale: Float[Tensor, "..."],
        low: Float[Tensor, "..."],
        high: Float[Tensor, "..."],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.low, self.high = torch.broadcast_tensors(loc, scale, low, high)
        super().__init__(self.loc.shape, validate_args=validate_args)
        if self._validate_args and not bool((self.low < self.high).all()):
            raise ValueError(f"low: expected bounds below high, got {low} and {high}.")

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The interval between the bounds."""
        return constraints.interval(self.low, self.high)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "TruncatedNormal":
        """Repeat the distribution over a batch shape."""
        parts = (part.expand(batch_shape) for part in (self.loc, self.scale, self.low, self.high))
        return TruncatedNormal(*parts, validate_args=self._validate_args)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw by inversion of the distribution function."""
        below, within = self._masses()
        uniform = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        drawn = self.loc + self.scale * torch.special.ndtri(below + within * uniform)
        return torch.maximum(torch.minimum(drawn, self.high), self.low)

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log density; minus infinity beyond the bounds."""
        _, within = self._masses()
        standard = (value - self.loc) / self.scale
        density = -0.5 * standard.square() - 0.5 * math.log(2 * math.pi) - self.scale.log() - within.log()
        return torch.where((value >= self.low) & (value <= self.high), density, -math.inf)

    def _masses(self) -> tuple[Tensor, Tensor]:
        below = torch.special.ndtr((self.low - self.loc) / self.scale)
        return below, torch.special.ndtr((self.high - self.loc) / self.scale) - below


def electrocoating(
    initial_current: float | Float[Tensor, ""] = CURRENTS[0],
    num_times: int = 10,
    *,
    voltage_limit: float | None = VOLTAGE_LIMIT,
    bath: Bath | None = None,
    num_steps: int = 100,
) -> Callable[[], Tensor]:
    """Make the model.

    Sites: "current" (design, mA, in `CURRENT_RANGE`); "efficiency" (mm^3/C), "minimum_current" (A/m^2) and
    "minimum_charge" (C/m^2), the targets; "y" (outcome, measured currents in mA). All constants are stand-ins; the
    candidates are `designs={"current": torch.tensor(CURRENTS)}`.

    Args:
        initial_current: Initial value of the design, mA, inside `CURRENT_RANGE`.
        num_times: Number of measurements; 10 and 50 are those of the literature.
        voltage_limit: Largest potential of the anode, V; with None the outcome does not depend on the targets.
        bath: The bath; default `default_bath()`.
        num_steps: Time steps of the simulation, rounded up to a multiple of `num_times`.

    Example:
        >>> electrocoating(num_times=5)().shape
        torch.Size([5])
    """
    initial = torch.as_tensor(initial_current)
    initial = initial if initial.is_floating_point() else initial.to(torch.get_default_dtype())
    if initial.shape != () or not CURRENT_RANGE[0] < initial.item() < CURRENT_RANGE[1]:
        raise ValueError(f"initial_current: expected a number of mA inside {CURRENT_RANGE}, got {initial_current!r}.")
    for name, number in {"num_times": num_times, "num_steps": num_steps, "voltage_limit": voltage_limit}.items():
        if number is not None and number <= 0:
            raise ValueError(f"{name}: expected a positive number, got {number}.")
    of_bath = default_bath() if bath is None else bath

    def model() -> Tensor:
        current = pyro.param("current", lambda: initial.clone(), constraint=constraints.interval(*CURRENT_RANGE))
        efficiency = pyro.sample("efficiency", TruncatedNormal(*current.new_tensor(EFFICIENCY)))
        minimum_current = pyro.sample("minimum_current", TruncatedNormal(*current.new_tensor(MINIMUM_CURRENT)))
        minimum_charge = pyro.sample("minimum_charge", TruncatedNormal(*current.new_tensor(MINIMUM_CHARGE)))
        coating = simulate(
            torch.stack(torch.broadcast_tensors(efficiency, minimum_current, minimum_charge), -1),
            current,
            num_times=num_times,
            voltage_limit=voltage_limit,
            bath=of_bath,
            num_steps=num_steps,
        )
        mean = 1e3 * coating.current
        return pyro.sample("y", dist.Normal(mean, RELATIVE_NOISE * mean).to_event(1))

    return model


def simulate(
    theta: Float[Tensor, "*#batch 3"],
    current: Float[Tensor, "*#batch"],
    *,
    num_times: int = 10,
    voltage_limit: float | None = VOLTAGE_LIMIT,
    bath: Bath | None = None,
    num_steps: int = 100,
) -> Deposition:
    """Run the bath without noise, with the constants of this module; the rest as in `electrocoating`.

    Args:
        theta: Efficiency, mm^3/C, minimum current density, A/m^2, and minimum charge, C/m^2.
        current: Prescribed current, mA; batches broadcast. Those that come out are in A.

    Example:
        >>> 1e3 * simulate(torch.tensor([50.0, 1.5, 100.0]), torch.tensor(60.0), num_times=6).current
        tensor([60.0000, 57.0883, 38.5830, 30.9617, 27.3371, 25.8592])
    """
    efficiency, minimum_current, minimum_charge = theta.unbind(-1)
    film = Film(1e-9 * efficiency, minimum_current, minimum_charge, RESISTIVITY, RESISTIVITY_CURRENT, ONSET_WIDTH)
    return deposit(
        (default_bath() if bath is None else bath).to(theta),
        film,
        1e-3 * current,
        1e3 * TOTAL_CHARGE / (num_times * current),
        num_times=num_times,
        voltage_limit=voltage_limit,
        steps_per_interval=math.ceil(num_steps / num_times),
    )


def default_bath(num_cells: int = 16, *, equipotential: bool = False) -> Bath:
    """Make the bath of this module's constants, in double precision on the CPU; 4, 8, 12, ... square cells of cathode.

    An equipotential anode has one potential, as a piece of metal does; by default it has, as in the literature's
    equations, one current density.
    """
    return make_bath(
        LENGTH,
        HEIGHT,
        depth=DEPTH,
        conductivity=CONDUCTIVITY,
        anode_cover=ANODE_COVER,
        num_cells=num_cells,
        num_columns=max(1, round(num_cells * LENGTH / HEIGHT)),
        equipotential=equipotential,
    )


def exact_uniform_current(
    times: Float[Tensor, "num_times"], bath: Bath, film: Film, current: float, voltage_limit: float
) -> Float[Tensor, "num_times"]:
    r"""Compute the current, A, where the anode covers its side, so that nothing varies along the cathode.

    With :math:`X = R + L / \sigma` the film grows at the prescribed current until :math:`X = V / j`, linearly in time;
    from then on :math:`(X + V / j_\rho)^2` does, with the slope :math:`2 C_v \rho_0 V`. Of the bath only extents and
    conductivity are used; the minimum current density counts as exceeded at all times.

    Example:
        >>> bath = make_bath(0.2, 0.1, depth=0.05, conductivity=0.1)
        >>> film = Film(*torch.tensor([5e-8, 0.5, 100.0]).double(), 4e6, 20.0, 0.05)
        >>> exact_uniform_current(torch.tensor([20.0, 40.0, 60.0, 80.0]).double(), bath, film, 0.05, 150.0)
        tensor([0.0489, 0.0221, 0.0161, 0.0132], dtype=torch.float64)
    """
    area, of_bath = bath.height * bath.depth, bath.length / bath.conductivity
    density = min(current / area, voltage_limit / of_bath)
    of_resistivity = voltage_limit / film.resistivity_current
    rate = film.efficiency * film.resistivity * density / (1 + density / film.resistivity_current)
    at_limit = voltage_limit / density
    limited = (times - film.minimum_charge / density - (at_limit - of_bath) / rate).clamp(0)
    square = (at_limit + of_resistivity) ** 2 + 2 * film.efficiency * film.resistivity * voltage_limit * limited
    return area * voltage_limit / (square.sqrt() - of_resistivity)

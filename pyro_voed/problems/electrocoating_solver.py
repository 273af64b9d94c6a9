r"""Finite volumes for an electrocoating bath: potential, film growth and current over time, batched and differentiable.

The bath is a rectangle :math:`(0, L) \times (0, H)`. The cathode, on which the film grows, is the whole side
:math:`x = 0`; the anode is the part :math:`y < a H` of the side :math:`x = L`; every other wall insulates. With the
potential :math:`\phi`, current densities :math:`j` into the cathode and :math:`g` out of the anode, and a film of
resistance :math:`R` (ohm m^2) and thickness :math:`h`,

.. math::
    \nabla \cdot (\sigma \nabla \phi) = 0, \qquad
    \phi = R j \ \text{(cathode)}, \qquad
    g = g_0 \ \text{(anode)}, \qquad
    \dot h = C_v\, j\, s(j)\, [Q \ge Q_{\min}], \quad \dot R = \rho(j)\, \dot h, \quad \dot Q = j,

    s(j) = \mathrm{sigmoid}\Bigl(\frac{j - j_{\min}}{w\, j_{\min}}\Bigr), \qquad
    \rho(j) = \frac{\rho_0}{1 + j / j_\rho}.

**Space.** On cells of :math:`\Delta x \times \Delta y` the five-point scheme with half cells at the walls is solved
exactly: a cosine transform along y leaves for each mode k a difference equation with constant coefficients, whose
solutions grow by :math:`e^{\pm q_k}` from cell to cell, where for n cells along y

.. math:: \sinh(q_k / 2) = (\Delta x / \Delta y) \sin(\pi k / 2 n).

With :math:`\kappa_k = (2 \sigma / \Delta x) \tanh(q_k / 2)` and :math:`\ell_k = n_x q_k` the potentials p on the film
and u on the opposite side obey, mode by mode,

.. math::
    j = g / \cosh \ell_k - \kappa_k \tanh(\ell_k)\, p, \qquad u = p / \cosh \ell_k + \tanh(\ell_k)\, g / \kappa_k .

So the geometry enters through one symmetric matrix S (the Schur complement on the cathode), and with :math:`p = R j` a
batch of films costs one dense system of n unknowns each, :math:`(I + S\, \mathrm{diag} R)\, j = f i`, where i is the
total current and f how it would arrive at a bare cathode. By reciprocity the anode's potential is
:math:`f \cdot R j + r i`, its mean where the current density is what is prescribed there. The error in space is of
second order where the boundary data are smooth.

**Time.** Heun's method, of second order where rates are smooth. Charge grows monotonically in each cell, so the part
of a step after :math:`Q_{\min}` is found by linear interpolation: currents depend continuously on all parameters, and
the derivative with respect to :math:`Q_{\min}` exists. As the film's edge moves along the cathode several cells may
start within one step; the order is then lower. Where a rectifier limits the voltage to V, the total current is
:math:`i = \min(i_0, V / Z)`, with Z the anode's potential for a unit current.

References:
    C. Jacobsen, J. Dong, M. Khalloufi, X. Huan, K. Duraisamy, M. Akram and W. Liu (2024), arXiv 2401.08414, for the
    model; B. L. Buzbee, G. H. Golub and C. W. Nielson (1970), SIAM Journal on Numerical Analysis 7, for the transform.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

Cells = Float[Tensor, "*batch cells"]
Layer = Float[Tensor, "3 *batch cells"]
Modes = Float[Tensor, "modes"]


@dataclass(frozen=True)
class Bath:
    """A bath as its electrodes see it, SI units; made by `make_bath`.

    Attributes:
        length: Distance of the electrodes.
        height: Height of the cathode.
        depth: Extent of the bath across the plane.
        coupling: The matrix S, current densities drawn back by cathode potentials, S/m^2.
        feed: Share of the current that arrives in each cell of a bare cathode; sums to one.
        resistance: Potential of the anode over a bare cathode per current density in one cell, ohm m^2.
        anode: Share of the current that leaves each cell of the opposite side, before the cathode's reaction.
    """

    length: float
    height: float
    depth: float
    conductivity: float
    num_columns: int
    coupling: Float[Tensor, "cells cells"]
    feed: Float[Tensor, "cells"]
    resistance: Float[Tensor, ""]
    anode: Float[Tensor, "cells"]

    @property
    def num_cells(self) -> int:
        """Cells along the cathode."""
        return len(self.feed)

    @property
    def cell_area(self) -> float:
        """Area of the cathode in one cell, m^2."""
        return self.depth * self.height / self.num_cells

    def to(self, like: Float[Tensor, "..."]) -> "Bath":
        """Move to the dtype and the device of a tensor."""
        parts = ("coupling", "feed", "resistance", "anode")
        return replace(self, **{name: getattr(self, name).to(like) for name in parts})


@dataclass(frozen=True)
class Film:
    """What decides how the film grows, SI units.

    Attributes:
        efficiency: Volumetric coulombic efficiency C_v.
        minimum_current: Current density below which nothing is deposited.
        minimum_charge: Charge per area below which nothing is deposited.
        resistivity: Resistivity of a film deposited at a small current density.
        resistivity_current: Current density that deposits a film of half that resistivity.
        onset_width: Width of the switch at the minimum current density, relative to it.
    """

    efficiency: Float[Tensor, "..."]
    minimum_current: Float[Tensor, "..."]
    minimum_charge: Float[Tensor, "..."]
    resistivity: float
    resistivity_current: float
    onset_width: float


@dataclass(frozen=True)
class Deposition:
    """Total current and the anode's potential at the measurement times, and the film in the end; charge is per area."""

    current: Float[Tensor, "*batch num_times"]
    voltage: Float[Tensor, "*batch num_times"]
    thickness: Cells
    film_resistance: Cells
    charge: Cells


def make_bath(
    length: float,
    height: float,
    *,
    depth: float,
    conductivity: float,
    anode_cover: float = 1.0,
    num_cells: int = 16,
    num_columns: int = 32,
    equipotential: bool = False,
) -> Bath:
    """Reduce a bath to its electrodes, once for all films and currents, in double precision on the CPU.

    The anode covers the part `anode_cover`, in (0, 1] and a whole number of cells, of the side opposite the cathode; it
    is equipotential, or has one current density.
    """
    sizes = {"length": length, "height": height, "depth": depth, "conductivity": conductivity}
    for name, size in {**sizes, "num_cells": num_cells, "num_columns": num_columns}.items():
        if not size > 0:
            raise ValueError(f"{name}: expected a positive number, got {size}.")
    covered = round(anode_cover * num_cells)
    if not (1 <= covered <= num_cells and math.isclose(covered, anode_cover * num_cells, rel_tol=1e-9)):
        raise ValueError(f"anode_cover: expected a whole number of {num_cells} cells, got {anode_cover * num_cells:g}.")
    cosines, sech, reaction, impedance = _modes(length, height, conductivity, num_cells, num_columns)
    transfer = (cosines * sech) @ cosines.mT
    coupling = (cosines * reaction) @ cosines.mT
    anode = torch.zeros(num_cells, dtype=torch.double)
    anode[:covered] = 1.0 / covered
    of_anode = (cosines * impedance) @ cosines.mT
    if equipotential:
        inverse = torch.linalg.inv(of_anode[:covered, :covered])
        anode[:covered] = inverse.sum(-1) / inverse.sum()
        # Currents that p drives between parts of the anode, none in total, so that its potential stays one.
        within = inverse - torch.outer(inverse.sum(-1), inverse.sum(-1)) / inverse.sum()
        coupling = coupling + transfer[:, :covered] @ within @ transfer[:covered]
    resistance = anode @ of_anode @ anode
    return Bath(length, height, depth, conductivity, num_columns, coupling, transfer @ anode, resistance, anode)


def respond(bath: Bath, film_resistance: Cells) -> tuple[Cells, Float[Tensor, "*batch"]]:
    """Distribute a unit current over a coated cathode of given film resistances, ohm m^2.

    Returns:
        Current densities for a total current of 1 A, A/m^2, which times the cell's area sum to one; and the anode's
        potential, V.

    Example:
        >>> bath = make_bath(0.2, 0.1, depth=0.05, conductivity=0.1, num_cells=4)
        >>> respond(bath, torch.tensor([0.0, 1.0, 1.0, 0.0]).double())  # 400 ohm of bath and up to 200 ohm of film
        (tensor([347.1632,  52.8368,  52.8368, 347.1632], dtype=torch.float64), tensor(426.4184, dtype=torch.float64))
    """
    _check_cells(bath, film_resistance=film_resistance)
    identity = torch.eye(bath.num_cells, dtype=bath.feed.dtype, device=bath.feed.device)
    system = identity + bath.coupling * film_resistance.unsqueeze(-2)
    shares = torch.linalg.solve(system, bath.feed.expand(film_resistance.shape))
    potential = (bath.feed * film_resistance * shares).sum(-1) + bath.resistance
    return shares / bath.cell_area, potential / bath.cell_area


def deposit(
    bath: Bath,
    film: Film,
    current: Float[Tensor, "..."],
    interval: Float[Tensor, "..."],
    *,
    num_times: int = 10,
    voltage_limit: float | None = None,
    steps_per_interval: int = 10,
) -> Deposition:
    """Coat a bare cathode at a prescribed current, A, and measure every `interval` seconds.

    The film's tensors broadcast with `current` and `interval`. Without a voltage limit, V, the current is the
    prescribed one at all times.
    """
    numbers = {"num_times": num_times, "steps_per_interval": steps_per_interval, "voltage_limit": voltage_limit}
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name}: expected a positive number, got {number}.")
    terms = (film.efficiency, film.minimum_current, film.minimum_charge, current, interval)
    efficiency, minimum_current, minimum_charge, current, interval = torch.broadcast_tensors(*terms)
    own = {"efficiency": efficiency, "minimum_current": minimum_current, "minimum_charge": minimum_charge}
    film = replace(film, **{name: value.unsqueeze(-1) for name, value in own.items()})
    step = (interval / steps_per_interval).unsqueeze(-1)
    # Thickness, film resistance and charge of every cell.
    layer = step.new_zeros(3, *current.shape, bath.num_cells)

    def flow(layer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        densities, impedance = respond(bath, layer[1])
        total = current if voltage_limit is None else torch.minimum(current, voltage_limit / impedance)
        return total.unsqueeze(-1) * densities, total, total * impedance

    currents, voltages = [], []
    density, total, voltage = flow(layer)
    for _ in range(num_times):
        for _ in range(steps_per_interval):
            # Heun's method: an Euler step, then one with the average of the rates at both ends.
            later, _, _ = flow(_grow(film, layer, step, _rates(film, density)))
            layer = _grow(film, layer, step, 0.5 * (_rates(film, density) + _rates(film, later)))
            density, total, voltage = flow(layer)
        currents.append(total)
        voltages.append(voltage)
    return Deposition(torch.stack(currents, -1), torch.stack(voltages, -1), *layer)


def potential(bath: Bath, surface_potential: Cells, anode_density: Cells) -> Float[Tensor, "*batch columns cells"]:
    """Compute the potential in the bath, V, at the centres of the cells from cathode to anode.

    It follows from the potential on the bath's side of the film, V, and the current density out of the opposite side,
    A/m^2, zero off the anode.

    Example:
        >>> bath = make_bath(0.2, 0.1, depth=0.05, conductivity=0.1, num_cells=4, num_columns=2)
        >>> potential(bath, torch.ones(4).double(), torch.full((4,), 10.0).double())[:, 0]  # 1 V + x * 10 / 0.1
        tensor([ 6., 16.], dtype=torch.float64)
    """
    _check_cells(bath, surface_potential=surface_potential, anode_density=anode_density)
    growth, admittance = _growth(bath.length, bath.height, bath.conductivity, bath.num_cells, bath.num_columns)
    place = torch.arange(bath.num_columns, dtype=torch.double).unsqueeze(-1) + 0.5
    from_cathode, total = place * growth[1:], bath.num_columns * growth[1:]
    scale = (1 + torch.exp(-2 * total)) * torch.cosh(0.5 * growth[1:])
    of_potential = (torch.exp(-from_cathode) + torch.exp(from_cathode - 2 * total)) / scale
    of_density = (torch.exp(from_cathode - total) - torch.exp(-from_cathode - total)) / (scale * admittance[1:])
    # The uniform mode is the limit of no growth: a straight line.
    of_potential = torch.cat([torch.ones_like(place), of_potential], -1)
    of_density = torch.cat([place * bath.length / bath.num_columns / bath.conductivity, of_density], -1)
    cosines, of_potential, of_density = (t.to(bath.feed) for t in (_cosines(bath.num_cells), of_potential, of_density))
    modes = of_potential * (surface_potential @ cosines).unsqueeze(-2)
    return (modes + of_density * (anode_density @ cosines).unsqueeze(-2)) @ cosines.mT


def _check_cells(bath: Bath, **values: Tensor) -> None:
    for name, value in values.items():
        if value.shape[-1] != bath.num_cells:
            raise ValueError(f"{name}: expected {bath.num_cells} cells in the last dimension, got {value.shape[-1]}.")


def _rates(film: Film, density: Cells) -> Layer:
    """Rates of thickness and film resistance, once the charge suffices, and of charge, per second."""
    switch = torch.sigmoid((density / film.minimum_current - 1) / film.onset_width)
    thickness = film.efficiency * density * switch
    return torch.stack([thickness, thickness * film.resistivity / (1 + density / film.resistivity_current), density])


def _grow(film: Film, layer: Layer, step: Float[Tensor, "*batch 1"], rates: Layer) -> Layer:
    """Advance thickness, film resistance and charge, the first two in the part of the step after onset only."""
    passed = step * rates[2]
    after_onset = ((layer[2] + passed - film.minimum_charge) / passed).clamp(0, 1)
    return layer + torch.stack([step * after_onset * rates[0], step * after_onset * rates[1], passed])


def _cosines(num_cells: int) -> Float[Tensor, "cells modes"]:
    """Orthonormal cosine transform; its columns are the eigenvectors of the second difference with insulating ends."""
    places, modes = torch.arange(num_cells, dtype=torch.double) + 0.5, torch.arange(num_cells, dtype=torch.double)
    cosines = torch.cos(math.pi / num_cells * torch.outer(places, modes)) * math.sqrt(2 / num_cells)
    cosines[:, 0] = 1 / math.sqrt(num_cells)
    return cosines


def _growth(length: float, height: float, conductivity: float, num_cells: int, num_columns: int) -> tuple[Modes, Modes]:
    """Logarithmic growth q of each mode from cell to cell, and its admittance, S/m^2."""
    width = length / num_columns
    angles = 0.5 * math.pi / num_cells * torch.arange(num_cells, dtype=torch.double)
    growth = 2 * torch.asinh(width * num_cells / height * torch.sin(angles))
    return growth, 2 * conductivity / width * torch.tanh(0.5 * growth)


def _modes(
    length: float, height: float, conductivity: float, num_cells: int, num_columns: int
) -> tuple[Float[Tensor, "cells modes"], Modes, Modes, Modes]:
    """Cosines, and per mode: transfer 1 / cosh, reaction of the cathode (S/m^2), impedance of the anode (ohm m^2)."""
    growth, admittance = _growth(length, height, conductivity, num_cells, num_columns)
    total = num_columns * growth
    impedance = torch.tanh(total) / admittance
    impedance[0] = length / conductivity  # the limit of no growth, in the uniform mode
    return _cosines(num_cells), 1 / torch.cosh(total), admittance * torch.tanh(total), impedance

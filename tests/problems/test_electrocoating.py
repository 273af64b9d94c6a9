"""Electrocoating: the solver against closed forms and an assembled five-point matrix, and the model in the library."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import kstest, truncnorm

from pyro_voed import eig_nmc, eig_pce
from pyro_voed.problems import electrocoating as ec
from pyro_voed.problems.electrocoating_solver import Film, deposit, make_bath, potential, respond

BOTH = pytest.mark.parametrize("equipotential", [False, True])
LENGTH, HEIGHT, DEPTH, CONDUCTIVITY = 0.2, 0.3, 0.05, 0.1
Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""


def small_bath(num_cells=8, num_columns=None, **options):
    columns = num_columns or num_cells
    return make_bath(
        LENGTH, HEIGHT, depth=DEPTH, conductivity=CONDUCTIVITY, num_cells=num_cells, num_columns=columns, **options
    )


def make_film(efficiency=5e-8, minimum_current=0.5, minimum_charge=100.0, resistivity_current=20.0):
    tensors = (torch.as_tensor(value).double() for value in (efficiency, minimum_current, minimum_charge))
    return Film(*tensors, resistivity=4e6, resistivity_current=resistivity_current, onset_width=0.05)


def coat(bath, film, current=0.1, interval=24.0, **options):
    current, interval = torch.tensor([current, interval], dtype=torch.double)
    return deposit(bath, film, current, interval, **options)


def prior_draws(num_samples):
    """Packed targets, `(num_samples, 3)`."""
    sites, size = (ec.EFFICIENCY, ec.MINIMUM_CURRENT, ec.MINIMUM_CHARGE), torch.Size([num_samples])
    return torch.stack([ec.TruncatedNormal(*torch.tensor(site)).sample(size) for site in sites], -1)


def order(errors):
    """Order of convergence between the two finest of halved widths."""
    return math.log2(errors[-2] / errors[-1])


# Potential in the bath


def assembled_response(bath, film_resistance, covered, equipotential):
    """Current densities and the anode's potential for a unit current, by a dense five-point matrix for all cells."""
    n, m = bath.num_cells, bath.num_columns
    dx, dy, sigma = bath.length / m, bath.height / n, bath.conductivity
    size = m * n + 1  # the last unknown is the potential of the anode, if it has one
    matrix, right = torch.zeros(size, size).double(), torch.zeros(size).double()
    for i in range(m):
        for k in range(n):
            row = i * n + k
            along, across = sigma * dy / dx, sigma * dx / dy
            beside = (i + 1 < m, row + n, along), (i > 0, row - n, along)
            for there, other, conductance in (*beside, (k + 1 < n, row + 1, across), (k > 0, row - 1, across)):
                if there:
                    matrix[row, row] += conductance
                    matrix[row, other] -= conductance
            if i == 0:
                matrix[row, row] += dy / (film_resistance[k] + dx / (2 * sigma))
            if i == m - 1 and k < covered and equipotential:
                conductance = 2 * sigma * dy / dx
                matrix[row, row] += conductance
                matrix[row, -1] -= conductance
                matrix[-1, row] -= conductance
                matrix[-1, -1] += conductance
            elif i == m - 1 and k < covered:
                right[row] = 1 / (bath.depth * covered)
    if equipotential:
        right[-1] = 1 / bath.depth
    else:
        matrix[-1, -1] = 1.0
    phi = torch.linalg.solve(matrix, right)
    density = phi[:n] / (film_resistance + dx / (2 * sigma))
    beside = phi[(m - 1) * n : (m - 1) * n + covered]
    surface = phi[-1] if equipotential else (beside + right[(m - 1) * n] / dy * dx / (2 * sigma)).mean()
    return density, surface, phi[:-1].reshape(m, n)


@pytest.mark.parametrize("covered", [2, 8])
@BOTH
def test_the_reduced_bath_is_the_five_point_scheme(covered, equipotential):
    bath = small_bath(8, 6, anode_cover=covered / 8, equipotential=equipotential)
    resistance = torch.linspace(0.0, 30.0, 8).double() ** 1.5
    density, voltage, phi = assembled_response(bath, resistance, covered, equipotential)
    torch.testing.assert_close(respond(bath, resistance), (density, voltage), rtol=1e-10, atol=0)
    if not equipotential:
        anode_density = bath.anode / bath.cell_area
        torch.testing.assert_close(potential(bath, resistance * density, anode_density), phi, rtol=1e-10, atol=0)


def smooth_errors(num_cells):
    """Errors in current density, voltage and potential for a film with which the potential is a known harmonic sum.

    Modes cos(k y) cosh(k (L - x)) / cosh(k L) carry nothing through the anode's side, so its density stays uniform.
    """
    bath, total = small_bath(num_cells), 0.06
    slope = total / (DEPTH * HEIGHT * CONDUCTIVITY)
    y = (torch.arange(num_cells).double() + 0.5) * HEIGHT / num_cells
    x = (torch.arange(num_cells).double().unsqueeze(-1) + 0.5) * LENGTH / num_cells
    phi, surface, density = 20.0 + slope * x, torch.full_like(y, 20.0), torch.full_like(y, CONDUCTIVITY * slope)
    voltage = 20.0 + slope * LENGTH
    for number, size in ((1, 2.0), (2, -1.0)):
        k = math.pi * number / HEIGHT
        phi = phi + size * torch.cos(k * y) * torch.cosh(k * (LENGTH - x)) / math.cosh(k * LENGTH)
        surface = surface + size * torch.cos(k * y)
        density = density - CONDUCTIVITY * k * size * math.tanh(k * LENGTH) * torch.cos(k * y)
    resistance = surface / density
    assert resistance.min() > 0
    per_current, of_anode = respond(bath, resistance)
    found = total * per_current
    field = potential(bath, resistance * found, total * bath.anode / bath.cell_area)
    return (
        (found - density).abs().max().item(),
        abs(total * of_anode.item() - voltage),
        (field - phi).abs().max().item(),
    )


def test_space_converges_with_second_order():
    errors = zip(*(smooth_errors(num_cells) for num_cells in (16, 32, 64)), strict=True)
    assert [order(column) for column in errors] == pytest.approx([2.0] * 3, abs=0.2)


@BOTH
def test_currents_are_conserved_and_positive(equipotential):
    bath = small_bath(16, anode_cover=0.25, equipotential=equipotential)
    resistance = 100 * torch.rand(50, 16).double() ** 4
    density, voltage = respond(bath, resistance)
    torch.testing.assert_close(density.sum(-1) * bath.cell_area, torch.ones(50).double())
    assert (density > 0).all()
    # Power: what leaves the anode is spent in the film and the bath; one potential of the anode costs the least.
    assert (voltage > (resistance * density**2).sum(-1) * bath.cell_area).all()
    if equipotential:
        assert (voltage < respond(small_bath(16, anode_cover=0.25), resistance)[1]).all()


# Growth of the film


@BOTH
def test_a_uniform_bath_follows_its_closed_form(equipotential):
    bath = small_bath(4, anode_cover=1.0, equipotential=equipotential)
    times, film = 24.0 * torch.arange(1, 7).double(), make_film(minimum_current=0.01)
    for current, limit in ((0.1, 100.0), (0.2, 100.0), (0.1, 10.0)):
        expected = ec.exact_uniform_current(times, bath, film, current, limit)
        found = coat(bath, film, current, num_times=6, voltage_limit=limit, steps_per_interval=50)
        torch.testing.assert_close(found.current, expected, rtol=2e-3, atol=0)
        assert (found.voltage <= limit * (1 + 1e-12)).all()


def test_time_converges_with_second_order_where_the_film_grows_all_along():
    # The switch at the minimum current density takes part; without it Heun's error of second order happens to vanish.
    bath, film = small_bath(4, anode_cover=0.25), make_film(minimum_current=1.0, minimum_charge=0.0)

    def current(steps):
        return coat(bath, film, 1.0, num_times=2, voltage_limit=20.0, steps_per_interval=steps).current

    finest = current(320)
    errors = [(current(steps) - finest).abs().max() for steps in (20, 40)]
    assert order(errors) == pytest.approx(2.0, abs=0.2)


def test_nothing_is_deposited_below_either_minimum():
    bath = small_bath(anode_cover=0.25)
    for minimum, thickness in (({"minimum_charge": 1e5}, 0.0), ({"minimum_current": 200.0}, 1e-12)):
        coating = coat(bath, make_film(**minimum), voltage_limit=100.0)
        assert (coating.thickness <= thickness).all()
        torch.testing.assert_close(coating.current, torch.full((10,), 0.1).double())


def test_thickness_and_charge_balance():
    bath = small_bath(anode_cover=0.25)
    coating = coat(bath, make_film(resistivity_current=math.inf))
    torch.testing.assert_close(coating.film_resistance, 4e6 * coating.thickness)
    assert coating.charge.sum().item() * bath.cell_area == pytest.approx(0.1 * 240, rel=1e-12)
    above = (coating.charge - 100.0).clamp(0)
    assert (coating.thickness <= 5e-8 * above * (1 + 1e-3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_agree_with_their_members(dtype):
    theta = prior_draws(6)
    theta, currents = theta.reshape(2, 3, 3).to(dtype), torch.tensor([[40.0], [90.0]], dtype=dtype)
    batch = ec.simulate(theta, currents)
    assert batch.current.shape == (2, 3, 10)
    assert batch.current.dtype == batch.thickness.dtype == dtype
    for i, k in itertools.product(range(2), range(3)):
        single = ec.simulate(theta[i, k], currents[i, 0])
        torch.testing.assert_close(single.current, batch.current[i, k], rtol=1e-4, atol=0)
        torch.testing.assert_close(single.thickness, batch.thickness[i, k], rtol=1e-3, atol=0)


def test_single_precision_suffices():
    theta, design = prior_draws(50), torch.tensor(50.0)
    single, double = ec.simulate(theta, design), ec.simulate(theta.double(), design.double())
    torch.testing.assert_close(single.current.double(), double.current, rtol=1e-3, atol=0)


def test_tensors_stay_on_their_device():
    # On the meta device nothing is computed, but a tensor of another device among the operands is an error.
    coating = ec.simulate(torch.ones(5, 3, device="meta"), torch.ones((), device="meta"), num_steps=20)
    assert coating.current.shape == (5, 10)
    assert {part.device.type for part in vars(coating).values()} == {"meta"}


@BOTH
def test_gradients_are_those_of_finite_differences(equipotential):
    bath = ec.default_bath(8, equipotential=equipotential)

    def currents(efficiency, minimum_current, minimum_charge, current):
        theta = torch.stack([efficiency, minimum_current, minimum_charge])
        coating = ec.simulate(theta, current, num_times=5, bath=bath, num_steps=40)
        return 1e3 * coating.current

    point = [torch.tensor(value).double().requires_grad_() for value in (47.0, 1.4, 93.0, 52.0)]
    assert torch.autograd.gradcheck(currents, point, eps=1e-5, atol=1e-5, rtol=1e-4)
    # Every parameter and the design matter, the onset criteria included.
    slopes = torch.autograd.grad(currents(*point).square().sum(), point)
    assert all(slope.abs() > 1e-3 for slope in slopes)


@pytest.mark.slow
@pytest.mark.parametrize("current", ec.CURRENTS)
def test_cells_and_steps_of_the_model_suffice(current):
    theta = prior_draws(40).double()
    design = torch.tensor(current).double()

    def error(num_cells, num_steps, reference):
        coating = ec.simulate(theta, design, bath=ec.default_bath(num_cells), num_steps=num_steps)
        return (coating.current / reference - 1).square().mean().sqrt().item()

    finest = ec.simulate(theta, design, bath=ec.default_bath(16), num_steps=1_600).current
    errors = [error(16, num_steps, finest) for num_steps in (50, 100, 400)]
    assert errors[0] > errors[1] > errors[2]
    # A tenth of the noise.
    assert errors[1] < 0.1 * ec.RELATIVE_NOISE
    assert error(32, 1_600, finest) < 0.1 * ec.RELATIVE_NOISE


# The model


def test_the_truncated_normal_is_scipys():
    loc, scale, low, high = 1.5, 0.4, 0.5, 1.6
    ours = ec.TruncatedNormal(*torch.tensor([loc, scale, low, high]).double())
    theirs = truncnorm((low - loc) / scale, (high - loc) / scale, loc=loc, scale=scale)
    values = torch.linspace(0.4, 1.7, 20).double()
    torch.testing.assert_close(ours.log_prob(values), torch.as_tensor(theirs.logpdf(values.numpy())))
    draws = ours.sample(torch.Size([5_000]))
    assert bool(ours.support.check(draws).all())
    assert kstest(draws.numpy(), theirs.cdf).pvalue > 1e-6
    assert ours.expand(torch.Size([3, 2])).rsample(torch.Size([4])).shape == (4, 3, 2)


def test_without_a_voltage_limit_there_is_nothing_to_learn():
    coating = ec.simulate(prior_draws(20), torch.tensor(60.0), voltage_limit=None)
    assert (coating.current == coating.current[0, 0]).all()
    assert coating.voltage[:, -1].std() > 10  # the voltage would tell
    with pytest.warns(UserWarning, match="never reaches the outcome"):
        result = eig_nmc(ec.electrocoating(60.0, voltage_limit=None, num_steps=20), "y", num_outer_samples=200, seed=0)
    assert result.eig.item() == pytest.approx(0.0, abs=1e-6)


def check_table(num_times, currents, exact, **options):
    """Nested Monte Carlo from either side encloses the tabulated information."""
    model, designs = ec.electrocoating(num_times=num_times, **options), {"current": torch.tensor(currents)}
    size = 150 if options else 2_000
    lower, upper = (f(model, "y", designs=designs, num_outer_samples=size, seed=1) for f in (eig_pce, eig_nmc))
    assert (lower.eig < torch.tensor(exact) + Z_MAX * lower.standard_error + ec.EIG_ERROR[num_times]).all()
    assert (upper.eig > torch.tensor(exact) - Z_MAX * upper.standard_error - ec.EIG_ERROR[num_times]).all()


def test_nested_monte_carlo_encloses_the_table():
    check_table(10, ec.CURRENTS[:1], ec.EIG[10][:1], num_steps=50)


@pytest.mark.slow
@pytest.mark.parametrize("num_times", [10, 50])
def test_the_candidates_are_as_tabulated(num_times):
    check_table(num_times, ec.CURRENTS, ec.EIG[num_times])


def test_the_candidates_differ_and_the_middle_one_is_best():
    exact = torch.tensor([ec.EIG[10], ec.EIG[50]])
    assert exact.argmax(1).tolist() == [1, 1]
    assert exact.sort().values.diff().min() > 0.1


def test_a_bath_moves_to_another_precision():
    bath = small_bath().to(torch.ones(1))
    assert bath.feed.dtype == bath.coupling.dtype == bath.resistance.dtype == torch.float32
    assert replace(bath, depth=1.0).cell_area == pytest.approx(HEIGHT / 8)

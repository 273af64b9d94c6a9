"""How fast and how accurate the solver of `problems.electrocoating` is, on one thread.

Four tables: solves per second (processor time; one solve is a whole experiment); order in space, for a film with which
the potential is a known smooth function; order in time, where nothing varies along the cathode; and what cells and
steps change in the model's own outcome, relative to many steps, over draws of the targets, beside the noise. With
`--eig` also the information of the candidates, from below and above, by re-used draws.

    python benchmarks/electrocoating.py [--quick] [--eig 4000]
"""

import argparse
import math
import time

import torch

from pyro_voed import eig_nmc, eig_pce
from pyro_voed.problems import electrocoating as ec
from pyro_voed.problems.electrocoating_solver import Film, deposit, make_bath, respond


def draw_targets(num_samples, dtype=torch.double):
    torch.manual_seed(0)
    priors = (ec.EFFICIENCY, ec.MINIMUM_CURRENT, ec.MINIMUM_CHARGE)
    return torch.stack(
        [ec.TruncatedNormal(*torch.tensor(one, dtype=dtype)).sample((num_samples,)) for one in priors], -1
    )


def speed(num_solves, chunk=1_000):
    print("solves per second (16 cells, 100 steps)")
    for dtype in (torch.float32, torch.float64):
        theta, current = draw_targets(num_solves, dtype), torch.tensor(50.0, dtype=dtype)
        for num_times in (10, 50):
            started, wall = time.process_time(), time.perf_counter()
            with torch.no_grad():
                for part in theta.split(chunk):
                    ec.simulate(part, current, num_times=num_times)
            seconds, wall = time.process_time() - started, time.perf_counter() - wall
            print(f"  {dtype!s:14s} {num_times:2d} times: {num_solves / seconds:6.0f} (wall {num_solves / wall:6.0f})")
    theta = draw_targets(min(num_solves, 500)).requires_grad_()
    started = time.process_time()
    ec.simulate(theta, torch.tensor(50.0).double()).current.sum().backward()
    print(f"  with gradient, double: {len(theta) / (time.process_time() - started):6.0f}")


def order_in_space(sizes):
    print("space: largest error of current density, known solution (order)")
    length, height, depth, conductivity, total, before = 0.2, 0.3, 0.05, 0.1, 0.06, None
    k = math.pi / height
    for n in sizes:
        bath = make_bath(length, height, depth=depth, conductivity=conductivity, num_cells=n, num_columns=n)
        y = (torch.arange(n).double() + 0.5) * height / n
        surface = 20.0 + 2.0 * torch.cos(k * y)
        density = total / (depth * height) - conductivity * k * 2.0 * math.tanh(k * length) * torch.cos(k * y)
        error = (total * respond(bath, surface / density)[0] - density).abs().max().item()
        rate = "" if before is None else f"({math.log2(before / error):.2f})"
        print(f"  {n:4d} cells: {error:.2e} {rate}")
        before = error


def order_in_time(sizes):
    print("time: largest error of the current relative to its largest value (order)")
    print(
        "               2-d, growth all along, many steps   1-d, growth all along, exact   1-d, onset and limit, exact"
    )
    plane = make_bath(0.2, 0.3, depth=0.05, conductivity=0.1, anode_cover=0.25, num_cells=16, num_columns=16)
    uniform = make_bath(0.2, 0.3, depth=0.05, conductivity=0.1, num_cells=2, num_columns=2)
    times, interval = 24.0 * torch.arange(1, 7).double(), torch.tensor(24.0).double()
    # Bath, minimum current density and charge, current, voltage limit.
    cases = (plane, 1.0, 0.0, 1.0, 20.0), (uniform, 0.1, 0.0, 1.0, 20.0), (uniform, 0.1, 100.0, 0.1, 100.0)
    before = (math.nan,) * len(cases)
    references = []
    for bath, density, charge, current, limit in cases:
        film = Film(*torch.tensor([5e-8, density, charge]).double(), 4e6, 20.0, 0.05)

        def run(steps, bath=bath, film=film, current=current, limit=limit):
            prescribed = torch.tensor(current).double()
            settings = {"num_times": 6, "voltage_limit": limit, "steps_per_interval": steps}
            return deposit(bath, film, prescribed, interval, **settings).current

        exact = ec.exact_uniform_current(times, bath, film, current, limit)
        references.append((run, run(8 * max(sizes)) if bath is plane else exact))
    for steps in sizes:
        errors = [((run(steps) - exact).abs().max() / exact.max()).item() for run, exact in references]
        rates = [f"{e:.2e} ({math.log2(b / e):5.2f})" for e, b in zip(errors, before, strict=True)]
        print(f"  {steps:4d} steps: " + "   ".join(rates))
        before = errors


def accuracy_of_the_model(num_draws, finest):
    print(
        f"model: root mean square of relative differences from {finest} steps and 16 cells (noise {ec.RELATIVE_NOISE})"
    )
    theta = draw_targets(num_draws)
    for current in ec.CURRENTS:
        design = torch.tensor(current).double()
        reference = ec.simulate(theta, design, num_steps=finest).current

        def error(reference=reference, design=design, cells=16, steps=finest, metal=False):
            bath = ec.default_bath(cells, equipotential=metal)
            found = ec.simulate(theta, design, bath=bath, num_steps=steps).current
            return (found / reference - 1).square().mean().sqrt().item()

        steps = "  ".join(f"{steps}: {error(steps=steps):.5f}" for steps in (50, 100, 200, 400))
        cells = "  ".join(f"{cells}: {error(cells=cells):.5f}" for cells in (8, 32))
        print(f"  {current:5.0f} mA  steps {steps}   cells {cells}   anode of one potential: {error(metal=True):.5f}")


def information(num_samples):
    print(f"information of the candidates, nats, {num_samples} re-used draws")
    for num_times in (10, 50):
        for current in ec.CURRENTS:
            model = ec.electrocoating(current, num_times)
            lower, upper = (f(model, "y", num_outer_samples=num_samples, seed=0) for f in (eig_pce, eig_nmc))
            print(
                f"  {num_times:2d} times {current:5.0f} mA: {lower.eig:.3f} to {upper.eig:.3f} "
                f"+- {upper.standard_error:.3f}   ({upper.num_simulations} simulations, {upper.seconds:.0f} s)"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--eig", type=int, default=0, metavar="DRAWS", help="also the information, by this many draws")
    options = parser.parse_args()
    torch.set_num_threads(1)
    speed(500 if options.quick else 10_000)
    order_in_space((8, 16, 32) if options.quick else (8, 16, 32, 64, 128))
    order_in_time((10, 20, 40) if options.quick else (10, 20, 40, 80, 160))
    accuracy_of_the_model(*((5, 400) if options.quick else (40, 1_600)))
    if options.eig:
        information(options.eig)


if __name__ == "__main__":
    main()

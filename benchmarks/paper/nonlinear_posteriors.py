"""Case 1 of the paper, continued: the flow's posteriors beside those of sequential Monte Carlo (figures 3 and 4).

The outcomes are set quantiles of what a design gives, the lowest with one mode, the others with several. How many modes
each marginal of the exact posterior has is counted by quadrature. (`nonlinear.py` is the script.)
"""

import matplotlib.pyplot as plt
import pyro
import torch
from pyro import poutine
from study import table

from pyro_voed import Experiment, flow_posterior, sample_joint, smc_posterior
from pyro_voed.diagnostics import agreement
from pyro_voed.plots import plot_posterior_grid
from pyro_voed.problems import nonlinear as problem

POSTERIOR_DESIGNS = (0.2, 1.0)
QUANTILES = (0.02, 0.5, 0.95)
TARGETS = ("theta1", "theta2", "theta3")


def compare_posteriors(study, kept):
    """Compare the flow's draws, as `draw_posteriors` gave them for each design, with sequential Monte Carlo's."""
    settings = {"num_particles": study.size(1_000, 200), "num_draws": study.size(1_000, 100), "seed": 7}
    rows = []
    for d, own in zip(POSTERIOR_DESIGNS, kept, strict=True):
        pictures, names = [], []
        for quantile, y, draws in zip(QUANTILES, own["outcomes"], own["draws"], strict=True):
            name = f"compared_{d:g}_{quantile:g}"
            compared = study.part(name, against_smc, draws=draws.tolist(), d=d, y=y, **settings)
            cells = (f"{accuracy:.3f} ± {error:.3f}" for accuracy, error in compared["accuracies"])
            modes = compared["modes"]
            kind = "one" if modes == [1, 1, 1] else "several"
            counts = ", ".join(map(str, modes))
            rows.append(
                [f"{d:g}", f"{quantile:.0%}", f"{y:.3f}", f"{kind} ({counts})", *cells, f"{compared['effective']:,.0f}"]
            )
            pictures.append({"flow": draws, "SMC": compared["draws"]})
            names.append(f"y = {y:.2f}")
        plot_posterior_grid(pictures, row_names=names, column_names=TARGETS)
        study.save(plt.gcf(), f"posteriors_{d:g}".replace(".", ""))
    columns = [
        "d",
        "quantile of y",
        "y",
        "modes (theta1, theta2, theta3)",
        "C2ST",
        "control",
        "shifted",
        "SMC effective",
    ]
    table("Flow posteriors against sequential Monte Carlo (figures 3 and 4)", columns, rows)


def draw_posteriors(result, index, d, num_draws):
    """Draw from the flow's posterior of outcomes at set quantiles of what the design gives."""
    simulated = sample_joint(Experiment(problem.nonlinear(), "y"), 20_000, {"d": torch.tensor(d)}).y
    outcomes = simulated.flatten().quantile(torch.tensor(QUANTILES)).tolist()
    draws = [flow_posterior(result, torch.tensor(y), num_draws, design_index=index, seed=0).matrix() for y in outcomes]
    return {"outcomes": outcomes, "draws": draws}


def against_smc(draws, d, y, num_particles, num_draws, seed):
    reference = smc_posterior(
        problem.nonlinear(),
        torch.tensor(y),
        "y",
        designs={"d": torch.tensor(d)},
        num_particles=num_particles,
        seed=seed,
    )
    compared = agreement(torch.tensor(draws), reference, num_draws=num_draws, seed=seed)
    tests = (compared.c2st, compared.control, compared.power)
    return {
        "draws": reference.matrix(),
        "accuracies": [[test.accuracy, test.standard_error] for test in tests],
        "effective": min(size.item() for size in reference.effective_sample_size.values()),
        "modes": exact_modes(d, y),
    }


def exact_modes(d, y):
    """Count the local maxima of each exact marginal posterior, by quadrature."""
    middles = (torch.arange(100).double() + 0.5) / 100
    one, two, three = torch.meshgrid(middles, middles, torch.linspace(-2, 2, 401).double(), indexing="ij")
    given = {"theta1": one, "theta2": two, "theta3": three, "y": torch.tensor(y).double()}
    model = poutine.substitute(pyro.condition(problem.nonlinear(), given), {"d": torch.tensor(d).double()})
    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    density = sum(trace.nodes[name]["log_prob"] for name in given).exp()
    counts = []
    for axis in range(3):
        marginal = density.sum([other for other in range(3) if other != axis])
        rises = torch.cat([marginal[:1], marginal.diff(), -marginal[-1:]]) > 0
        counts.append(int((rises[:-1] & ~rises[1:]).sum()))
    return counts

"""At which seven substrate concentrations should an enzyme's rate be measured? The library's main job, in a minute.

A Michaelis-Menten model is written as an ordinary Pyro program whose design is a `pyro.param`; `optimise_design` moves
the seven concentrations from a start near one half to where the measurements tell most about the enzyme. Printed are
the designs and their expected information gain before and after, beside the exact values; drawn are the search and
what it changes. Run with `make demo`, or `python tutorials/demo.py` where the library is installed.
"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyro_voed import Fresh, flow_posterior, optimise_design
from pyro_voed.plots import plot_design_path, plot_posterior_grid, plot_realisations, plot_training
from pyro_voed.problems.michaelis_menten import exact_eig

START = torch.tensor([0.4745, 0.4456, 0.5147, 0.5618, 0.4844, 0.4880, 0.5162])
PARAMETERS = ["maximal rate", "concentration of half that rate"]
FIGURES = Path(os.environ.get("PYRO_VOED_FIGURES", "figures"))
# Tiny sizes, to see in seconds that everything runs; the numbers mean nothing then.
SMOKE = os.environ.get("PYRO_VOED_SMOKE") == "1"


def mean_rate(theta, xi):
    maximal_rate, half_rate_concentration = (20 + 180 * theta).split(1, dim=-1)
    saturation = (400 * xi) ** 4
    return saturation * maximal_rate / (saturation + half_rate_concentration**4)


def model():
    xi = pyro.param("xi", START.clone(), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.5, 0.1).expand([2]).to_event(1))
    return pyro.sample("y", dist.Normal(mean_rate(theta, xi), 5.0).to_event(1))


def simulate(thetas):
    """Return one outcome for each of some parameters, at the design in the parameter store."""
    return torch.stack([pyro.condition(model, data={"theta": theta})() for theta in thetas]).detach()


def main():
    pyro.set_rng_seed(1)
    torch.set_num_threads(1)
    thetas = dist.Normal(0.5, 0.1).sample([3, 2])
    outcomes_before = simulate(thetas)

    sizes = {"training": Fresh(max_steps=100), "num_samples": 500} if SMOKE else {}
    result = optimise_design(model, "y", "theta", initial_eig=True, seed=1, progress=True, **sizes)
    outcomes_after = simulate(thetas)

    best = result.designs["xi"]
    exact, exact_error = exact_eig(torch.stack([START, best]), num_outcomes=512 if SMOKE else 4096)
    print()
    for name, xi, bound, value, error in zip(
        ("before", "after"), (START, best), (result.initial, result.final), exact, exact_error, strict=True
    ):
        print(f"{name}: xi = {', '.join(f'{x:.3f}' for x in xi.sort().values.tolist())} (sorted)")
        print(f"    lower bound by the flow  {bound.eig:.4f} +- {bound.standard_error:.4f} nats")
        print(f"    exact, by quadrature     {value:.4f} +- {error:.4f} nats")
    print(
        f"search: {result.history.num_steps:,} steps, stopped by {result.history.stop_reason}; in all "
        f"{result.num_simulations:,} simulated experiments, {result.seconds:.0f} s"
    )

    posteriors = [
        {
            "flow before": flow_posterior(result.initial, {"y": before}, num_samples=4_000),
            "flow after": flow_posterior(result, {"y": after}, num_samples=4_000),
        }
        for before, after in zip(outcomes_before, outcomes_after, strict=True)
    ]
    print()
    FIGURES.mkdir(parents=True, exist_ok=True)
    save(draw_path(result), "demo_design_path.png")
    save(draw_training(result), "demo_training.png")
    save(draw_realisations(thetas, [(START, outcomes_before), (best, outcomes_after)]), "demo_realisations.png")
    save(draw_posteriors(posteriors, thetas), "demo_posteriors.png")


def draw_path(result):
    ax = plot_design_path(result)
    ax.set(ylim=(0, 1), ylabel="substrate concentration / 400", title="The seven concentrations during the search")
    return ax.figure


def draw_training(result):
    ax = plot_training(result.history)
    ax.axhline(result.eig.item(), color="0.1", linewidth=1, linestyle=":", label="reported, on fresh simulations")
    ax.legend(loc="lower right", fontsize="small")
    ax.set(ylabel="lower bound on the EIG (nats)", title="Climbing the bound in design and flow together")
    return ax.figure


def draw_realisations(thetas, experiments):
    grid = torch.linspace(0.0, 1.0, 200)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for ax, (xi, outcomes), name in zip(axes, experiments, ("before", "after"), strict=True):
        plot_realisations(
            xi,
            outcomes,
            ax,
            curve_designs=grid,
            curve_values=mean_rate(thetas.unsqueeze(1), grid.unsqueeze(-1)).squeeze(-1),
            design_name="substrate concentration / 400",
            observation_name="reaction rate",
        )
        ax.set(title=f"Three experiments at the designs {name}", xlim=(0, 1))
    axes[1].set_ylabel("")
    axes[0].legend(frameon=False)
    return figure


def draw_posteriors(posteriors, thetas):
    prior = dist.Normal(0.5, 0.1).sample([20_000, 2])
    rows = [f"enzyme {number}" for number in (1, 2, 3)]
    grid = plot_posterior_grid(
        posteriors, prior=prior, true_values=list(thetas), row_names=rows, column_names=PARAMETERS
    )
    return grid[0, 0].figure


def save(figure, name):
    figure.savefig(FIGURES / name, dpi=120)
    plt.close(figure)
    print(f"figure written: {FIGURES / name}")


if __name__ == "__main__":
    main()

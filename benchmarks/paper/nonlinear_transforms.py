"""Case 1 of the paper, continued: how many transforms, how many simulations? (`nonlinear.py` is the script.)

At every second of the designs a flow of its own is trained on a fixed pool of simulations split into minibatches, with
as many steps and passes over the pool for every number of transforms, no validation and no early stopping. Its bound
is averaged over fresh simulations (figure 5) and over the pool that it was trained on (figure 14). Couplings are the
library's splines, where the paper's are affine; layers have 32 units, as there.
"""

import time
from functools import partial

import matplotlib.pyplot as plt
import torch
from study import table

from pyro_voed import Experiment, sample_joint
from pyro_voed.densities import SplineCouplingFlow, StackedDensity, Standardise, StandardisedDensity
from pyro_voed.estimators.fit import weights_group
from pyro_voed.plots.style import BLACK, COLOURS, LINE_STYLES
from pyro_voed.problems import nonlinear as problem
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh

TRANSFORMS = (1, 2, 3, 4, 5)


def transforms(study, designs):
    pools = [1_000, 3_000, 10_000, 30_000] if not study.quick else [200, 400]
    designs = designs[::2]
    exact = problem.exact_eig(torch.tensor(designs))
    settings = {"designs": designs, "most_steps": study.size(1_250, 15), "most_passes": 50, "rows": 64, "seed": 8}
    runs = {
        (count, size): study.part(f"pool_{size}_{count}", from_pool, num_transforms=count, size=size, **settings)
        for size in pools
        for count in TRANSFORMS
    }
    cells = {
        "Mean over designs of exact less bound, nats": lambda run: f"{(exact - run['fresh']).mean():.3f}",
        "Largest over designs of exact less bound, nats": lambda run: f"{(exact - run['fresh']).max():.3f}",
        "Design where this bound is largest": lambda run: f"{designs[run['fresh'].argmax()]:.1f}",
        "Largest standard error of these bounds, nats": lambda run: f"{run['error'].max():.3f}",
        "Bound on the training simulations less exact, mean over designs, nats (figure 14)": lambda run: (
            f"{(run['pool'] - exact).mean():+.3f}"
        ),
        "Design where it is largest": lambda run: f"{designs[run['pool'].argmax()]:.1f}",
        "Its largest excess over the designs, nats": lambda run: f"{(run['pool'] - exact).max():+.3f}",
    }
    for title, cell in cells.items():
        rows = [[str(count), *(cell(runs[count, size]) for size in pools)] for count in TRANSFORMS]
        table(title, ["transforms", *(f"{size:,} simulations" for size in pools)], rows)
    seconds = [[f"{size:,}", *(f"{runs[count, size]['seconds']:.0f}" for count in TRANSFORMS)] for size in pools]
    table("Seconds of training, all designs together", ["simulations", *map(str, TRANSFORMS)], seconds)
    draw_transforms(study, designs, pools, exact, runs)


def draw_transforms(study, designs, pools, exact, runs):
    kinds = {"fresh": "on fresh simulations", "pool": "on those of training"}
    figure, axes = plt.subplots(
        2, len(pools), figsize=(9.5, 4.8), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for row, (kind, words) in zip(axes, kinds.items(), strict=True):
        row[0].set_ylabel(f"bound (nats)\n{words}")
        for ax, size in zip(row, pools, strict=True):
            ax.plot(designs, exact, color=BLACK, linewidth=1.2, label="exact")
            for count, colour, style in zip(TRANSFORMS, COLOURS, LINE_STYLES, strict=False):
                ax.plot(designs, runs[count, size][kind], color=colour, linestyle=style, label=f"{count}")
    for ax, size in zip(axes[0], pools, strict=True):
        ax.set_title(f"{size:,} simulations", fontsize="medium")
    for ax in axes[1]:
        ax.set_xlabel("design d")
    lowest = min(run[kind].min().item() for run in runs.values() for kind in kinds)
    # An overfitted flow can be off by thousands of nats on fresh simulations.
    axes[0, 0].set_ylim(bottom=max(lowest - 0.1, -0.5))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="transforms")
    study.save(figure, "transforms")


def from_pool(designs, num_transforms, size, most_steps, most_passes, rows, seed):
    """Train a flow for each design on a fixed pool, without early stopping; evaluate on the pool and on fresh draws."""
    started = time.process_time()
    experiment = Experiment(problem.nonlinear(), "y")
    torch.manual_seed(seed)
    draw = partial(sample_joint, experiment, designs={"d": torch.tensor(designs)})
    pool, fresh = draw(size), draw(10_000)
    stack = StackedDensity([coupling_flow(pool.theta[:, i], pool.y[:, i], num_transforms) for i in range(len(designs))])

    def terms(sample):
        return stack.log_prob(sample.theta, sample.y) - sample.log_prior

    num_steps = min(most_steps, most_passes * size // rows)
    ascent = Ascent([weights_group(stack, [5e-3])])
    fit_fresh(lambda: pool[torch.randint(size, (rows,))], terms, ascent, num_steps=num_steps, progress=False)
    with torch.no_grad():
        on_fresh, on_pool = terms(fresh), terms(pool)
    error = on_fresh.std(0) / len(on_fresh) ** 0.5
    seconds = time.process_time() - started
    return {"fresh": on_fresh.mean(0), "error": error, "pool": on_pool.mean(0), "seconds": seconds}


def coupling_flow(theta, y, num_transforms):
    density = SplineCouplingFlow(3, 1, num_transforms=num_transforms, hidden_dim=32)
    return StandardisedDensity(density, Standardise(3).fit_(theta), Standardise(1).fit_(y))

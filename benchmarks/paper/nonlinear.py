"""Case 1 of the paper: three parameters, one design, posteriors with several modes.

The model is `pyro_voed.problems.nonlinear`, whose equation and constants are ours. The parts, and what they stand for
in Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational Bayesian optimal experimental design
with normalizing flows":

* `eig`: the information at eleven designs by nested Monte Carlo of three kinds, by the Gaussian family and by a flow,
  beside the exact value (figure 2a, times of appendix G); the same for the model of one parameter;
* `history`: the bound during training at one design (figure 2b);
* `posteriors`: the flow's posteriors beside those of sequential Monte Carlo at two designs (figures 3 and 4);
* `transforms`: the bound against the numbers of transforms and of simulations (figure 5), and the bound on the very
  simulations that trained it (figure 14).

Seconds are of the processor. Run as

    python benchmarks/paper/nonlinear.py [--quick] [--only eig history posteriors transforms] [--figures DIR]
"""

import time
from functools import partial

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from nonlinear_posteriors import POSTERIOR_DESIGNS, compare_posteriors, draw_posteriors
from nonlinear_transforms import transforms
from study import Study, table
from torch import nn

from pyro_voed import Fresh, amortise_eig, eig_ba, eig_flow, eig_nmc
from pyro_voed.densities import AffineCouplingFlow, SplineCouplingFlow
from pyro_voed.plots.style import BLACK, COLOURS
from pyro_voed.problems import nonlinear as problem

MODELS = {"three": problem.nonlinear, "one": problem.nonlinear_one}
EXACT = {"three": problem.exact_eig, "one": problem.exact_eig_one}
# One flow for the whole interval: rectifiers follow the kink that the model has at the design 0.2.
INTERVAL_FLOW = partial(SplineCouplingFlow, num_transforms=4, hidden_dim=128, activation=nn.ReLU)
DESIGN_FLOW = partial(SplineCouplingFlow, num_transforms=4)
BEST_DESIGN = 1.0
PAPER_SECONDS = {"Hi-NMC": "57", "Lo-NMC": "below 0.1", "re-used NMC": "16.5", "vOED-G": "43", "flow": "98"}


def main():
    chapters = {"eig": eig, "history": history, "posteriors": posteriors, "transforms": transforms}
    study = Study("nonlinear", __doc__.splitlines()[0], list(chapters))
    designs = [0.0, 0.2, 1.0] if study.quick else list(problem.DESIGNS)
    for name in study.chosen:
        chapters[name](study, designs)


# The information at all designs.


def eig(study, designs):
    many = study.size(10_000, 100)
    three = {"model": "three", "designs": designs}
    gaussian = {"designs": designs, "num_steps": study.size(2_000, 30), "seed": 0}
    runs = {
        "Hi-NMC": study.part("nested_high", nested, num_outer=many // 2, num_inner=many // 2, seed=0, **three),
        "Lo-NMC": study.part("nested_low", nested, num_outer=100, num_inner=100, seed=1, **three),
        "re-used NMC": study.part("nested_reused", nested, num_outer=many, num_inner=None, seed=2, **three),
        "vOED-G": study.part("gaussian", gaussian_as_it_is, **gaussian),
        "vOED-G, mapped": study.part("gaussian_mapped", gaussian_mapped, **gaussian),
        "flow": flow_of_three(study, designs),
    }
    eig_table("Three parameters, nats; in brackets the best Gaussian (figure 2a)", "three", runs, designs)
    repeated = study.part("nested_low_repeated", repeated_low, designs=designs, num_repeats=study.size(100, 3))
    bias_table(repeated, designs)
    reused = {"model": "one", "designs": designs, "num_outer": many, "num_inner": None, "seed": 3}
    stages = [[study.size(3_000, 30), 512, 2e-3], [study.size(2_000, 20), 1_024, 1.5e-3]]
    runs_one = {
        "re-used NMC": study.part("one_nested", nested, **reused),
        "flow": trained_flow(study, "one", designs, stages),
    }
    eig_table("One parameter, nats", "one", runs_one, designs)
    draw_curves(study, designs, {"three": runs, "one": runs_one})


def flow_of_three(study, designs):
    """Return the curve of the flow of three parameters, with draws from its posteriors for the chapter on these."""
    stages = [[study.size(8_000, 30), 512, 3e-3], [study.size(2_500, 20), 1_024, 1.5e-3]]
    return trained_flow(study, "three", designs, stages)


def trained_flow(study, model, designs, stages):
    """Train one flow for the whole interval, each stage (steps, batch, rate) a part, and evaluate it at the designs."""
    trained = None
    for number in range(1, len(stages) + 1):
        train = partial(train_stage, trained)
        trained = study.part(f"flow_{model}_stage{number}", train, model=model, stages=stages[:number], seed=4 + number)
    evaluate = partial(evaluate_flow, trained)
    num_draws = study.size(4_000, 400) if model == "three" else 0
    return study.part(
        f"flow_{model}", evaluate, model=model, designs=designs, stages=stages, num_draws=num_draws, seed=4
    )


def nested(model, designs, num_outer, num_inner, seed):
    started = time.process_time()
    sizes = {"num_outer_samples": num_outer, "num_inner_samples": num_inner}
    result = eig_nmc(MODELS[model](), "y", designs={"d": torch.tensor(designs)}, seed=seed, **sizes)
    return curve(result.eig, result.standard_error, result.num_simulations, started)


def repeated_low(designs, num_repeats):
    return torch.tensor([nested("three", designs, 100, 100, seed=100 + seed)["eig"] for seed in range(num_repeats)])


def gaussian_as_it_is(designs, num_steps, seed):
    torch.manual_seed(seed)
    started = time.process_time()
    results = [fitted_gaussian(d, num_steps, seed) for d in designs]
    return curve(
        torch.stack([result.eig for result in results]),
        torch.stack([result.standard_error for result in results]),
        sum(result.num_simulations for result in results),
        started,
    )


def gaussian_mapped(designs, num_steps, seed):
    started = time.process_time()
    result = eig_flow(
        problem.nonlinear(),
        "y",
        designs={"d": torch.tensor(designs)},
        ensemble=True,
        density=partial(AffineCouplingFlow, num_transforms=0, hidden_dim=32),
        training=Fresh(num_steps=num_steps, batch_size=256 * len(designs), learning_rate=5e-3),
        num_samples=20_000,
        seed=seed,
        progress=False,
    )
    return curve(result.eig, result.standard_error, result.num_simulations, started)


def fitted_gaussian(d, num_steps, seed):
    return eig_ba(
        problem.nonlinear(),
        "y",
        guide=GaussianGuide(),
        designs={"d": torch.tensor(d)},
        training=Fresh(num_steps=num_steps, batch_size=256, learning_rate=5e-3),
        num_samples=20_000,
        seed=seed,
        progress=False,
    )


class GaussianGuide(nn.Module):
    """A Gaussian of the parameters as they are, mean and covariance by a network of the outcome: vOED-G."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 9))

    def forward(self, observations):
        means, log_scales, slopes = self.network(observations["y"].unsqueeze(-1)).split(3, -1)
        (m1, m2, m3), (s1, s2, s3), (a, b, c) = means.unbind(-1), log_scales.exp().unbind(-1), slopes.unbind(-1)
        theta1 = pyro.sample("theta1", dist.Normal(m1, s1))
        theta2 = pyro.sample("theta2", dist.Normal(m2 + a * theta1, s2))
        pyro.sample("theta3", dist.Normal(m3 + b * theta1 + c * theta2, s3))


def train_stage(earlier, model, stages, seed):
    """Train the flow by the last of the stages, from where the earlier ones left it."""
    started = time.process_time()
    num_steps, batch_size, rate = stages[-1]
    trained = amortised(
        model,
        density_of(model, earlier),
        Fresh(num_steps=num_steps, batch_size=batch_size, learning_rate=rate),
        seed,
    )
    before = earlier or {"calls": 0, "seconds": 0.0}
    return {
        "weights": dict(trained.density.state_dict()),
        "calls": before["calls"] + trained.num_simulations,
        "seconds": before["seconds"] + time.process_time() - started,
    }


def amortised(model, density, training=Fresh(num_steps=0), seed=0):  # noqa: B008
    """Train a density over the whole interval, or take it as it is."""
    return amortise_eig(MODELS[model](), "y", density=density, training=training, seed=seed, progress=False)


def density_of(model, trained):
    """Return the density with the weights kept, the factory of a new one where there are none."""
    if trained is None:
        return INTERVAL_FLOW
    density = amortised(model, INTERVAL_FLOW).density
    density.load_state_dict(trained["weights"])
    return density


def evaluate_flow(trained, model, designs, stages, num_draws, seed):
    """Evaluate the trained flow at the designs, and draw from it; `stages` are those that trained it."""
    torch.manual_seed(seed)
    started = time.process_time() - trained["seconds"]
    flow = amortised(model, density_of(model, trained))
    result = flow.at({"d": torch.tensor(designs)}, num_samples=40_000, seed=seed)
    kept = curve(result.eig, result.standard_error, trained["calls"] + result.num_simulations, started)
    if num_draws:
        kept["posteriors"] = [draw_posteriors(result, designs.index(d), d, num_draws) for d in POSTERIOR_DESIGNS]
    return kept


def curve(eig, standard_error, calls, started):
    """Return what is kept of the estimates at all designs: cost is for each design."""
    seconds = (time.process_time() - started) / len(eig)
    return {"eig": eig.tolist(), "error": standard_error.tolist(), "calls": calls / len(eig), "seconds": seconds}


def eig_table(title, model, runs, designs):
    exact = EXACT[model](torch.tensor(designs)).tolist()
    best = dict(zip(problem.DESIGNS, problem.GAUSSIAN_BOUND, strict=True))
    rows = []
    for i, d in enumerate(designs):
        cells = [f"{run['eig'][i]:.3f}" + f" ({best[d]:.3f})" * (name == "vOED-G") for name, run in runs.items()]
        rows.append([f"{d:.1f}", f"{exact[i]:.4f}", *cells, f"{exact[i] - runs['flow']['eig'][i]:+.4f}"])
    table(title, ["d", "exact", *runs, "exact less flow"], rows)
    rows = []
    for name, run in runs.items():
        errors = [value - true for value, true in zip(run["eig"], exact, strict=True)]
        optimum = designs[max(range(len(designs)), key=run["eig"].__getitem__)]
        rows.append([
            name, f"{optimum:.1f}", f"{max(errors, key=abs):+.3f}", f"{max(run['error']):.3f}",
            f"{run['calls']:,.0f}", f"{run['seconds']:.1f}", PAPER_SECONDS.get(name, "") if model == "three" else "",
        ])  # fmt: skip
    columns = ["method", "its optimum", "largest error", "standard error", "calls", "seconds", "paper's seconds"]
    table("The same; calls and seconds for each design (appendix G)", columns, rows)


def bias_table(estimates, designs):
    errors = estimates - problem.exact_eig(torch.tensor(designs))
    spread = errors.std(0)
    rows = [
        ["mean error", *(f"{mean:+.3f}" for mean in errors.mean(0).tolist())],
        ["its standard error", *(f"{error:.3f}" for error in (spread / len(errors) ** 0.5).tolist())],
        ["standard deviation", *(f"{deviation:.3f}" for deviation in spread.tolist())],
    ]
    table(f"Lo-NMC, {len(errors)} estimates", ["d", *(f"{d:.1f}" for d in designs)], rows)


def draw_curves(study, designs, runs):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2))
    fine = torch.linspace(0.0, 1.0, 101)
    for ax, (model, own) in zip(axes, runs.items(), strict=True):
        ax.plot(fine, EXACT[model](fine), color=BLACK, linewidth=1, label="exact")
        for (name, run), marker in zip(own.items(), "s^Dv<o" if model == "three" else "Do", strict=True):
            colour = COLOURS[list(runs["three"]).index(name)]
            ax.errorbar(
                designs, run["eig"], [2 * error for error in run["error"]], color=colour, marker=marker, markersize=5,
                linestyle=":" if "NMC" in name else "-", linewidth=1, label=name,
            )  # fmt: skip
        ax.set(xlabel="design d", title=f"{model} parameter{'s' if model == 'three' else ''}")
    axes[0].set_ylabel("expected information gain (nats)\nbars: ±2 standard errors")
    axes[0].legend(frameon=False, fontsize="small", ncols=2, loc="center right", bbox_to_anchor=(1.0, 0.42))
    axes[1].legend(frameon=False, fontsize="small")
    study.save(figure, "eig")


def posteriors(study, designs):
    compare_posteriors(study, flow_of_three(study, designs)["posteriors"])


# Training at one design.


def history(study, designs):
    settings = {"num_steps": study.size(4_000, 60), "seed": 6}
    runs = {
        "vOED-G": study.part("history_gaussian", train_gaussian, **settings),
        "flow": study.part("history_flow", train_flow, **settings),
    }
    exact = problem.exact_eig(torch.tensor(BEST_DESIGN)).item()
    figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    ax.axhline(exact, color=BLACK, linewidth=1, label="exact")
    window = study.size(50, 10)
    rows = []
    for (name, run), colour in zip(runs.items(), (COLOURS[3], COLOURS[5]), strict=True):
        ax.plot(torch.arange(len(run["bound"])) + 1, run["bound"], color=colour, linewidth=0.4, alpha=0.35)
        means = run["bound"].unfold(0, window, 1).mean(-1)
        ax.plot(torch.arange(len(means)) + window, means, color=colour, label=f"{name}, mean of {window} steps")
        # The last steps cool down, so their mean is what training ends at.
        near = int((means > means[-1] - 0.05).nonzero()[0]) + window
        spread = run["bound"][-window:].std().item()
        rows.append([
            name, f"{run['eig']:.3f} ± {run['error']:.3f}", f"{exact - run['eig']:+.3f}", f"{near:,}", f"{spread:.3f}",
            f"{run['calls']:,}", f"{run['seconds']:.0f}",
        ])  # fmt: skip
    ax.set(xlabel="step", ylabel="bound of the minibatch (nats)", ylim=(-0.5, exact + 0.15))
    ax.legend(frameon=False, fontsize="small", loc="center right")
    study.save(figure, "history")
    columns = ["family", "bound", "below exact", "steps to within 0.05", "spread at the end", "calls", "seconds"]
    table(f"Training at d = {BEST_DESIGN:g} (figure 2b), exact {exact:.4f} nats", columns, rows)


def train_gaussian(num_steps, seed):
    torch.manual_seed(seed)
    started = time.process_time()
    return training_record(fitted_gaussian(BEST_DESIGN, num_steps, seed), started)


def train_flow(num_steps, seed):
    started = time.process_time()
    result = eig_flow(
        problem.nonlinear(),
        "y",
        designs={"d": torch.tensor(BEST_DESIGN)},
        density=DESIGN_FLOW,
        training=Fresh(num_steps=num_steps, learning_rate=4e-3),
        num_samples=20_000,
        seed=seed,
        progress=False,
    )
    return training_record(result, started)


def training_record(result, started):
    return {
        "bound": result.history.bound, "eig": result.eig.item(), "error": result.standard_error.item(),
        "calls": result.num_simulations, "seconds": time.process_time() - started,
    }  # fmt: skip


if __name__ == "__main__":
    main()

"""Case 2 of the paper: twenty rows of covariates for 21 parameters, 400 design variables searched at once.

Stands for Table 1 and Figures 6 and 7 of Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational
Bayesian optimal experimental design with normalizing flows". Parts:

* `flow`, `gaussian_gamma`: joint searches for the design from one random start, at no more than the paper's 1.09e7
  simulations in all, and ten evaluations of the bound at the design found;
* `scores`: ten estimates by nested Monte Carlo at each design, and its exact information;
* `identity`: bounds of several densities where each row measures one coefficient, beside the exact value; marginals of
  both families there for three outcomes, against NUTS, with Kullback-Leibler divergences.

    python benchmarks/paper/regression.py [--quick] [--only PART ...] [--figures DIR]
"""

import math

import matplotlib.pyplot as plt
import pyro
import torch
from gaussian_gamma import gaussian_gamma
from study import Study, table

from pyro_voed import Fresh, certify, eig_flow, eig_nmc, flow_posterior, nuts_posterior, optimise_design
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.problems.regression import (
    IDENTITY,
    IDENTITY_EIG,
    NOISE_FLOOR,
    exact_eig,
    log_density,
    regression,
    sigma_nodes,
    unit_rows,
)
from pyro_voed.problems.regression_coupled import coupled_eig

PAPER = {"flow": ("20.94 (0.19)", "24.91 (0.24)"), "gaussian_gamma": ("12.07 (0.11)", "24.28 (0.24)")}
REPEATS = 10


def five_affine(theta_dim, context_dim):
    return AffineCouplingFlow(theta_dim, context_dim, num_transforms=5, hidden_dim=64)


#: Densities by name, as `eig_flow` takes them.
DENSITIES = {
    "default": None,
    "five_affine": five_affine,
    "gaussian_gamma": gaussian_gamma(),
}


def random_start(seed):
    entries = torch.randn(IDENTITY.shape, generator=torch.Generator().manual_seed(seed))
    return unit_rows({"xi": entries})["xi"]


def at(design):
    """Return the model at a design; one that an earlier search left in the parameter store would be read instead."""
    pyro.clear_param_store()
    return regression(design)


def train(design, density, *, steps, batch, rate, seed, num_samples=20_000):
    """Fit a density at one design; `density` is a name of `DENSITIES` or a density to go on from."""
    given = DENSITIES[density] if isinstance(density, str) else density
    training = Fresh(num_steps=steps, batch_size=batch, learning_rate=rate)
    return eig_flow(
        at(design), "y", density=given, training=training, num_samples=num_samples, seed=seed, progress=False
    )


def search(density, warm_steps, search_steps, fit_steps, batch, rate, design_rate, seed, num_samples):
    """Search from a random start, then fit the density at the design found.

    The density first learns the start's posterior while the design stands still: a loose bound sends several rows to
    the same coefficient, an end that no small step leaves again.
    """
    start = random_start(seed)
    warm = train(start, density, steps=warm_steps, batch=batch, rate=rate, seed=seed)
    found = optimise_design(
        at(start),
        "y",
        density=warm.density,
        constraints=unit_rows,
        training=Fresh(num_steps=search_steps, batch_size=batch, learning_rate=rate, design_learning_rate=design_rate),
        num_samples=num_samples,
        seed=seed + 1,
        progress=None,
    )
    design = found.designs["xi"].detach()
    fitted = train(design, found.density, steps=fit_steps, batch=batch, rate=rate, seed=seed + 2)
    repeats = [
        train(design, fitted.density, steps=0, batch=batch, rate=rate, seed=seed + 3 + k, num_samples=num_samples)
        for k in range(REPEATS)
    ]
    kept = [warm, found, fitted]
    return {
        "bounds": [repeat.eig.item() for repeat in repeats],
        "simulations": sum(run.num_simulations for run in kept),
        "seconds": sum(run.seconds for run in kept),
        "design": design,
    }


def score(design, num_outer, num_outcomes, num_parts):
    """Estimate a design's information by nested Monte Carlo with re-used draws, ten times, and exactly."""
    design = torch.tensor(design)
    nested = [eig_nmc(at(design), "y", num_outer_samples=num_outer, seed=seed) for seed in range(REPEATS)]
    largest = torch.where(design.abs() == design.abs().amax(-1, keepdim=True), design, 0.0)
    columns = design.abs().argmax(-1).unique().numel()
    result = {"nested": [n.eig.item() for n in nested], "columns": columns, "largest": design.abs().amax(-1)}
    try:
        exact, error = coupled_eig(design, num_outcomes=num_outcomes, num_parts=num_parts)
        result["exact"] = (exact.item(), error.item())
    except (ArithmeticError, ValueError) as refusal:
        result["refusal"] = str(refusal)
    result["of_largest"] = tuple(value.item() for value in exact_eig(largest))
    return result


def enclose(design, steps, batch, rate, seed, width, max_simulations):
    """Bound a design's information from both sides, with a flow's certificate."""
    fit = train(torch.tensor(design), "default", steps=steps, batch=batch, rate=rate, seed=seed)
    certificate = certify(fit, width=width, max_simulations=max_simulations, seed=seed).certificate
    return {"interval": certificate.interval.tolist(), "confidence": certificate.confidence}


def bound_at_identity(density, steps, batch, rate, seed, num_samples):
    fit = train(IDENTITY, density, steps=steps, batch=batch, rate=rate, seed=seed, num_samples=num_samples)
    return summary_of(fit)


def summary_of(fit):
    return {
        "bound": fit.eig.item(),
        "error": fit.standard_error.item(),
        "simulations": fit.num_simulations,
        "seconds": fit.seconds,
    }


def posteriors(densities, steps, batch, rate, seed, num_draws, num_outcomes, num_samples):
    """Draw from NUTS and from each density, trained at the identity design, for outcomes simulated there."""
    model = at(IDENTITY)
    with pyro.poutine.seed(rng_seed=seed + 100), torch.no_grad():
        outcomes = [model() for _ in range(num_outcomes)]
    settings = {"steps": steps, "batch": batch, "rate": rate, "seed": seed, "num_samples": num_samples}
    fits = {name: train(IDENTITY, name, **settings) for name in densities}
    rows = []
    for y in outcomes:
        sizes = {"num_samples": num_draws, "num_warmup": num_draws // 2, "num_chains": 2}
        nuts = nuts_posterior(model, y, "y", seed=seed, progress=False, **sizes)
        samples = {"NUTS": nuts} | {
            name: flow_posterior(fit, y, 2 * num_draws, seed=seed) for name, fit in fits.items()
        }
        draws = {name: packed(sample) for name, sample in samples.items()}
        divergences = {name: divergence(draws["NUTS"], fit.density, y) for name, fit in fits.items()}
        r_hat = max(value.nan_to_num(1.0).max().item() for value in nuts.r_hat.values())
        rows.append({"y": y, "draws": draws, "kl": divergences, "r_hat": r_hat})
    return {"rows": rows, "fits": {name: summary_of(fit) for name, fit in fits.items()}}


def divergence(theta, density, y):
    """Estimate KL(posterior || density) from draws of the posterior, whose density at the identity is exact.

    Draws of a chain are dependent: the standard error is that of the means of twenty stretches.
    """
    w, log_sigma = theta[:, :-1].double(), theta[:, -1].double()
    tau = log_sigma.exp() + NOISE_FLOOR
    log_joint = -w.abs().sum(-1) - w.shape[-1] * math.log(2.0) + log_sigma - log_sigma.exp()
    log_joint += torch.distributions.Normal(w, tau.unsqueeze(-1)).log_prob(y.double()).sum(-1)
    nodes, weights = sigma_nodes(len(y))
    log_evidence = torch.logsumexp(log_density(y.double(), IDENTITY.double(), nodes) + weights.log(), 0)
    with torch.no_grad():
        log_q = density.log_prob(theta, y).double()
    stretches = torch.stack([part.mean() for part in (log_joint - log_evidence - log_q).chunk(20)])
    return stretches.mean().item(), stretches.std().item() / len(stretches) ** 0.5


def packed(sample):
    """Return coefficients and log sigma side by side, in which both families are densities on the whole space."""
    return torch.cat([sample.flat("w"), sample.flat("sigma").log().unsqueeze(-1)], -1)


def searches(study):
    sizes = {"warm_steps": study.size(1_000, 20), "search_steps": study.size(6_000, 40)}
    sizes |= {"fit_steps": study.size(6_000, 20), "batch": study.size(512, 64), "num_samples": study.size(20_000, 200)}
    found = {}
    for name, density in (("flow", "default"), ("gaussian_gamma", "gaussian_gamma")):
        if name in study.chosen or "scores" in study.chosen:
            settings = sizes | {
                "density": density,
                "rate": 2e-3,
                "design_rate": 1e-2 if study.quick else 6e-4,
                "seed": 0,
            }
            found[name] = study.part(name, search, **settings)
    return found


def show_searches(study, found, scores):
    rows = []
    for name, result in found.items():
        scored = scores.get(name, {})
        exact = scored.get("exact")
        rows.append(
            [
                name.replace("_", "-"),
                PAPER[name][0],
                mean_and_spread(result["bounds"]),
                PAPER[name][1],
                mean_and_spread(scored["nested"]) if scored else "",
                f"{exact[0]:.3f} ± {exact[1]:.3f}" if exact else enclosed(scored),
                f"{result['simulations']:.3g}",
                f"{result['seconds']:.0f}",
            ]
        )
    columns = ["family", "bound, paper", "bound", "NMC, paper", "NMC", "exact EIG", "simulations", "seconds"]
    # The paper's searches took 1.09e7 simulations each.
    table("Table 1: mean (standard deviation) of ten estimates at the design found, nats", columns, rows)
    for name, scored in scores.items():
        of_largest, error = scored["of_largest"]
        print(
            f"{name}: rows measure {scored['columns']} coefficients, least share of a row's largest entry "
            f"{scored['largest'].min():.4f}; exact EIG with nothing but these entries {of_largest:.3f} ± {error:.3f}"
        )
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.8), layout="constrained", squeeze=False)
    for ax, (name, result) in zip(axes[0], found.items(), strict=True):
        image = ax.imshow(sorted_rows(result["design"]), cmap="RdBu", vmin=-1, vmax=1)
        ax.set(title=f"design found, {name.replace('_', '-')}", xlabel="coefficient", ylabel="row, reordered")
        ax.set(xticks=[0, 5, 10, 15], yticks=[0, 5, 10, 15])
    figure.colorbar(image, ax=axes[0].tolist(), label="entry")
    study.save(figure, "designs")


def enclosed(scored):
    if "interval" not in scored:
        return ""
    low, high = scored["interval"]
    return f"in [{low:.2f}, {high:.2f}] ({scored['confidence']:.0%})"


def sorted_rows(design):
    return design[design.abs().argmax(-1).argsort()].numpy()


def mean_and_spread(values):
    values = torch.tensor(values)
    return f"{values.mean():.2f} ({values.std():.2f})"


def at_identity(study):
    """Train every density at the identity design; two of them also face NUTS."""
    sizes = {"steps": study.size(4_000, 20), "batch": study.size(512, 64), "rate": 5e-3, "seed": 0}
    sizes["num_samples"] = study.size(50_000, 300)
    faced = {
        "densities": ["default", "gaussian_gamma"],
        "num_draws": study.size(2_000, 60),
        "num_outcomes": study.size(3, 2),
    }
    compared = study.part("posteriors", posteriors, **faced, **sizes)
    fits = compared["fits"]
    fits["five_affine"] = study.part("identity_five_affine", bound_at_identity, density="five_affine", **sizes)
    rows = [
        [
            density.replace("_", " "),
            f"{fit['bound']:.3f} ± {fit['error']:.3f}",
            f"{IDENTITY_EIG - fit['bound']:.3f}",
            f"{fit['simulations']:.3g}",
            f"{fit['seconds']:.0f}",
        ]
        for density, fit in fits.items()
    ]
    columns = ["density", "lower bound", "below exact", "simulations", "seconds"]
    table(f"Lower bounds at the identity design, exact {IDENTITY_EIG:.3f} nats", columns, rows)
    show_posteriors(study, compared["rows"])


def show_posteriors(study, rows):
    names = ["gaussian_gamma", "default"]
    cells = [
        [str(number + 1)]
        + [f"{row['kl'][name][0]:.2f} ± {row['kl'][name][1]:.2f}" for name in names]
        + [f"{row['r_hat']:.3f}"]
        for number, row in enumerate(rows)
    ]
    columns = ["outcome", "Gaussian-Gamma", "flow", "R-hat of NUTS"]
    table("Empirical Kullback-Leibler divergence from NUTS draws, nats", columns, cells)
    study.save(marginals(rows), "posteriors")


def marginals(rows):
    shown = [0, 1, 2, 20]
    figure, axes = plt.subplots(len(rows), len(shown), figsize=(11, 2.4 * len(rows)), layout="constrained")
    styles = {"NUTS": ("0.3", "-"), "gaussian_gamma": ("#D55E00", "--"), "default": ("#0072B2", "-")}
    labels = {"NUTS": "NUTS", "gaussian_gamma": "Gaussian-Gamma", "default": "flow"}
    for row, line in zip(rows, axes, strict=True):
        for column, ax in zip(shown, line, strict=True):
            reference = row["draws"]["NUTS"][:, column]
            low, high = reference.quantile(0.002).item(), reference.quantile(0.998).item()
            margin = 0.15 * (high - low)
            for name, (colour, style) in styles.items():
                values = row["draws"][name][:, column].numpy()
                span = (low - margin, high + margin)
                ax.hist(values, 60, range=span, density=True, histtype="step", color=colour, linestyle=style,
                        label=labels[name])  # fmt: skip
            ax.set(yticks=[], xlabel=r"$\log \sigma$" if column == 20 else f"$w_{{{column + 1}}}$")
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure


def main():
    study = Study("regression", __doc__.splitlines()[0], ["flow", "gaussian_gamma", "scores", "identity"])
    found = searches(study)
    scores = {}
    if "scores" in study.chosen:
        sizes = {"num_outer": study.size(10_000, 50)}
        for name, result in found.items():
            settings = sizes | {"design": result["design"].tolist(), "num_outcomes": study.size(128, 2)}
            settings["num_parts"] = study.size(512, 4)
            scores[name] = study.part(f"scores_{name}", score, **settings)
            if "refusal" in scores[name]:
                scores[name] |= enclose_design(study, name, settings["design"])
    if found:
        show_searches(study, found, scores)
    if "identity" in study.chosen:
        at_identity(study)


def enclose_design(study, name, design):
    settings = {"steps": study.size(2_000, 20), "batch": study.size(512, 64), "rate": 2e-3, "seed": 0}
    budget = {"width": 1.0, "max_simulations": study.size(2_000_000, 20_000)}
    return study.part(f"enclosed_{name}", enclose, design=design, **settings, **budget)


if __name__ == "__main__":
    main()
